"""The place rule of MACL: positives among places of feature maps by their own positions, and their supervoxels."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from medssl.data.views import View, apply_each
from medssl.methods.base import Progress
from medssl.methods.positions import PositionRule, Positions
from medssl.ops.gather import gather_ranks


@dataclass(frozen=True, kw_only=True)
class PlaceRule:
    """Rule that positives of a place are nearby places of any crop, instead of the same place of nearby crops.

    Other places of a crop are then negatives.

    Args:
        threshold: Threshold of the positions of places, in the unit of the frame of crops.
        num_places: Number of places of each map, drawn in each step, the same in all maps; all where there are fewer.

    Source: ours; MACL compares places of equal number.
    """

    threshold: float = 0.02
    num_places: int = 256

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.threshold <= 0 or self.num_places < 1:
            raise ValueError(
                f"places: threshold {self.threshold} must be positive and num_places {self.num_places} at least 1"
            )

    def choose(self, num_places: int, progress: Progress, device: torch.device) -> Int64[Tensor, " chosen"]:
        """Return the numbers of the places that take part in a step, the same on all processes."""
        generator = replace(progress, rank=0).generator("places")
        return torch.randperm(num_places, generator=generator)[: self.num_places].sort().values.to(device)

    def masks(
        self,
        rule: PositionRule,
        view: View,
        grid: tuple[int, ...],
        chosen: Int64[Tensor, " chosen"],
        *,
        gather: bool = False,
    ) -> tuple[Bool[Tensor, "row row"], Bool[Tensor, "row row"]]:
        """Return positives and compared pairs of the chosen places, those of the first sample first.

        Args:
            rule: Rule by which positions of crops are compared; its thresholds are not used.
            view: View group whose first views the maps show.
            grid: Size of the maps.
            chosen: Numbers of the places, the last axis fastest.
            gather: Whether places of the other ranks are included; every rank must then call it.
        """
        center = place_centers(view, grid)[:, chosen]  # (b chosen 3)
        lower, upper = _faces(view)

        def repeated(of_sample: Tensor) -> Tensor:
            return of_sample.repeat_interleave(len(chosen), 0)

        whole = Positions.of_view(view)
        places = Positions(
            center_voxel=center.flatten(0, 1),
            volume_shape=repeated(whole.volume_shape),
            volume_to_mm=repeated(whole.volume_to_mm),
            body=((center - lower) / (upper - lower)).flatten(0, 1),
            heights=None if whole.heights is None else repeated(whole.heights),
        )
        position, group = rule.positions(places), repeated(view.group[:, 0])
        if gather:
            position, group = gather_ranks(position), gather_ranks(group)
        return replace(rule, threshold=self.threshold, negative_threshold=None).masks(position, group)


def place_centers(view: View, grid: tuple[int, ...]) -> Float64[Tensor, "b place 3"]:
    """Return the middles of the cells of a map over the first views, in voxels of their volumes."""
    sides = view.image.shape[3:]
    cells = (*grid, *(1 for _ in range(3 - len(grid))))  # a map of slices is one cell thick
    axes = [
        (torch.arange(n, dtype=torch.float64, device=view.image.device) + 0.5) * (side / n) - 0.5
        for n, side in zip(cells, sides, strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return apply_each(view.matrix[:, 0], points)


def rows_of(maps: Float[Tensor, "b c *spatial"], chosen: Int64[Tensor, " chosen"]) -> Float[Tensor, "row c"]:
    """Return the vectors at the chosen places, those of the first sample first."""
    return maps.flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1)


def segments_of(view: View, spatial_dims: int) -> Int64[Tensor, " b *spatial"]:
    """Return the number of the supervoxel of each voxel of the first views.

    Raises:
        ValueError: The views carry no supervoxels.
    """
    if view.regions is None:
        raise ValueError(
            "weight_supervoxel needs supervoxels: python -m medssl.derive what=supervoxels, then "
            "+views.groups.still.regions=supervoxels"
        )
    regions = view.regions[:, 0, 0]
    return regions[..., 0] if spatial_dims == 2 else regions


def _faces(view: View) -> tuple[Float64[Tensor, "b 1 3"], Float64[Tensor, "b 1 3"]]:
    if view.body_faces is None:
        raise ValueError("positions of places need the body box of each case; make the view with body_faces")
    return view.body_faces[:, 0, :1], view.body_faces[:, 0, 1:]
