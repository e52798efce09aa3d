"""SimCLR in 3D: two overlapping crops of a volume are alike, all other crops of the batch are not."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.checks import number, switch
from medssl.data.views import View
from medssl.losses.consistency import direction_spread, effective_rank
from medssl.losses.position_contrast import contrast_of_positives, equal_labels, nearest_is_positive
from medssl.methods.base import Method, Progress, StepOutput
from medssl.models.pooled import PooledProjector
from medssl.models.shape_trial import check_crop
from medssl.models.volume_networks import VOLUME_NETWORKS, check_encoder
from medssl.ops.gather import gather_with_gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SimCLR(Method):
    """Contrast of pairs of overlapping crops.

    View k of the group `first` and view k of the group `second` are a pair, each other's only positive. Negatives are
    all other crops of the batch, those of other pairs of the volume too.

    Args:
        encoder: Encoder with maps, fine to coarse, described by its `channels` and `strides`.
        projector: Network from these maps to the vectors that are contrasted.
        temperature: Temperature of the cosines.
        gather: Whether the crops of all processes are contrasted, with gradient, or each process' own alone.
        crop_voxel: Size of the crops, tried here on the encoder; None leaves the check to the first batch.

    Source: arXiv:2002.05709.
    """

    networks = VOLUME_NETWORKS
    decays_all = True  # the reference recipe also decays biases and norms

    def __init__(
        self,
        *,
        encoder: nn.Module,
        projector: PooledProjector,
        temperature: float = 0.5,
        gather: bool = True,
        crop_voxel: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.temperature = number("method.temperature", temperature, above=0)
        self.gather = switch("method.gather", gather)
        check_encoder(encoder, method="SimCLR")
        if crop_voxel is not None:
            check_crop(encoder, encoder, crop_voxel, setting="views.groups.first.size")
        self.encoder, self.projector = encoder, projector

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the contrast of all crops.

        In the logs `contrast_at_collapse` is its value where all embeddings are equal, and `accuracy` the share of the
        crops whose partner is the nearest.
        """
        first, second = _groups(batch)
        views = torch.cat([first.image.flatten(0, 1), second.image.flatten(0, 1)])
        vectors = self.projector(self.encoder(views))
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
            halves = vectors.chunk(2)
            rows = torch.cat([gather_with_gradient(half) for half in halves] if self.gather else halves)
            pairs = torch.arange(len(rows) // 2, device=rows.device).repeat(2)
            positive, scale = equal_labels(pairs), self.temperature
            loss = contrast_of_positives(rows, positive, temperature=scale, base_temperature=scale)  # eq. 1
            directions = rows.detach()
            logs = {
                "contrast": loss.detach(),
                "contrast_at_collapse": loss.new_tensor(math.log(len(rows) - 1)),
                "accuracy": nearest_is_positive(directions, positive),
                "feature_std": direction_spread(directions),
                "effective_rank": effective_rank(directions),
            }
        extras = {}
        if progress.with_extras:
            own = F.normalize(vectors.detach(), dim=1)
            extras = {"similarity": own @ own.mT}
        return StepOutput(loss, logs, extras)

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw the pairs of the first volume with their cosines, and the cosines of all crops of this process."""
        from medssl.ops.panels import heat_maps, orthogonal_slices

        first, second = _groups(batch)
        similarity, half = extras["similarity"], len(extras["similarity"]) // 2
        panels = {}
        for k in range(first.image.shape[1]):
            panels[f"pair {k + 1}"] = first.image[0, k, 0]
            panels[f"pair {k + 1}, cosine {similarity[k, half + k].item():.2f}"] = second.image[0, k, 0]
        return {
            "pairs": orthogonal_slices(panels, title=f"pairs of crops of one volume, step {progress.step}"),
            "similarity": heat_maps(
                {"cosine of first (row) and second crop": similarity[:half, half:]},
                title=f"pairs lie on the diagonal, step {progress.step}",
                limits=(-1.0, 1.0),
            ),
        }


def _groups(batch: Mapping[str, View]) -> tuple[View, View]:
    """Return the first and the second crops.

    Raises:
        ValueError: A group is missing, or the groups differ in number or size of crops.
    """
    found: dict[str, Sequence[int]] = {name: tuple(view.image.shape) for name, view in batch.items()}
    if "first" not in found or found.get("first") != found.get("second"):
        raise ValueError(
            "SimCLR needs two view groups `first` and `second` of equally many crops of one size, of which view k of "
            f"one and view k of the other are a pair; the batch has {found}"
        )
    return batch["first"], batch["second"]
