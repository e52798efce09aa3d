"""Supervised segmentation as a method, for fine-tuning and training from scratch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from medssl.data.views import View
from medssl.methods.base import Method, Progress, StepOutput
from medssl.models.segmenter import Segmenter

FREEZE = ("none", "encoder", "all_but_head")
IGNORED = -1
"""The class number of voxels whose class is unknown."""


class Segmentation(Method):
    """Trains a `Segmenter` on labelled crops, the view group `crop`.

    Args:
        segmenter: The network.
        label_values: The label value of each class, 0 for the background first; other values count as background.
        loss: The loss of logits (b k x y z) and class numbers (b 1 x y z).
        freeze: `none`, `encoder`, or `all_but_head`. Frozen parts stay in evaluation mode and keep their weights.
        ignored_label: The label value of voxels whose class is unknown, which the loss does not see; None for none.
        layer_decay: Learning rate of a transformer block over that of the next deeper one, 1 for none
            (arXiv:2106.08254, appendix).
        decoder_lr_scale: Learning rate of decoder and head over that of the encoder.

    Raises:
        ValueError: A choice does not exist, or a layer decay is given for an encoder without blocks.
    """

    lookup: Int64[Tensor, " value"]
    best: Tensor
    validated_step: Tensor

    def __init__(
        self,
        *,
        segmenter: Segmenter,
        label_values: Sequence[int],
        loss: nn.Module,
        ignored_label: int | None = None,
        freeze: str = "none",
        layer_decay: float = 1.0,
        decoder_lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if freeze not in FREEZE:
            raise ValueError(f"freeze={freeze!r} is not known; choose one of {', '.join(FREEZE)}")
        self.segmenter, self.loss, self.freeze = segmenter, loss, freeze
        self.layer_decay, self.decoder_lr_scale = layer_decay, decoder_lr_scale
        self.ignores = ignored_label is not None
        lookup = torch.zeros(max(*label_values, ignored_label or 0) + 1, dtype=torch.int64)
        lookup[list(label_values)] = torch.arange(len(label_values))
        if ignored_label is not None:
            lookup[ignored_label] = IGNORED
        self.register_buffer("lookup", lookup, persistent=False)
        # how validation has gone so far: in the state, so that a resumed run keeps its best
        self.register_buffer("best", torch.tensor(-1.0, dtype=torch.float64))
        self.register_buffer("validated_step", torch.tensor(-1))
        self.frozen: list[nn.Module] = {
            "none": [],
            "encoder": [segmenter.encoder],
            "all_but_head": [segmenter.encoder, segmenter.decoder],
        }[freeze]
        for part in self.frozen:
            part.requires_grad_(False)
        self.layer_numbers = _layer_numbers(segmenter.encoder) if layer_decay != 1 else {}
        self.train()

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The encoder inside the segmenter."""
        return self.segmenter.encoder

    def train(self, mode: bool = True) -> "Segmentation":
        """Set the mode of all parts but the frozen ones."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def classes_of(self, label: Int[Tensor, "*size"]) -> Int64[Tensor, "*size"]:
        """Return the class numbers of label values, `IGNORED` for the ignored one."""
        known = label < len(self.lookup)
        return torch.where(known, self.lookup[torch.where(known, label, 0)], 0)

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the loss on the crops.

        With deep supervision each coarser output counts half as much as the one before.
        """
        view = batch["crop"]
        assert view.label is not None
        target = self.classes_of(view.label.flatten(0, 1))  # (n 1 x y z)
        coordinate = None
        if self.segmenter.takes_coordinate:
            coordinate = (2 * view.grid_body().flatten(0, 1) - 1).clamp(-1, 1)
        outputs = self.segmenter.outputs(view.image.flatten(0, 1), coordinate)
        weights = [0.5**level for level in range(len(outputs))]
        with torch.autocast(target.device.type, enabled=False):
            losses = [self._loss(output.float(), _coarser(target, output)) for output in outputs]
        loss: Tensor = sum(weight * term for weight, term in zip(weights, losses, strict=True)) / sum(weights)  # type: ignore[assignment]
        known = target[target != IGNORED] if self.ignores else target
        share = (known > 0).float().mean() if len(known) else torch.zeros((), device=known.device)
        return StepOutput(loss, {"foreground_share": share})

    def _loss(self, logits: Float[Tensor, "n k x y z"], target: Int64[Tensor, "n 1 x y z"]) -> Float[Tensor, ""]:
        return loss_of_known(self.loss, logits, target) if self.ignores else self.loss(logits, target)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return groups by share of the learning rate; norms and biases have no weight decay."""
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.segmenter.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self._lr_scale(name), parameter.ndim > 1), []).append(parameter)
        return [
            {"params": parameters, "lr_scale": scale, **({} if decays else {"weight_decay": 0.0})}
            for (scale, decays), parameters in groups.items()
        ]

    def _lr_scale(self, name: str) -> float:
        part, _, within = name.partition(".")
        if part != "encoder":
            return self.decoder_lr_scale
        if not self.layer_numbers:
            return 1.0
        within = within.removeprefix("net.")
        pieces = within.split(".")
        depth = max(self.layer_numbers.values())
        key = f"blocks.{pieces[1]}" if pieces[0] == "blocks" else "norm" if pieces[0] == "norm" else "embedding"
        return self.layer_decay ** (depth - self.layer_numbers[key])

    def parts(self) -> dict[str, nn.Module]:
        """Return encoder, decoder and head."""
        return {"encoder": self.segmenter.encoder, "decoder": self.segmenter.decoder, "head": self.segmenter.head}


def loss_of_known(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Float[Tensor, "n k x y z"], target: Int64[Tensor, "n 1 x y z"]
) -> Float[Tensor, ""]:
    """Return the mean over samples of the loss on those of their voxels whose class is known.

    The known voxels of a sample are given to `loss` as one row (1 k voxels 1 1), so that the others enter neither a
    sum, nor a mean, nor a gradient. Samples without any are left out; without any sample the loss is 0.
    """
    losses = []
    for sample, classes in zip(logits, target, strict=True):
        known = classes[0] != IGNORED
        if known.any():
            losses.append(loss(sample[:, known][None, :, :, None, None], classes[:, known][None, :, :, None, None]))
    return torch.stack(losses).mean() if losses else 0 * logits.sum()


def _layer_numbers(encoder: nn.Module) -> dict[str, int]:
    """Return the depth of the embedding (0), of each block and of the norm behind them."""
    blocks = getattr(getattr(encoder, "net", encoder), "blocks", None)
    if blocks is None:
        kind = type(encoder).__name__
        raise ValueError(f"layer_decay is for transformers with blocks, {kind} has none; leave layer_decay=1")
    numbers = {"embedding": 0, "norm": len(blocks) + 1}
    return numbers | {f"blocks.{number}": number + 1 for number in range(len(blocks))}


def _coarser(target: Tensor, output: Tensor) -> Tensor:
    """Return the classes on the grid of a coarser output, nearest neighbour."""
    if target.shape[2:] == output.shape[2:]:
        return target
    return F.interpolate(target.float(), size=output.shape[2:], mode="nearest-exact").long()
