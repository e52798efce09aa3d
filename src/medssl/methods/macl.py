"""MACL: contrast by position of a full-size image after the encoder and a small one after encoder and decoder."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medssl.building import named_class, takes
from medssl.checks import choice, share
from medssl.data.views import View
from medssl.losses.consistency import direction_spread
from medssl.losses.dense_contrast import dense_contrast, equivariance_loss, segment_contrast
from medssl.losses.position_contrast import contrast_of_positives
from medssl.methods.base import Method, Progress, StepOutput, Transfer
from medssl.methods.macl_places import PlaceRule, rows_of, segments_of
from medssl.methods.positions import PositionRule, is_gathered
from medssl.methods.watch import WATCHED_STEPS, Watch
from medssl.models.macl_heads import MACLHeads
from medssl.models.partial_unet import PartialUNet
from medssl.models.volume_networks import SLICE_NETWORKS, VOLUME_NETWORKS, check_encoder, fitting
from medssl.ops.downsample import SHRINKINGS, shrunk
from medssl.ops.ema import frozen_copy, update_ema
from medssl.ops.gather import gather_with_gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUPLINGS = ("shared", "independent", "ema")
SIZE = "views.groups.still.size"
FEWEST_POSITIVES = 0.5
MOST_POSITIVES = 0.9
"""Largest share of positives among the samples that a crop is compared with."""


class MACL(Method):
    """Contrast of two branches by position in the body, for images and for their places, and equality across scales.

    The auxiliary branch is the encoder on a crop. The dominant branch is the encoder and the first blocks of the
    decoder on the same crop made smaller, so that its decoded map is as large as the auxiliary bottleneck. The view
    group `moved` holds two views of each sample that were moved independently, one for each branch: their embeddings
    are contrasted. The group `still` holds one view for both branches: they are contrasted at each place, and their
    bottlenecks drawn together. For this view the dominant branch sees an optional group `still_dominant` of the same
    geometry instead, for instance with another intensity contrast. Positives are crops of nearby positions in any
    volume, and the other branch.

    Args:
        backbone: Encoder and decoder.
        heads: Embeddings of images and places from the maps of the backbone.
        positions: Rule of which crops are positives, and which are compared.
        crop_voxel: Size of the crops, tried here on the networks; None leaves the check to the first batch.
        weight_global: Weight of the contrast of images.
        weight_dense: Weight of the contrast of places.
        weight_equivariance: Weight of the mean absolute difference of the bottlenecks.
        weight_supervoxel: Weight of a contrast within each sample whose positives are places of one supervoxel; above 0
            it needs `regions` for the view `still`.
        supervoxel_every: Only each place of this step, in order, takes part in that contrast, see `segment_contrast`.
        temperature: Temperature of both contrasts.
        base_temperature: The contrasts are scaled by `temperature / base_temperature`.
        coupling: The branches' encoders are one (`shared`), two (`independent`), or the auxiliary one is the moving
            average of the other (`ema`).
        momentum: Momentum of that average.
        gather: Whether samples of all processes are contrasted; None does so where a process has fewer than 16.
        downsample: Way in which images and maps are made smaller, `linear` or `area`, see `shrunk`.
        dense_chunk: Places that are contrasted at once; None is all.
        places: Rule that compares places by positions of their own; None compares places of equal number.

    Source: arXiv:2309.11876; repository stevezs315/MACL, pretrain_MACL.py.
    """

    networks = VOLUME_NETWORKS
    decays_all = True  # the released recipe also decays biases and norms

    def __init__(
        self,
        *,
        backbone: PartialUNet,
        heads: MACLHeads,
        positions: PositionRule,
        crop_voxel: Sequence[int] | None = None,
        weight_global: float = 1.0,
        weight_dense: float = 0.5,
        weight_equivariance: float = 1.0,
        weight_supervoxel: float = 0.0,
        supervoxel_every: int = 17,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        coupling: str = "shared",
        momentum: float = 0.99,
        gather: bool | None = None,
        downsample: str = "linear",
        dense_chunk: int | None = None,
        places: PlaceRule | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("coupling", coupling, COUPLINGS), ("downsample", downsample, SHRINKINGS)):
            choice(name, value, allowed)
        if min(temperature, base_temperature) <= 0:
            raise ValueError("temperature and base_temperature must be positive")
        share("momentum", momentum)
        if not isinstance(gather, bool | None):  # any word would count as true
            raise ValueError(f"gather must be true, false or null, got {gather!r}")
        if dense_chunk is not None and dense_chunk < 1:
            raise ValueError(f"dense_chunk must be at least 1 or null, got {dense_chunk}")
        check_encoder(backbone.encoder, method="MACL", axes=(2, 3))
        self.backbone, self.heads, self.positions = backbone, heads, positions
        self.auxiliary_encoder: nn.Module | None = None
        if coupling != "shared":  # it uses batch statistics of its own passes, as the dominant one does
            self.auxiliary_encoder = frozen_copy(backbone.encoder).train().requires_grad_(coupling == "independent")
        self.weights = {"global": weight_global, "dense": weight_dense, "equivariance": weight_equivariance}
        self.weights |= {"supervoxel": weight_supervoxel} if weight_supervoxel else {}
        self.temperatures = {"temperature": temperature, "base_temperature": base_temperature}
        self.coupling, self.momentum, self.gather = coupling, momentum, gather
        self.downsample, self.dense_chunk = downsample, dense_chunk
        self.places, self.supervoxel_every = places, supervoxel_every
        self.watch = Watch(_few_or_many_positives)
        if crop_voxel is not None:
            self.backbone.check_crop(self._plane(tuple(crop_voxel)), setting=SIZE)

    @classmethod
    def check_recipe(cls, encoder: Mapping[str, Any]) -> None:
        """Check that the encoder's class takes slices, where its recipe asks for them.

        Raises:
            ValueError: It takes volumes alone.
        """
        kind = named_class(encoder, None, base=nn.Module, where="model.encoder")
        if encoder.get("spatial_dims") == 2 and not takes(kind, "spatial_dims"):
            raise ValueError(
                f"{kind.__name__} takes no slices, which model.encoder.spatial_dims=2 asks for; "
                f"{fitting(SLICE_NETWORKS)}"
            )

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The encoder of the dominant branch and, where it is shared, of the auxiliary one."""
        return self.backbone.encoder

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the weighted sum of the losses."""
        still, dominant_still, moved = self._groups(batch)
        gathers = is_gathered(self.gather, len(still.image))
        positive, compared = self.positions(still, gather=gathers)
        small, small_moved = self._small(dominant_still.image[:, 0]), self._small(moved.image[:, 1])
        auxiliary, dominant, decoded = self._branches(still.image[:, 0], small)
        vectors = self.heads.images(*self._branches(moved.image[:, 0], small_moved))
        first, second = self.heads.places(auxiliary, decoded)
        with torch.autocast(first.device.type, enabled=False):
            options: dict[str, Any] = {"compared": compared.repeat(2, 2), **self.temperatures}
            image = torch.cat([_everywhere(part, gathers) for part in vectors])
            terms = {"global": contrast_of_positives(image, positive.repeat(2, 2), **options)}
            if self.places is None:  # eq. 10
                maps = _everywhere(first, gathers), _everywhere(second, gathers)
                terms["dense"] = dense_contrast(*maps, positive.repeat(2, 2), chunk=self.dense_chunk, **options)
            else:
                terms["dense"] = self._by_place(first, second, still, progress, gathers=gathers)
            terms["equivariance"] = equivariance_loss(auxiliary, dominant, how=self.downsample)  # eq. 8
            if "supervoxel" in self.weights:
                segments = segments_of(still, self.backbone.spatial_dims)
                terms["supervoxel"] = segment_contrast(
                    first, second, segments, every=self.supervoxel_every, **self.temperatures
                )
        loss = sum((self.weights[name] * term for name, term in terms.items()), start=image.new_zeros(()))
        num_positives = positive.sum(1).float().mean() - 1  # a sample is a positive of itself
        num_compared = compared.sum(1).float().mean() - 1
        if self.training:
            self.watch([num_positives, num_compared], progress)
        logs = {name: term.detach() for name, term in terms.items()}
        logs |= {"num_positives": num_positives, "num_compared": num_compared}
        logs["feature_std"] = direction_spread(image.detach())
        extras = (
            {"dominant": small, "dominant_moved": small_moved, "positive": positive} if progress.with_extras else {}
        )
        return StepOutput(loss, logs, extras)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the auxiliary encoder, where it is a moving average."""
        if self.coupling == "ema" and self.auxiliary_encoder is not None:
            update_ema(self.auxiliary_encoder, self.encoder, momentum=self.momentum, copy_buffers=False)

    def copies_of_encoder(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the auxiliary encoder, where there is one, with the dominant one."""
        return [] if self.auxiliary_encoder is None else [(self.auxiliary_encoder, self.encoder)]

    def parts(self) -> dict[str, nn.Module]:
        """Return the networks of the dominant branch, the heads, and the auxiliary encoder if it is separate."""
        parts = {"encoder": self.backbone.encoder, "decoder": self.backbone.decoder, "heads": self.heads}
        return parts if self.auxiliary_encoder is None else {**parts, "auxiliary_encoder": self.auxiliary_encoder}

    def transfers(self) -> Transfer:
        """Return that segmenters start from the backbone, and how many blocks of its decoder were trained."""
        places = {"encoder": "backbone.encoder", "decoder": "backbone.decoder"}
        return Transfer(places, {"decoder_blocks": self.backbone.num_blocks})

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw what the branches see of the first sample, and a crop of another sample that is its positive, if any."""
        from medssl.ops.panels import orthogonal_slices

        still, _, moved = self._groups(batch)
        near = extras["positive"].unflatten(1, (-1, len(still.image)))  # (sample of any rank, rank, sample)
        own = progress.rank if near.shape[1] > 1 else 0
        partners = near[own * len(still.image), own].nonzero().flatten().tolist()
        panels = {"auxiliary": still.image[0, 0, 0], "auxiliary, moved": moved.image[0, 0, 0]}
        for title, name in (("dominant", "dominant"), ("dominant, moved", "dominant_moved")):
            small = extras[name][0, 0]
            panels[title] = small if small.ndim == 3 else small[..., None]
        if partners[1:]:  # the first is the sample itself
            panels["a positive"] = still.image[partners[1], 0, 0]
        return {"branches": orthogonal_slices(panels, title=f"what the branches see, step {progress.step}")}

    def _branches(
        self, full: Float[Tensor, "b c x y z"], small: Float[Tensor, "b c *small"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bottleneck of the full-size crops, and bottleneck and decoded map of the small ones."""
        image = self._flat(full)
        if self.auxiliary_encoder is None:
            auxiliary = self.backbone.encoder(image)[-1]
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.coupling == "independent"):
                auxiliary = self.auxiliary_encoder(image)[-1]
        return auxiliary, *self.backbone(small)

    def _by_place(self, first: Tensor, second: Tensor, view: View, progress: Progress, *, gathers: bool) -> Tensor:
        """Return the contrast of places by positions of their own."""
        assert self.places is not None
        grid = tuple(first.shape[2:])
        chosen = self.places.choose(first[0, 0].numel(), progress, first.device)
        near, compared = self.places.masks(self.positions, view, grid, chosen, gather=gathers)
        rows = torch.cat([_everywhere(rows_of(maps, chosen), gathers) for maps in (first, second)])
        options: dict[str, Any] = {"compared": compared.repeat(2, 2), **self.temperatures}
        return contrast_of_positives(rows, near.repeat(2, 2), **options)

    def _small(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c *small"]:
        image = self._flat(image)
        size = self.backbone.law.reduced(image.shape[2:], setting=SIZE)
        return shrunk(image, size, how=self.downsample)

    def _flat(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c *spatial"]:
        """Return slices without their third axis, for networks of two axes."""
        return image[..., 0] if self.backbone.spatial_dims == 2 else image

    def _plane(self, crop_voxel: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sides that the network sees."""
        if self.backbone.spatial_dims == 3:
            return crop_voxel
        if len(crop_voxel) != 3 or crop_voxel[2] != 1:
            raise ValueError(
                f"{SIZE}={list(crop_voxel)}: a 2D network takes slices, [x, y, 1]; "
                f"give {SIZE}=[{','.join(map(str, crop_voxel[:2]))},1]"
            )
        return crop_voxel[:2]

    def _groups(self, batch: Mapping[str, View]) -> tuple[View, View, View]:
        found = {name: tuple(view.image.shape[1:]) for name, view in batch.items()}
        counts = {"still": 1, "moved": 2} | ({"still_dominant": 1} if "still_dominant" in batch else {})
        wrong = any(found.get(name, (0,))[0] != count for name, count in counts.items())
        if wrong or len({found[name][1:] for name in counts}) != 1:
            raise ValueError(
                "MACL needs a view group `still` with one view and a group `moved` with two, and if there is a group "
                f"`still_dominant` one view in it, all of one size; the batch has {found}"
            )
        still, other = batch["still"], batch.get("still_dominant", batch["still"])
        if other is not still:
            bent = still.displacement is not None or other.displacement is not None
            if bent or not torch.equal(still.matrix, other.matrix):
                raise ValueError(
                    "the view groups `still` and `still_dominant` show other places; make the latter placement Same of "
                    "still, and leave spatial augmentations to `moved`"
                )
        return still, other, batch["moved"]


def _few_or_many_positives(counts: Float[Tensor, "step 2"]) -> str | None:
    """Return the warning if crops have hardly any other sample, positive or negative, else None."""
    positives, compared = counts.mean(0).tolist()
    if compared < 1:
        why = "hardly anything is contrasted; raise batch_size"
    elif positives < FEWEST_POSITIVES:
        why = "hardly anything is contrasted by position; raise method.positions.threshold (auto finds one), "
        why += "compare fewer method.positions.axes, or take sampler Anchored"
    elif positives > MOST_POSITIVES * compared:
        why = "hardly anything is a negative; lower method.positions.threshold (auto finds one) or raise batch_size"
    else:
        return None
    found = f"{positives:.2g} positives among the {compared:.2g} other samples that they are compared with"
    return f"crops have {found}, mean of {WATCHED_STEPS} steps: {why}"


def _everywhere(rows: Tensor, gathers: bool) -> Tensor:
    """Return the rows in single precision, those of all ranks if `gathers` is set."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return gather_with_gradient(rows) if gathers else rows
