"""The plain convolutional U-Net: an encoder of strided stages and the decoder that up-samples along its skips."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from medssl.models.stem import fit_stem
from medssl.ops.patches import Triple, triple

SLOPE = 0.01  # of the leaky rectifier
PerStage = int | Sequence[int | Sequence[int]]


class InstanceNorm(nn.InstanceNorm3d):
    """Affine instance norm; on the CPU it runs as group norm of single channels, which is equal and twice as fast."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each sample and channel to mean 0 and variance 1, then scale and shift it."""
        if x.device.type == "cpu":
            return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)
        return super().forward(x)


class ConvNormAct(nn.Sequential):
    """Convolution without bias (the norm would remove it), instance norm, leaky rectifier in place."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: Triple, stride: Triple = (1, 1, 1), act: bool = True
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        nn.init.kaiming_normal_(conv.weight, a=SLOPE)
        layers = {"conv": conv, "norm": InstanceNorm(out_channels)}
        super().__init__(OrderedDict(layers | ({"act": nn.LeakyReLU(SLOPE, inplace=True)} if act else {})))


def conv_stage(
    in_channels: int, out_channels: int, *, num_convs: int, kernel: Triple, stride: Triple = (1, 1, 1)
) -> nn.Sequential:
    """Build `num_convs` convolutions, the first of them strided."""
    first = ConvNormAct(in_channels, out_channels, kernel=kernel, stride=stride)
    return nn.Sequential(first, *(ConvNormAct(out_channels, out_channels, kernel=kernel) for _ in range(num_convs - 1)))


def per_stage(value: PerStage, num_stages: int, *, name: str) -> tuple[Triple, ...]:
    """Return one triple for each stage: an integer stands for all stages, a list must have an entry for each.

    Raises:
        ValueError: The list has another length, or an entry is neither a positive integer nor three of them.
    """
    entries = [value] * num_stages if isinstance(value, int) else list(value)
    if len(entries) != num_stages:
        raise ValueError(f"there are {num_stages} stages, {name} has {len(entries)} entries: {list(entries)}")
    return tuple(triple(entry) for entry in entries)


class UNetEncoder(nn.Module):
    """Stages of convolutions as in nnU-Net: one map for each stage, which begins with a strided convolution.

    Args:
        in_channels: Channels of the image.
        widths: Channels of the stages.
        strides: Step of each stage, one integer or one for each axis; null is 1, then 2. The attribute `strides` holds
            the product of the steps up to each stage, in voxels.
        convs_per_stage: Convolutions in each stage.
        kernels: One odd side for all stages, or one (or three) for each stage.
        checkpoint_activations: Recompute activations in the backward pass.

    Source: arXiv:1809.10486.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64, 128, 256, 320),
        strides: PerStage | None = None,
        convs_per_stage: int = 2,
        kernels: PerStage = 3,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        steps, sides = stage_geometry(strides, kernels, len(widths))
        self.in_channels, self.channels = in_channels, tuple(widths)
        self.strides = cumulative(steps)
        self.checkpoint_activations = checkpoint_activations
        incoming = (in_channels, *widths[:-1])
        self.stages = nn.ModuleList(
            conv_stage(before, width, num_convs=convs_per_stage, kernel=kernel, stride=step)
            for before, width, step, kernel in zip(incoming, widths, steps, sides, strict=True)
        )

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], coordinate: Tensor | None = None
    ) -> list[Float[Tensor, "batch width i j k"]]:
        """Return one map for each stage, fine to coarse; `coordinate` is accepted and not used.

        Raises:
            ValueError: The coarsest map would have a single voxel, which instance norm turns to zero.
        """
        check_coarsest(image, self.strides[-1])
        maps = [image]
        for stage in self.stages:
            maps.append(run(stage, maps[-1], checkpointed=self.checkpoint_activations))
        return maps[1:]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with the first convolution fitted to this network's input channels."""
        return fit_stem(tensors, "stages.0.0.conv.weight", self.in_channels)


class UNetDecoder(nn.Module):
    """Transposed convolutions and convolutions over the skips of an encoder whose maps have falling resolution.

    Where the finest map is coarser than the image, further steps lead to full resolution; their skips are convolutions
    over the image, `image_width` channels wide at full resolution and twice as wide at each step below.

    Args:
        in_channels: Channels of the image.
        encoder_channels: Channels of the encoder's maps, fine to coarse.
        encoder_strides: Strides of the encoder's maps, in voxels.
        convs_per_stage: Convolutions at each resolution.
        kernels: One odd side for all levels, or one (or three) for each level, fine to coarse.
        image_width: Channels over the image at full resolution, limited to those of the encoder's finest map.
        checkpoint_activations: Recompute activations in the backward pass.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        encoder_channels: Sequence[int],
        encoder_strides: Sequence[int | Sequence[int]],
        convs_per_stage: int = 2,
        kernels: PerStage = 3,
        image_width: int = 32,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.checkpoint_activations = in_channels, checkpoint_activations
        extra = halvings(triple(encoder_strides[0]))
        image_widths = [min(image_width << level, encoder_channels[0]) for level in range(len(extra))]
        self.image_levels = (
            UNetEncoder(
                in_channels=in_channels,
                widths=image_widths,
                strides=[(1, 1, 1), *extra[:-1]],
                checkpoint_activations=checkpoint_activations,
            )
            if extra
            else None
        )
        widths = [*image_widths, *encoder_channels]
        strides = [*(self.image_levels.strides if self.image_levels else ()), *map(triple, encoder_strides)]
        steps = [_step(fine, coarse) for fine, coarse in pairwise(strides)]
        if not steps:
            raise ValueError("a U-Net decoder needs an encoder with maps of at least two resolutions")
        self.channels, self.strides = tuple(widths[:-1]), tuple(strides[:-1])
        self.ups = nn.ModuleList(
            _upsampling(coarse, fine, step=step) for (fine, coarse), step in zip(pairwise(widths), steps, strict=True)
        )
        self.stages = nn.ModuleList(
            conv_stage(2 * width, width, num_convs=convs_per_stage, kernel=kernel)
            for width, kernel in zip(self.channels, per_stage(kernels, len(steps), name="kernels"), strict=True)
        )

    def forward(
        self,
        image: Float[Tensor, "batch channel x y z"],
        features: Sequence[Float[Tensor, "batch _ _ _ _"]],
        *,
        num_blocks: int | None = None,
    ) -> list[Float[Tensor, "batch width i j k"]]:
        """Return decoded maps, full resolution first; with `num_blocks` only those of the first (coarsest) blocks.

        Raises:
            ValueError: The decoder has fewer blocks than `num_blocks`.
        """
        last = len(self.ups) - blocks_to_run(num_blocks, len(self.ups))
        above = self.image_levels if last <= len(self.ups) - len(features) else None
        skips = [*(above(image) if above else ()), *features]
        current, decoded = skips.pop(), []
        for level in range(len(self.ups) - 1, last - 1, -1):
            current = torch.cat([self.ups[level](current), skips.pop()], dim=1)
            current = run(self.stages[level], current, checkpointed=self.checkpoint_activations)
            decoded.append(current)
        return decoded[::-1]


def halvings(stride: Triple) -> list[Triple]:
    """Return steps of 1 or 2 along each axis, fine to coarse, whose product is `stride`.

    An axis with fewer halvings than the others takes them at the coarse end, where its spacing has caught up.

    Raises:
        ValueError: A stride is no power of two.
    """
    exponents = [side.bit_length() - 1 for side in stride]
    if any(side != 1 << exponent for side, exponent in zip(stride, exponents, strict=True)):
        raise ValueError(f"strides of {stride} voxels cannot be undone by doubling; use powers of two")
    deepest = max(exponents)
    a, b, c = ([1] * (deepest - exponent) + [2] * exponent for exponent in exponents)
    return list(zip(a, b, c, strict=True))


def cumulative(steps: Sequence[Triple]) -> tuple[Triple, ...]:
    """Return the product of the steps up to each stage."""
    done = [(1, 1, 1)]
    for step in steps:
        done.append(tuple(a * b for a, b in zip(done[-1], step, strict=True)))  # type: ignore[arg-type]
    return tuple(done[1:])


def stage_geometry(
    strides: PerStage | None, kernels: PerStage, num_stages: int
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Return steps and kernels of the stages; without `strides` the steps are 1, then 2.

    Raises:
        ValueError: A kernel has an even side, or a list does not fit the number of stages.
    """
    steps = per_stage([1] + [2] * (num_stages - 1) if strides is None else strides, num_stages, name="strides")
    sides = per_stage(kernels, num_stages, name="kernels")
    if any(side % 2 == 0 for kernel in sides for side in kernel):
        raise ValueError(f"kernels must have odd sides, got {sides}")
    return steps, sides


def check_coarsest(image: Tensor, stride: Triple) -> None:
    """Check that the map at `stride` has more than one voxel.

    Raises:
        ValueError: The map would have a single voxel.
    """
    size = tuple(image.shape[2:])
    if math.prod(-(-side // step) for side, step in zip(size, stride, strict=True)) == 1:
        raise ValueError(
            f"an image of {size} voxels leaves a single voxel at the coarsest stage, which is one in {stride}; use a "
            "larger crop or fewer stages"
        )


def blocks_to_run(num_blocks: int | None, available: int) -> int:
    """Return how many blocks of a decoder run: `num_blocks`, or all for None.

    Raises:
        ValueError: `num_blocks` is below 1 or above the number of blocks.
    """
    if num_blocks is None:
        return available
    if not 1 <= num_blocks <= available:
        raise ValueError(f"num_blocks is {num_blocks}, this decoder has {available} blocks; give 1 to {available}")
    return num_blocks


def run(stage: nn.Module, *inputs: Tensor, checkpointed: bool) -> Tensor:
    """Run `stage` on `inputs`; with `checkpointed` the backward pass recomputes it, and batch statistics count once."""
    if not checkpointed or not torch.is_grad_enabled():
        return stage(*inputs)
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return checkpoint(stage, *inputs, use_reentrant=False)
    return checkpoint(stage, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _keeping(norms)))


@contextmanager
def _keeping(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Keep the running statistics of batch norms unchanged."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _step(fine: Triple, coarse: Triple) -> Triple:
    step = triple([max(1, b // a) for a, b in zip(fine, coarse, strict=True)])
    if step == (1, 1, 1) or any(a * s != b for a, s, b in zip(fine, step, coarse, strict=True)):
        raise ValueError(
            f"the encoder's maps step from {fine} to {coarse} voxels; a U-Net decoder needs each map to be coarser "
            "than the one before by whole factors (for maps of one stride take medssl.models.unetr.UNETRDecoder)"
        )
    return step


def _upsampling(in_channels: int, out_channels: int, *, step: Triple) -> nn.ConvTranspose3d:
    layer = nn.ConvTranspose3d(in_channels, out_channels, step, stride=step)
    nn.init.normal_(layer.weight, std=in_channels**-0.5)  # each output voxel sums one tap of every channel
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
