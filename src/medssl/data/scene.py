"""The scene that a placement may look at, and the places that it returns."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from medssl.data.geometry import Frame
from medssl.data.sampling import Request
from medssl.data.store import Record, VolumeStore
from medssl.data.volume import Box

Region = str
"""The region of a case: "body" (its box) or "volume" (all of it)."""


class Scene:
    """The records, points and derived tables of the cases of one request: all that a placement may look at."""

    def __init__(self, store: VolumeStore, request: Request) -> None:
        self.store = store
        self.request = request

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """The index records of the request's cases."""
        return tuple(self.store.record(case) for case in self.request.cases)

    def record(self, slot: int) -> Record:
        """Return the record of the request's case number `slot`.

        Raises:
            ValueError: The request has fewer cases.
        """
        if slot >= len(self.records):
            raise ValueError(
                f"a view takes case {slot + 1} of its request, which holds {len(self.records)}; use a sampler of pairs"
            )
        return self.records[slot]

    def points(self, slot: int = 0) -> np.ndarray:
        """Return body and label voxels of a case, (point, 4): x, y, z and -1 for body or the label's value."""
        return self.store.points(self.request.cases[slot])

    def derived(self, name: str, slot: int = 0) -> dict[str, np.ndarray]:
        """Return a derived table of a case."""
        return self.store.derived(name, self.request.cases[slot])

    def box(self, slot: int, within: Region) -> Box:
        """Return the body box or the whole volume of a case, in voxel faces."""
        record = self.record(slot)
        return record.body if within == "body" else Box.whole(record.shape)


@dataclass(frozen=True)
class Placement:
    """The place of one view.

    Args:
        slot: Which of the request's cases is shown.
        frame: Place of the view in the volume.
        location_index: Number of the grid location, where there is one.
        coordinate: Coordinate of the location, in [-1, 1] along each axis: the same for all cases.
        is_valid: Whether the case shows this location. Otherwise a crop there lies mostly beyond the volume.
    """

    slot: int
    frame: Frame
    location_index: int | None = None
    coordinate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    is_valid: bool = True


@dataclass(frozen=True)
class Locations:
    """The locations of a case.

    Args:
        center_voxel: Middle of each crop in volume voxels.
        coordinate: Coordinate of each location, in [-1, 1] along each axis, equal for all cases.
        neighbours: Numbers of other locations, nearest first.
        valid: Whether the case shows the location.
    """

    center_voxel: Float[np.ndarray, "location 3"]
    coordinate: Float[np.ndarray, "location 3"]
    neighbours: Int[np.ndarray, "location near"]
    valid: Bool[np.ndarray, " location"]
