"""Queues of keys, one for each location, kept in main memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


def default_length(num_cases: int, batch_size: int) -> int:
    """Return the largest power of two, up to 4096, within the cases outside the batch: no subject meets old keys."""
    free = max(2, num_cases - batch_size)
    return min(4096, 1 << (free.bit_length() - 1))


class LocationQueue(nn.Module):
    """Rings of keys, one for each location, with the subjects they come from; they stay on the CPU.

    The rings are part of the state, so that a resumed training gives the same numbers. 581 locations of 4096 keys of
    128 numbers take 1.2 GB.

    Args:
        num_locations: Number of rings; 1 makes one ring for all locations.
        dim: Width of a key.
        length: Keys that a ring holds; None for `default_length`.
        num_cases: Number of training volumes, for the default length.
        batch_size: Samples in a step, for the default length.
    """

    stays_on_cpu = True
    keys: Tensor
    subjects: Tensor
    filled_step: Tensor
    position: Tensor

    def __init__(
        self,
        *,
        num_locations: int,
        dim: int = 128,
        length: int | None = None,
        num_cases: int = 0,
        batch_size: int = 0,
    ) -> None:
        super().__init__()
        if num_locations < 1:
            raise ValueError(f"a queue needs at least one location, got num_locations={num_locations}")
        if length is not None and length < 1:
            raise ValueError(f"a queue holds at least one key, got length={length}")
        self.length = default_length(num_cases, batch_size) if length is None else length
        keys = F.normalize(torch.randn(num_locations, self.length, dim), dim=2)
        self.register_buffer("keys", keys)
        self.register_buffer("subjects", torch.full(keys.shape[:2], -1))  # -1: a random vector, nobody's key
        self.register_buffer("filled_step", torch.full(keys.shape[:2], -1))
        self.register_buffer("position", torch.zeros(num_locations, dtype=torch.int64))

    @property
    def num_locations(self) -> int:
        """Number of rings."""
        return len(self.keys)

    def ring(self, location: Int64[Tensor, " row"]) -> Int64[Tensor, " row"]:
        """Return the ring of each location, on the CPU.

        Raises:
            ValueError: There is no such location.
        """
        location = location.cpu()
        if self.num_locations == 1:
            return torch.zeros_like(location)
        if location.max() >= self.num_locations or location.min() < 0:
            raise ValueError(
                f"location {int(location.max())} has no queue: there are {self.num_locations}; "
                "set method.queue.num_locations"
            )
        return location

    def fetch(
        self, rings: Int64[Tensor, " ring"], device: torch.device
    ) -> tuple[Float[Tensor, "ring length dim"], Int64[Tensor, "ring length"]]:
        """Return the keys and subjects of some rings, copied to the device."""
        rings = rings.cpu()
        return self.keys[rings].to(device), self.subjects[rings].to(device)

    @torch.no_grad()
    def enqueue(
        self,
        rings: Int64[Tensor, " row"],
        keys: Float[Tensor, "row dim"],
        subjects: Int64[Tensor, " row"],
        *,
        step: int,
    ) -> None:
        """Write keys over the oldest keys of their rings, in order."""
        rings, keys, subjects = rings.cpu(), keys.detach().float().cpu(), subjects.cpu()
        for ring in rings.unique().tolist():
            rows = (rings == ring).nonzero()[:, 0]
            places = (self.position[ring] + torch.arange(len(rows))) % self.length
            kept = slice(max(0, len(rows) - self.length), None)  # where keys outnumber places, the last ones stay
            self.keys[ring, places[kept]] = keys[rows[kept]]
            self.subjects[ring, places[kept]] = subjects[rows[kept]]
            self.filled_step[ring, places[kept]] = step
            self.position[ring] = (self.position[ring] + len(rows)) % self.length

    def age(self, rings: Int64[Tensor, " ring"], *, step: int) -> Tensor:
        """Return the mean age in steps of the keys in some rings; 0 where they hold none yet."""
        filled = self.filled_step[rings.cpu()]
        known = filled >= 0
        return ((step - filled) * known).sum() / known.sum().clamp(min=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LocationQueue":
        """Return the module unmoved: the queues stay in main memory, and single rings are quick to copy."""
        return self
