"""VoCo: a crop is as similar to the cells of a field as it overlaps with them, and the cells are unlike each other."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medssl.checks import choice, number, share
from medssl.data.views import View
from medssl.losses.consistency import direction_spread, effective_rank
from medssl.losses.volume_contrast import FORMS, base_similarity, box_overlap, overlap_losses, predicted_overlap
from medssl.methods.base import Method, Progress, StepOutput
from medssl.models.pooled import PooledProjector
from medssl.models.shape_trial import check_crop
from medssl.models.volume_networks import VOLUME_NETWORKS, check_encoder
from medssl.ops.ema import frozen_copy, update_ema
from medssl.ops.gather import gather_ranks, gather_with_gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEACHERS = ("none", "ema")


class VoCo(Method):
    """Volume contrast.

    The view group `base` holds the cells of a field, the group `target` crops inside it. The similarity of a target and
    a base follows the share of the target that lies in the base, before any augmentation. Bases are drawn apart.

    Args:
        encoder: Encoder with maps, fine to coarse, described by its `channels` and `strides`.
        projector: Network from these maps to the vectors that are compared.
        form: Terms of the loss: the `released` ones, those of the `first` code, or of `nnssl`, see `overlap_losses`.
            The bases' similarity is squared but for `nnssl`.
        teacher: Where the bases come from that targets are compared with: `none` takes those of the network itself,
            without gradient. `ema` takes the moving average of the network, and in turn compares its targets with the
            network's bases.
        ema_momentum: Momentum of that average.
        weight_positive: Weight of the pairs that overlap.
        weight_negative: Weight of the pairs that do not.
        weight_regulariser: Weight of the similarity of the bases.
        crop_voxel: Size of the crops, tried here on the encoder; None leaves the check to the first batch.

    Source: arXiv:2402.17300; repository Luffy03/VoCo.
    """

    networks = VOLUME_NETWORKS
    decays_all = True  # the released recipe also decays biases and norms

    def __init__(
        self,
        *,
        encoder: nn.Module,
        projector: PooledProjector,
        form: str = "released",
        teacher: str = "none",
        ema_momentum: float = 0.9,
        weight_positive: float = 1.0,
        weight_negative: float = 1.0,
        weight_regulariser: float = 1.0,
        crop_voxel: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.form, self.ema_momentum = choice("method.form", form, FORMS), share("method.ema_momentum", ema_momentum)
        choice("method.teacher", teacher, TEACHERS)
        self.weights = {"positive": weight_positive, "negative": weight_negative, "regulariser": weight_regulariser}
        for name, weight in self.weights.items():
            number(f"method.weight_{name}", weight)
        check_encoder(encoder, method="VoCo")
        if crop_voxel is not None:
            check_crop(encoder, encoder, crop_voxel, setting="views.groups.base.size")
        self.encoder, self.projector = encoder, projector
        self.teacher_encoder: nn.Module | None = None
        self.teacher_projector: nn.Module | None = None
        if teacher == "ema":  # equal to the network at step 0; batch norms use statistics of its own passes
            self.teacher_encoder = frozen_copy(encoder).train()
            self.teacher_projector = frozen_copy(projector).train()

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the weighted sum of the terms.

        In the logs `positive_at_collapse` is the value of `positive` where all embeddings are equal (`negative` and
        `regulariser` are 1 there), and `positive_at_chance` that where no two have a positive cosine (0 and 0).
        `accuracy` is the share of the targets that are most similar to the base with which they overlap most.
        """
        base, target = _groups(batch)
        images = torch.cat([base.image, target.image], dim=1)
        num_bases = base.image.shape[1]
        rows = self.projector(self.encoder(images.flatten(0, 1)))
        taught = self._taught(images)
        with torch.autocast(rows.device.type, enabled=False):
            bases, targets = _parts(rows, images, num_bases)
            if taught is None:
                own_predicted = predicted_overlap(targets, bases.detach())
            else:
                old_bases, old_targets = _parts(taught, images, num_bases)
                both = predicted_overlap(targets, old_bases), predicted_overlap(old_targets, bases)
                own_predicted = (both[0] + both[1]) / 2
            own_overlap = box_overlap(_faces(target), _faces(base)).to(own_predicted)
            predicted, overlap = own_predicted, own_overlap
            if self.form == "nnssl":  # sums over the batch of all processes
                predicted, overlap = gather_with_gradient(predicted), gather_ranks(overlap)
            positive, negative = overlap_losses(predicted, overlap, form=self.form)  # eq. 3
            regulariser = base_similarity(bases, squared=self.form != "nnssl")  # eq. 5
            terms = {"positive": positive, "negative": negative, "regulariser": regulariser}
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
            logs = {name: term.detach() for name, term in terms.items()}
            logs |= self._health(predicted.detach(), overlap, torch.cat([bases, targets], dim=1).detach())
        extras = {}
        if progress.with_extras:
            extras = {"predicted": own_predicted.detach(), "overlap": own_overlap}
        return StepOutput(loss, logs, extras)

    def check_groups(self, counts: Mapping[str, int]) -> None:
        """Check that there are targets, and two bases to draw apart.

        Raises:
            ValueError: There are not.
        """
        if counts.get("base", 0) < 2 or "target" not in counts:
            raise ValueError(f"VoCo needs a view group `base` of at least two cells and a group `target`; got {counts}")

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher, where there is one."""
        pairs = (self.teacher_encoder, self.encoder), (self.teacher_projector, self.projector)
        for old, new in pairs:
            if old is not None:
                update_ema(old, new, momentum=self.ema_momentum, copy_buffers=False)

    def copies_of_encoder(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the teacher's encoder, where there is one, with the student's."""
        return [] if self.teacher_encoder is None else [(self.teacher_encoder, self.encoder)]

    def parts(self) -> dict[str, nn.Module]:
        """Return the encoder, and that of the teacher where there is one."""
        teacher = {} if self.teacher_encoder is None else {"teacher_encoder": self.teacher_encoder}
        return {"encoder": self.encoder, **teacher}

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw the overlaps of the first volume, true and predicted, and a target beside bases that it resembles."""
        from medssl.ops.panels import heat_maps, orthogonal_slices

        base, target = _groups(batch)
        overlap, predicted = extras["overlap"][0], extras["predicted"][0]
        panels = {"target": target.image[0, 0, 0]}
        for title, table in (("largest overlap", overlap), ("most similar", predicted)):
            k = int(table[0].argmax())
            panels[f"{title}: base {k},\n{overlap[0, k]:.2f} true, {predicted[0, k]:.2f} predicted"] = base.image[
                0, k, 0
            ]
        return {
            "crops": orthogonal_slices(panels, title=f"a crop and two cells of its field, step {progress.step}"),
            "overlaps": heat_maps(
                {"overlap of targets (rows) and bases": overlap, "predicted": predicted},
                title=f"overlaps in one volume, step {progress.step}",
                limits=(0.0, 1.0),
            ),
        }

    @torch.no_grad()
    def _taught(self, images: Float[Tensor, "b v c x y z"]) -> Tensor | None:
        if self.teacher_encoder is None or self.teacher_projector is None:
            return None
        return self.teacher_projector(self.teacher_encoder(images.flatten(0, 1)))

    def _health(self, predicted: Tensor, overlap: Tensor, rows: Float[Tensor, "b v dim"]) -> dict[str, Tensor]:
        """Return the values at collapse and at chance, the accuracy, and the spread of the embeddings."""
        equal, apart = torch.ones_like(predicted), torch.zeros_like(predicted)
        return {
            "positive_at_collapse": overlap_losses(equal, overlap, form=self.form)[0],
            "positive_at_chance": overlap_losses(apart, overlap, form=self.form)[0],
            "accuracy": (predicted.argmax(2) == overlap.argmax(2)).to(predicted).mean(),
            "feature_std": direction_spread(rows.flatten(0, 1)),
            "effective_rank": effective_rank(rows.flatten(0, 1)),
        }


def _parts(
    rows: Float[Tensor, "row dim"], images: Float[Tensor, "b v c x y z"], num_bases: int
) -> tuple[Float[Tensor, "b base dim"], Float[Tensor, "b target dim"]]:
    """Return the embeddings of bases and targets, at least in single precision."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    found = rows.unflatten(0, images.shape[:2])
    return found[:, :num_bases], found[:, num_bases:]


def _faces(view: View) -> Tensor:
    """Return the faces of the crops in the body.

    Raises:
        ValueError: The view does not know them.
    """
    if view.crop_body is None:
        raise ValueError("VoCo needs the faces of the crops; give View.of crop_body, or a place in a volume")
    return view.crop_body


def _groups(batch: Mapping[str, View]) -> tuple[View, View]:
    """Return the bases and the targets.

    Raises:
        ValueError: A group is missing, there is one base alone, or sizes differ.
    """
    found = {name: tuple(view.image.shape) for name, view in batch.items()}
    base, target = found.get("base", ()), found.get("target", ())
    if not base or not target or (base[0], *base[2:]) != (target[0], *target[2:]) or base[1] < 2:
        raise ValueError(
            "VoCo needs a view group `base` of at least two cells of a field and a group `target` of crops of the same "
            f"size, as placements Cells and Inside give them; the batch has {found}"
        )
    return batch["base"], batch["target"]
