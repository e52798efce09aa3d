"""Alice: matched crops of the same anatomy in two volumes, with a momentum teacher and aligned tokens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.checks import choice, share
from medssl.data.views import View
from medssl.losses.alignment import halved_mse, inter_volume_loss, intra_volume_loss
from medssl.losses.consistency import centred_softmax, direction_spread, mean_entropy
from medssl.methods.base import Method, Progress, StepOutput, Transfer
from medssl.models.alice_backbones import Backbone
from medssl.models.alice_head import AliceHead
from medssl.models.cafa import CAFA
from medssl.models.shape_trial import check_crop, check_multiple, check_strides
from medssl.models.volume_networks import VOLUME_NETWORKS, check_encoder
from medssl.ops import schedules
from medssl.ops.clipping import clip_each
from medssl.ops.ema import frozen_copy, update_ema
from medssl.ops.gather import sum_over_ranks
from medssl.ops.masking import block_mask, num_blocks, voxel_mask
from medssl.ops.patches import patch_grid, triple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEACHER_TOKENS = ("decoder", "encoder")
SIZE = "views.groups.pair.size"


class Alice(Method):
    """Anatomical invariance between volumes and semantic alignment within a crop.

    The view group `pair` holds two crops around corresponding points of two volumes: query and key. The student sees
    both with most of their content masked, the teacher sees them whole. The student's vector of one crop is drawn to
    the teacher's of the other. Its bottleneck tokens are expressed by its own decoder tokens and by the teacher's, and
    the two are drawn together. It also reconstructs the crops. The student sees an optional group `student` (the same
    places, for instance with noise) instead; teacher and reconstruction still use `pair`.

    Args:
        backbone: Student network; it applies the mask, gives tokens at two depths and reconstructs the crop.
        head: Head of the student, for the widths of the backbone.
        cafa: Cross-attention that aligns tokens, as wide as the head has prototypes.
        crop_voxel: Size of the crops, tried here on the backbone; None leaves the check to the first batch.
        mask_ratio: Share of masked blocks.
        mask_patch_voxel: Side of a block.
        mask_shape: `column` masks blocks through all of z, `cube` single blocks.
        mask_per_sample: Whether each crop has its own mask; otherwise all queries share one and all keys another.
        weight_inter_volume: Weight of the crop vectors' cross-entropy.
        weight_intra_volume: Weight of the aligned tokens' cross-entropy.
        weight_reconstruction: Weight of half the squared error.
        student_temperature: Student's temperature in both cross-entropies.
        teacher_temperature: Teacher's temperature in both cross-entropies at the end of its ramp.
        teacher_temperature_start: Teacher's temperature at the start of the ramp.
        teacher_temperature_epochs: Length of the ramp, which ends at the beginning of the last of these epochs.
        centre_momentum: Momentum of both centres.
        ema_momentum: Momentum of the teacher at the start of the run.
        ema_momentum_end: Momentum of the teacher at the end of the run.
        freeze_last_layer_epochs: Epochs in which the prototypes are frozen.
        clip_per_parameter: Largest norm of each gradient tensor of backbone and head; null for no clipping.
        teacher_shared_head: Whether the teacher has one set of prototypes for crops and tokens.
        teacher_tokens: Tokens of the teacher, `decoder` or `encoder`, that are the context of its aligned tokens.
        cafa_ema: Whether the teacher's side of the alignment is a moving average without dropout (except for the query
            layer, which is shared); otherwise one module serves both sides.
        teacher_drop_path: Whether the teacher drops paths like the student.

    Source: arXiv:2302.05615; repository alibaba-damo-academy/alice.
    """

    networks = VOLUME_NETWORKS
    centre: Tensor
    token_centre: Tensor
    logit_sum: Tensor
    token_sum: Tensor
    num_rows: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: AliceHead,
        cafa: CAFA,
        crop_voxel: Sequence[int] | None = None,
        mask_ratio: float = 0.75,
        mask_patch_voxel: int = 16,
        mask_shape: str = "column",
        mask_per_sample: bool = True,
        weight_inter_volume: float = 1.0,
        weight_intra_volume: float = 1.0,
        weight_reconstruction: float = 10.0,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.01,
        teacher_temperature_start: float = 0.008,
        teacher_temperature_epochs: float = 30.0,
        centre_momentum: float = 0.9,
        ema_momentum: float = 0.996,
        ema_momentum_end: float = 1.0,
        freeze_last_layer_epochs: float = 1.0,
        clip_per_parameter: float | None = 3.0,
        teacher_shared_head: bool = True,
        teacher_tokens: str = "decoder",
        cafa_ema: bool = False,
        teacher_drop_path: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}: something has to stay visible")
        choice("teacher_tokens", teacher_tokens, TEACHER_TOKENS)
        if min(student_temperature, teacher_temperature, teacher_temperature_start) <= 0:
            raise ValueError("student_temperature, teacher_temperature and teacher_temperature_start must be positive")
        momenta = {"centre_momentum": centre_momentum, "ema_momentum": ema_momentum}
        for name, value in {**momenta, "ema_momentum_end": ema_momentum_end}.items():
            share(name, value)
        check_encoder(backbone.encoder, method="Alice")
        _check_widths(backbone, head, cafa)
        num_blocks((1, 1, 1), shape=mask_shape)  # refuses an unknown shape now, not in the first step
        self.backbone, self.head, self.cafa = backbone, head, cafa
        self.teacher_backbone, self.teacher_head = frozen_copy(backbone), head.teacher(shared=teacher_shared_head)
        self.teacher_cafa = frozen_copy(cafa) if cafa_ema else None
        num_prototypes = len(head.projector.last_layer.weight_v)
        for name in ("centre", "token_centre", "logit_sum", "token_sum"):
            self.register_buffer(name, torch.zeros(1, num_prototypes))
        self.register_buffer("num_rows", torch.zeros(()))  # crops that the sums hold since the last step
        self.mask_ratio, self.mask_patch_voxel = mask_ratio, triple(mask_patch_voxel)
        self.mask_shape, self.mask_per_sample = mask_shape, mask_per_sample
        self.weights = {"inter_volume": weight_inter_volume, "intra_volume": weight_intra_volume}
        self.weights["reconstruction"] = weight_reconstruction
        self.student_temperature = student_temperature
        self.temperature_ramp = teacher_temperature_start, teacher_temperature, teacher_temperature_epochs
        self.centre_momentum, self.ema_range = centre_momentum, (ema_momentum, ema_momentum_end)
        self.freeze_last_layer_epochs, self.clip_per_parameter = freeze_last_layer_epochs, clip_per_parameter
        self.teacher_tokens, self.teacher_drop_path = teacher_tokens, teacher_drop_path
        if crop_voxel is not None:
            self._check_sides(crop_voxel)
            check_crop(backbone, self.encoder, crop_voxel, setting=SIZE)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The student's encoder."""
        return self.backbone.encoder

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the weighted sum of the three losses."""
        image, seen = self._rows(batch)
        with torch.no_grad():
            whole = self.teacher_backbone(image)  # the teacher sees the intact crops
            target = self.teacher_head(whole.pooled, whole.bottleneck, whole.decoded)
        mask = self._mask(seen, progress)
        hidden = self.backbone(seen, mask)  # the student sees them masked
        student = self.head(hidden.pooled, hidden.bottleneck, hidden.decoded)
        aligned = self.cafa(student.bottleneck, student.decoded).float()  # CAFA: S = f(E_s, D_s)
        with torch.no_grad():  # the queries are the student's on this side too
            context = target.decoded if self.teacher_tokens == "decoder" else target.bottleneck
            cafa = self.cafa if self.teacher_cafa is None else self.teacher_cafa
            aligned_target = cafa(student.bottleneck.detach(), context).float()  # T = f(E_s, D_t)

        start, end, epochs = self.temperature_ramp
        temperature = schedules.teacher_temperature(progress.epoch, epochs, start=start, end=end)
        temperatures = {"student_temperature": self.student_temperature, "teacher_temperature": temperature}
        crops, anchors = (logits.float().unflatten(0, (2, -1)) for logits in (student.pooled, target.pooled))
        terms = {
            # loss.py, class term: query and key of two patients
            "inter_volume": inter_volume_loss(crops, anchors, self.centre, **temperatures),
            # loss.py, patch term: tokens within a crop
            "intra_volume": intra_volume_loss(aligned, aligned_target, self.token_centre, **temperatures),
            "reconstruction": halved_mse(hidden.reconstruction, image),  # of the whole crop, masked or not
        }
        if self.training:
            self.logit_sum += anchors.sum((0, 1))
            self.token_sum += aligned_target.mean(1).sum(0)
            self.num_rows += len(image)
        loss = sum((self.weights[name] * term for name, term in terms.items()), start=image.new_zeros(()))
        logs = {name: term.detach() for name, term in terms.items()}
        logs |= self._health(crops.detach(), anchors, whole.pooled.float(), temperature)
        tokens = centred_softmax(aligned_target, self.token_centre, temperature=temperature)
        logs["entropy_tokens_mean"] = mean_entropy(tokens.mean((0, 1)))
        logs["ema_momentum"] = torch.full_like(logs["accuracy"], progress.cosine(*self.ema_range))
        logs["teacher_temperature"] = torch.full_like(logs["accuracy"], temperature)
        extras = {"mask": mask, "reconstruction": hidden.reconstruction.detach()} if progress.with_extras else {}
        return StepOutput(loss, logs, extras)

    @torch.no_grad()
    def after_backward(self, progress: Progress) -> None:
        """Clip each gradient of the student on its own, then drop those of the prototypes while they are frozen."""
        clip_each([*self.backbone.parameters(), *self.head.parameters()], self.clip_per_parameter)
        if progress.epoch < self.freeze_last_layer_epochs:
            for layer in self.head.last_layers():
                for parameter in layer.parameters():
                    parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student, and the centres by the mean of all micro-batches and ranks."""
        momentum = progress.cosine(*self.ema_range)
        update_ema(self.teacher_backbone, self.backbone, momentum=momentum)
        self.teacher_head.follow(self.head, momentum=momentum)
        if self.teacher_cafa is not None:
            update_ema(self.teacher_cafa, self.cafa, momentum=momentum)
            self.teacher_cafa.query.load_state_dict(self.cafa.query.state_dict())
        num_rows = sum_over_ranks(self.num_rows).clamp(min=1)
        for centre, total in ((self.centre, self.logit_sum), (self.token_centre, self.token_sum)):
            centre.lerp_(sum_over_ranks(total) / num_rows, 1 - self.centre_momentum)  # arXiv:2104.14294, eq. 4
            total.zero_()
        self.num_rows.zero_()

    def train(self, mode: bool = True) -> "Alice":
        """Switch the student's mode; the teacher stays in evaluation mode, unless `teacher_drop_path` is set."""
        super().train(mode)
        self.teacher_backbone.train(mode and self.teacher_drop_path)
        for module in (self.teacher_head, self.teacher_cafa):
            if module is not None:
                module.eval()
        return self

    def copies_of_encoder(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the teacher's backbone with the student's."""
        return [(self.teacher_backbone, self.backbone)]

    def parts(self) -> dict[str, nn.Module]:
        """Return the student's networks and, as an alternative, the teacher's encoder and decoder."""
        teacher = self.teacher_backbone
        return {
            "encoder": self.backbone.encoder,
            "decoder": self.backbone.decoder,
            "teacher_encoder": teacher.encoder,
            "teacher_decoder": teacher.decoder,
            "head": self.head,
            "cafa": self.cafa,
        }

    def transfers(self) -> Transfer:
        """Return that segmenters start from encoder and decoder of the backbone."""
        return Transfer({"encoder": "backbone.encoder", "decoder": "backbone.decoder"})

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw the first pair: query and key whole, as the student sees them, and as it reconstructs them."""
        from medssl.ops.panels import orthogonal_slices

        image, seen = (batch[name].image[0] for name in ("pair", "student" if "student" in batch else "pair"))
        num_pairs = len(batch["pair"].image)
        mask, reconstruction = (
            extras[name][::num_pairs] for name in ("mask", "reconstruction")
        )  # all queries, all keys
        hidden = seen.masked_fill(voxel_mask(mask, seen.shape[2:]), float("nan"))
        panels: dict[str, Tensor] = {}
        for title, volumes in (("", image), ("masked ", hidden), ("rebuilt ", reconstruction.to(image))):
            panels |= {f"{title}{name}": volume[0] for name, volume in zip(("query", "key"), volumes, strict=True)}
        return {"pair": orthogonal_slices(panels, title=f"one anatomy in two volumes, step {progress.step}")}

    def _rows(self, batch: Mapping[str, View]) -> tuple[Tensor, Tensor]:
        """Return the images of teacher and student: all queries, then all keys."""
        found = {name: tuple(view.image.shape[1:]) for name, view in batch.items()}
        if "pair" not in batch or found["pair"][0] != 2:
            raise ValueError(f"Alice needs a view group called `pair` with two views; the batch has {found}")
        if found.get("student", found["pair"]) != found["pair"]:
            raise ValueError(
                f"the view groups `pair` and `student` must agree in count and size; the batch has {found}"
            )
        self._check_sides(found["pair"][2:])
        image, seen = (
            batch[name].image.transpose(0, 1) for name in ("pair", "student" if "student" in batch else "pair")
        )
        return image.flatten(0, 1), seen.flatten(0, 1)

    def _check_sides(self, sides: Sequence[int]) -> None:
        """Check that crops fit the strides of the encoder and consist of whole blocks of the mask.

        Raises:
            ValueError: They do not.
        """
        check_strides(self.encoder, sides, setting=SIZE)
        check_multiple(sides, self.mask_patch_voxel, setting=SIZE, of="method.mask_patch_voxel")

    def _mask(self, image: Tensor, progress: Progress) -> Bool[Tensor, "row 1 i j k"]:
        grid = patch_grid(image.shape[2:], self.mask_patch_voxel)
        num_masks = len(image) if self.mask_per_sample else 2
        generator = progress.generator("mask", image.device)
        size = num_masks, num_blocks(grid, shape=self.mask_shape)
        noise = torch.rand(size, generator=generator, device=image.device)
        mask = block_mask(noise, grid=grid, ratio=self.mask_ratio, shape=self.mask_shape)
        return mask.repeat_interleave(len(image) // num_masks, dim=0)

    @torch.no_grad()
    def _health(
        self,
        crops: Float[Tensor, "2 batch prototype"],
        anchors: Float[Tensor, "2 batch prototype"],
        features: Float[Tensor, "row channel"],
        temperature: float,
    ) -> dict[str, Tensor]:
        """Return signs of a collapse: teacher entropies, spread of its features, agreement of both networks."""
        probabilities = centred_softmax(anchors, self.centre, temperature=temperature).flatten(0, 1)
        return {
            "entropy_teacher": mean_entropy(probabilities),
            "entropy_teacher_mean": mean_entropy(probabilities.mean(0)),
            "feature_std": direction_spread(features),
            "accuracy": (anchors[0].argmax(1) == crops[1].argmax(1)).float().mean(),
        }


def _check_widths(backbone: Backbone, head: AliceHead, cafa: CAFA) -> None:
    wanted = {
        "head.bottleneck_channels": (backbone.bottleneck_channels, head.bottleneck_layer.in_features),
        "head.decoded_channels": (backbone.decoded_channels, head.decoded_layer.in_features),
        "cafa.dim": (len(head.projector.last_layer.weight_v), cafa.query.in_features),
    }
    wrong = {name: widths for name, widths in wanted.items() if widths[0] != widths[1]}
    if wrong:
        found = ", ".join(f"{name} is {got}" for name, (_, got) in wrong.items())
        settings = " ".join(f"method.{name}={width}" for name, (width, _) in wrong.items())
        raise ValueError(f"{found}, which does not fit the other networks; set {settings}")
