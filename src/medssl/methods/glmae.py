"""GL-MAE: masked autoencoding of global and local views, made consistent by a momentum teacher."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medssl.checks import choice
from medssl.data.views import View
from medssl.losses.consistency import (
    PAIRS,
    centred_softmax,
    cosine_distance_of_views,
    cross_entropy_of_views,
    mean_entropy,
    sinkhorn,
)
from medssl.losses.reconstruction import masked_mse, patch_statistics
from medssl.methods.base import Method, Progress, StepOutput
from medssl.models.heads import ProjectionHead
from medssl.models.vit import MaskedDecoder, VisionTransformer
from medssl.ops import schedules
from medssl.ops.clipping import clip_each
from medssl.ops.ema import frozen_copy, update_ema
from medssl.ops.gather import sum_over_ranks
from medssl.ops.masking import TokenMask, random_mask
from medssl.ops.patches import patchify, unpatchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONSISTENCIES, CENTERINGS, REDUCTIONS = ("cross_entropy", "cosine"), ("centre", "sinkhorn"), ("separate", "dino")


class GLMAE(Method):
    """Global-Local Masked AutoEncoder.

    The view group `global` holds p >= 1 crops of each volume, the optional group `local` q smaller ones. The student
    sees each with most patches removed and reconstructs them; the teacher sees the intact global crops. The CLS
    projections of all student views are drawn to the teacher's.

    `reduction="dino"` replaces the two consistency weights and the pairs by those of one pooled DINO loss. The last
    head layer is frozen for `freeze_last_layer_epochs`. `clip_per_parameter` clips the gradient of each tensor.

    Source: arXiv:2306.08913; for the consistency terms arXiv:2104.14294.
    """

    encoder: VisionTransformer
    takes_reoriented = False
    centre: Tensor
    logit_sum: Tensor
    logit_rows: Tensor

    def __init__(
        self,
        *,
        encoder: VisionTransformer,
        decoder: MaskedDecoder,
        head: ProjectionHead,
        mask_ratio_global: float = 0.6,
        mask_ratio_local: float = 0.6,
        norm_pix: bool = True,
        weight_reconstruction_global: float = 1.0,
        weight_reconstruction_local: float = 1.0,
        weight_consistency_global: float = 0.5,
        weight_consistency_local: float = 0.5,
        consistency: str = "cross_entropy",
        pairs: str = "all",
        reduction: str = "separate",
        centering: str = "centre",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_epochs: float = 0.0,
        centre_momentum: float = 0.9,
        ema_momentum: float = 0.996,
        ema_momentum_end: float = 1.0,
        freeze_last_layer_epochs: float = 1.0,
        clip_per_parameter: float | None = None,
    ) -> None:
        super().__init__()
        _check("consistency", consistency, CONSISTENCIES)
        _check("pairs", pairs, PAIRS)
        _check("reduction", reduction, REDUCTIONS)
        _check("centering", centering, CENTERINGS)
        if encoder.cls_token is None:
            raise ValueError("GL-MAE compares CLS tokens: its encoder needs class_token=true")
        if min(student_temperature, teacher_temperature, teacher_temperature_start) <= 0:
            raise ValueError("student_temperature, teacher_temperature and teacher_temperature_start must be positive")
        for name, value in (("centre_momentum", centre_momentum), ("ema_momentum", ema_momentum)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.teacher_encoder, self.teacher_head = frozen_copy(encoder), frozen_copy(head)
        num_prototypes = len(head.last_layer.weight_v)
        self.register_buffer("centre", torch.zeros(1, num_prototypes))
        self.register_buffer("logit_sum", torch.zeros(1, num_prototypes))  # of the micro-batches since the last step
        self.register_buffer("logit_rows", torch.zeros(()))
        self.mask_ratio = {"global": mask_ratio_global, "local": mask_ratio_local}
        self.norm_pix, self.student_temperature = norm_pix, student_temperature
        self.weight_reconstruction = {"global": weight_reconstruction_global, "local": weight_reconstruction_local}
        self.weight_consistency = {"global": weight_consistency_global, "local": weight_consistency_local}
        self.consistency, self.pairs, self.reduction, self.centering = consistency, pairs, reduction, centering
        self.temperature_ramp = teacher_temperature_start, teacher_temperature, teacher_temperature_epochs
        self.centre_momentum, self.ema_range = centre_momentum, (ema_momentum, ema_momentum_end)
        self.freeze_last_layer_epochs, self.clip_per_parameter = freeze_last_layer_epochs, clip_per_parameter

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the weighted sum of two reconstruction and two consistency losses."""
        if "global" not in batch:
            raise ValueError(f"GL-MAE needs a view group called `global`; the batch has {sorted(batch)}")
        images = {name: view_major(batch[name].image) for name in ("global", "local") if name in batch}
        num_views = {name: batch[name].image.shape[1] for name in images}
        anchors = self._teacher_logits(images["global"])  # the teacher sees intact global views alone
        terms, features = {}, {}
        extras: dict[str, Tensor] = {}
        for name, image in images.items():
            mask = self._mask(name, image, progress)
            prediction, features[name] = self.reconstruct(image, mask)  # arXiv:2111.06377: visible patches alone
            target = patchify(image, self.encoder.patch_voxel)
            terms[f"reconstruction_{name}"] = masked_mse(prediction, target, mask.masked, norm_pix=self.norm_pix)
            if progress.with_extras:
                extras |= {f"masked_{name}": mask.masked, f"prediction_{name}": prediction.detach()}

        student = self.head(torch.cat(list(features.values())))
        rows = dict(zip(images, student.split([len(image) for image in images.values()]), strict=True))
        start, end, epochs = self.temperature_ramp
        temperature = schedules.teacher_temperature(progress.epoch, epochs, start=start, end=end)
        probabilities = self._teacher_probabilities(anchors, temperature).unflatten(0, (num_views["global"], -1))
        teacher = anchors.unflatten(0, (num_views["global"], -1)) if self.consistency == "cosine" else probabilities
        for name, logits in rows.items():
            pairs = "all" if name == "local" else "cross" if self.reduction == "dino" else self.pairs
            by_view = logits.unflatten(0, (num_views[name], -1))
            terms[f"consistency_{name}"] = self._consistency(by_view, teacher, pairs)  # arXiv:2104.14294, eq. 3
        if self.training:
            self.logit_sum += anchors.sum(0, keepdim=True)
            self.logit_rows += len(anchors)

        weights = self._weights(num_views["global"], num_views.get("local", 0))
        loss = sum((weights[name] * term for name, term in terms.items()), start=anchors.new_zeros(()))
        logs = {name: term.detach() for name, term in terms.items()}
        logs["entropy_teacher"] = mean_entropy(probabilities)
        logs["entropy_teacher_mean"] = mean_entropy(probabilities.flatten(0, 1).mean(0))
        logs["ema_momentum"] = torch.full_like(logs["entropy_teacher"], progress.cosine(*self.ema_range))
        logs["teacher_temperature"] = torch.full_like(logs["entropy_teacher"], temperature)
        return StepOutput(loss, logs, extras)

    def reconstruct(
        self, image: Float[Tensor, "batch channel x y z"], mask: TokenMask
    ) -> tuple[Float[Tensor, "batch token voxel"], Float[Tensor, "batch dim"]]:
        """Return predicted patch vectors and the CLS feature of the student, which computes the kept patches only."""
        tokens = self.encoder.tokens(image, mask.keep)
        return self.decoder(tokens, mask.keep, grid=self.encoder.grid_of(image)), tokens[:, 0]

    @torch.no_grad()
    def after_backward(self, progress: Progress) -> None:
        """Clip each gradient tensor if `clip_per_parameter` is set, and drop that of the frozen last head layer."""
        clip_each(self.parameters(), self.clip_per_parameter)
        if progress.epoch < self.freeze_last_layer_epochs:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student, and the centre by the mean logits of all micro-batches and ranks."""
        momentum = progress.cosine(*self.ema_range)
        update_ema(self.teacher_encoder, self.encoder, momentum=momentum)
        update_ema(self.teacher_head, self.head, momentum=momentum)
        mean = sum_over_ranks(self.logit_sum) / sum_over_ranks(self.logit_rows).clamp(min=1)
        self.centre.lerp_(mean, 1 - self.centre_momentum)  # arXiv:2104.14294, eq. 4
        self.logit_sum.zero_()
        self.logit_rows.zero_()

    def train(self, mode: bool = True) -> "GLMAE":
        """Switch the student's mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        self.teacher_encoder.eval()
        self.teacher_head.eval()
        return self

    def copies_of_encoder(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the teacher's encoder with the student's."""
        return [(self.teacher_encoder, self.encoder)]

    def parts(self) -> dict[str, nn.Module]:
        """Return the student's networks and, as an alternative, the teacher's encoder."""
        parts = {"encoder": self.encoder, "decoder": self.decoder, "head": self.head}
        return {**parts, "teacher_encoder": self.teacher_encoder}

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw input, masked input and reconstruction of the first view of each group, in three orthogonal slices."""
        from medssl.ops.panels import orthogonal_slices

        figures = {}
        for name in (name for name in ("global", "local") if name in batch):
            image = batch[name].image[:1, 0]
            patches = patchify(image, self.encoder.patch_voxel)
            prediction = extras[f"prediction_{name}"][:1].to(patches)  # rows are those of `view_major`
            if self.norm_pix:
                mean, std = patch_statistics(patches)
                prediction = prediction * std + mean
            removed = extras[f"masked_{name}"][:1, :, None]
            panels = {
                "input": patches,
                "masked": patches.masked_fill(removed, float("nan")),
                "reconstruction": torch.where(removed, prediction, patches),
            }
            grid, patch = self.encoder.grid_of(image), self.encoder.patch_voxel
            volumes = {title: unpatchify(rows, grid, patch_voxel=patch)[0, 0] for title, rows in panels.items()}
            figures[name] = orthogonal_slices(volumes, title=f"{name} view, step {progress.step}")
        return figures

    def _mask(self, name: str, image: Tensor, progress: Progress) -> TokenMask:
        num_tokens = torch.Size(self.encoder.grid_of(image)).numel()
        generator = progress.generator(f"mask/{name}", image.device)
        noise = torch.rand(len(image), num_tokens, generator=generator, device=image.device)
        return random_mask(noise, ratio=self.mask_ratio[name])

    @torch.no_grad()
    def _teacher_logits(self, image: Tensor) -> Tensor:
        return self.teacher_head(self.teacher_encoder.tokens(image)[:, 0]).float()

    def _teacher_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        if self.centering == "sinkhorn":
            return sinkhorn(logits, temperature=temperature, total=sum_over_ranks)
        return centred_softmax(logits, self.centre, temperature=temperature)

    def _consistency(self, student: Tensor, teacher: Tensor, pairs: str) -> Tensor:
        if self.consistency == "cosine":
            return cosine_distance_of_views(student, teacher, pairs=pairs)  # arXiv:2006.07733, eq. 2
        return cross_entropy_of_views(student, teacher, temperature=self.student_temperature, pairs=pairs)

    def _weights(self, num_global: int, num_local: int) -> dict[str, float]:
        consistency = dict(self.weight_consistency)
        if self.reduction == "dino":
            cross, local = num_global * (num_global - 1), num_global * num_local
            consistency = {"global": cross / max(cross + local, 1), "local": local / max(cross + local, 1)}
        weights = {f"reconstruction_{name}": weight for name, weight in self.weight_reconstruction.items()}
        return weights | {f"consistency_{name}": weight for name, weight in consistency.items()}


def view_major(image: Float[Tensor, "batch view channel x y z"]) -> Float[Tensor, "row channel x y z"]:
    """Return view 0 of every volume, then view 1 of every volume, and so on; `unflatten(0, (views, -1))` undoes it."""
    return image.transpose(0, 1).flatten(0, 1)


def _check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    choice(option, value, allowed)
