"""MACL: a full-size image through the encoder and a small one through encoder and decoder contrast by position."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medssl.data.views import View
from medssl.losses.dense_contrast import dense_contrast, equivariance_loss
from medssl.losses.position_contrast import contrast_of_positives
from medssl.methods.base import Method, Progress, StepOutput
from medssl.methods.macl_positions import PositionRule
from medssl.models.macl_heads import MACLHeads
from medssl.models.partial_unet import PartialUNet
from medssl.ops.ema import frozen_copy, update_ema
from medssl.ops.gather import gather_with_gradient
from medssl.ops.shrinking import SHRINKINGS, shrunk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUPLINGS = ("shared", "independent", "ema")
SMALL_BATCH = 16
"""Samples of a process below which those of the others are gathered, unless said otherwise."""
WATCHED_STEPS = 20
FEWEST_POSITIVES = 0.5


class MACL(Method):
    """Contrast of two branches by position in the body: of images, of places in them, and equality across scales.

    The auxiliary branch is the encoder on a crop; the dominant branch is the encoder and the first blocks of the
    decoder on the crop made smaller, so much that its decoded map is as large as the auxiliary bottleneck. The view
    group `moved` holds two views a sample that were moved independently, one for each branch: their embeddings are
    contrasted. The group `still` holds one view for both, or two of one geometry: the branches are contrasted at each
    place, and their bottlenecks drawn together. Positives are crops of nearby positions, of whatever volume, and the
    other branch.

    Args:
        backbone: encoder and decoder.
        heads: builds the heads, given `bottleneck_channels`, `decoded_channels` and `spatial_dims`.
        positions: which crops are positives, and which are compared.
        crop_voxel: size of the crops, checked here against the strides of the networks; None checks the first batch.
        weight_global: of the contrast of images.
        weight_dense: of the contrast of places.
        weight_equivariance: of the mean absolute difference of the bottlenecks.
        temperature: of both contrasts.
        base_temperature: they are scaled by `temperature / base_temperature`.
        coupling: the branches' encoders are one (`shared`), two (`independent`), or the auxiliary one is the moving
            average of the other (`ema`).
        momentum: of that average.
        gather: contrast the samples of all processes; None does where a process has fewer than 16.
        downsample: how images and maps are made smaller, `linear` or `area`, see `shrunk`.
        dense_chunk: places that are contrasted at once; None is all.

    Source: arXiv:2309.11876; repository stevezs315/MACL, pretrain_MACL.py.
    """

    def __init__(
        self,
        *,
        backbone: PartialUNet,
        heads: Callable[..., MACLHeads],
        positions: PositionRule,
        crop_voxel: Sequence[int] | None = None,
        weight_global: float = 1.0,
        weight_dense: float = 0.5,
        weight_equivariance: float = 1.0,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        coupling: str = "shared",
        momentum: float = 0.99,
        gather: bool | None = None,
        downsample: str = "linear",
        dense_chunk: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("coupling", coupling, COUPLINGS), ("downsample", downsample, SHRINKINGS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
        if min(temperature, base_temperature) <= 0:
            raise ValueError("temperature and base_temperature must be positive")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.backbone, self.positions = backbone, positions
        self.heads = heads(
            bottleneck_channels=backbone.bottleneck_channels,
            decoded_channels=backbone.decoded_channels,
            spatial_dims=backbone.spatial_dims,
        )
        self.auxiliary_encoder: nn.Module | None = None
        if coupling != "shared":  # it trains by batch statistics of its own, as the dominant one does
            self.auxiliary_encoder = frozen_copy(backbone.encoder).train().requires_grad_(coupling == "independent")
        self.weights = {"global": weight_global, "dense": weight_dense, "equivariance": weight_equivariance}
        self.temperatures = {"temperature": temperature, "base_temperature": base_temperature}
        self.coupling, self.momentum, self.gather = coupling, momentum, gather
        self.downsample, self.dense_chunk = downsample, dense_chunk
        self.watched: list[Tensor] | None = []
        if crop_voxel is not None:
            self._reduced_size(tuple(crop_voxel))

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The encoder of the dominant branch, and of the other unless they are apart."""
        return self.backbone.encoder

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Weighted sum of the three losses."""
        still, moved = self._groups(batch)
        gathers = len(still.image) < SMALL_BATCH if self.gather is None else self.gather
        positive, compared = self.positions(still, gather=gathers)
        auxiliary, dominant, decoded = self._branches(still)
        vectors = self.heads.images(*self._branches(moved))
        first, second = self.heads.places(auxiliary, decoded)
        with torch.autocast(first.device.type, enabled=False):
            options: dict[str, Any] = {"compared": compared.repeat(2, 2), "missing": "raise", **self.temperatures}
            image = torch.cat([_everywhere(part, gathers) for part in vectors])
            terms = {"global": contrast_of_positives(image, positive.repeat(2, 2), **options)}
            maps = _everywhere(first, gathers), _everywhere(second, gathers)
            terms["dense"] = dense_contrast(*maps, positive.repeat(2, 2), chunk=self.dense_chunk, **options)
            terms["equivariance"] = equivariance_loss(auxiliary, dominant, how=self.downsample)
        loss = sum((self.weights[name] * term for name, term in terms.items()), start=image.new_zeros(()))
        directions = nn.functional.normalize(image.detach(), dim=1)
        num_positives = positive.sum(1).float().mean() - 1  # a sample is a positive of itself
        if self.training:
            self._watch(num_positives, progress)
        logs = {name: term.detach() for name, term in terms.items()}
        logs |= {"num_positives": num_positives, "num_compared": compared.sum(1).float().mean() - 1}
        logs["feature_std"] = directions.std(0, correction=0).mean() * directions.shape[1] ** 0.5
        return StepOutput(loss, logs)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the auxiliary encoder, where it is a moving average."""
        if self.coupling == "ema" and self.auxiliary_encoder is not None:
            update_ema(self.auxiliary_encoder, self.encoder, momentum=self.momentum, copy_buffers=False)

    def param_groups(self) -> list[dict[str, Any]]:
        """All parameters alike: the released recipe decays biases and norms too."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def parts(self) -> dict[str, nn.Module]:
        """Networks of the dominant branch, heads, and the auxiliary encoder where there is one of its own."""
        parts = {"encoder": self.backbone.encoder, "decoder": self.backbone.decoder, "heads": self.heads}
        return parts if self.auxiliary_encoder is None else {**parts, "auxiliary_encoder": self.auxiliary_encoder}

    @torch.no_grad()
    def figures(self, batch: Mapping[str, View], progress: Progress) -> dict[str, "Figure"]:
        """What the branches see of the first sample, and the crop of another sample that is its positive, if any."""
        from medssl.methods.panels import orthogonal_slices

        still, moved = self._groups(batch)
        positive, _ = self.positions(still)
        partners = [other for other in positive[0].nonzero().flatten().tolist() if other]
        panels = {"auxiliary": still.image[0, 0, 0], "auxiliary, moved": moved.image[0, 0, 0]}
        for name, view in (("dominant", still), ("dominant, moved", moved)):
            small = self._small(self._flat(view.image[:1, -1]))[0, 0]
            panels[name] = small if small.ndim == 3 else small[..., None]
        if partners:
            panels["a positive"] = still.image[partners[0], 0, 0]
        return {"branches": orthogonal_slices(panels, title=f"what the branches see, step {progress.step}")}

    def _branches(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Auxiliary bottleneck of the first view, dominant bottleneck and decoded map of the last one."""
        image = self._flat(view.image[:, 0])
        if self.auxiliary_encoder is None:
            auxiliary = self.backbone.encoder(image)[-1]
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.coupling == "independent"):
                auxiliary = self.auxiliary_encoder(image)[-1]
        return auxiliary, *self.backbone(self._small(self._flat(view.image[:, -1])))

    def _small(self, image: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *small"]:
        size = self.backbone.law.reduced(image.shape[2:], setting="views.groups.still.size")
        return shrunk(image, size, how=self.downsample)

    def _flat(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c *spatial"]:
        """Slices without their third axis, for networks of two."""
        return image[..., 0] if self.backbone.spatial_dims == 2 else image

    def _reduced_size(self, crop_voxel: tuple[int, ...]) -> tuple[int, ...]:
        if self.backbone.spatial_dims == 2:
            if len(crop_voxel) != 3 or crop_voxel[2] != 1:
                raise ValueError(f"views.groups.still.size={list(crop_voxel)}: a 2D network takes slices, [x, y, 1]")
            crop_voxel = crop_voxel[:2]
        return self.backbone.law.reduced(crop_voxel, setting="views.groups.still.size")

    def _groups(self, batch: Mapping[str, View]) -> tuple[View, View]:
        found = {name: tuple(view.image.shape[1:]) for name, view in batch.items()}
        counts = {name: shape[0] for name, shape in found.items()}
        sizes = {found[name][1:] for name in ("still", "moved") if name in found}
        if counts.get("still") not in (1, 2) or counts.get("moved") != 2 or len(sizes) != 1:
            raise ValueError(
                "MACL needs a view group `still` with one view, or two of one geometry, and a group `moved` with two, "
                f"all of one size; the batch has {found}"
            )
        return batch["still"], batch["moved"]

    def _watch(self, num_positives: Float[Tensor, ""], progress: Progress) -> None:
        """Say once where, over some steps, crops have hardly a positive but their own other view."""
        if self.watched is None:
            return
        self.watched.append(num_positives)
        if len(self.watched) == WATCHED_STEPS:
            mean = torch.stack(self.watched).mean().item()
            self.watched = []
            if mean < FEWEST_POSITIVES:
                self.watched = None
                if progress.rank == 0:
                    print(
                        f"warning: crops have {mean:.2g} positives of other samples, mean of {WATCHED_STEPS} steps: "
                        "hardly anything is contrasted by position; raise method.positions.threshold (auto finds one), "
                        "compare fewer method.positions.axes, or take sampler Anchored",
                        file=sys.stderr,
                        flush=True,
                    )


def _everywhere(rows: Tensor, gathers: bool) -> Tensor:
    """The rows of all ranks where asked, in single precision."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return gather_with_gradient(rows) if gathers else rows
