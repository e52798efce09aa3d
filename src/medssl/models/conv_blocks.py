"""Parts of the pooled U-Nets of slices and volumes: convolution blocks, steps of their maps, inflation of kernels."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from medssl.checks import choice
from medssl.models.unet import SLOPE, InstanceNorm

NORMS = ("batch", "instance", "group")
GROUPS = 8  # of group norm, fewer where they do not divide the channels
CONVOLUTIONS: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
UPSAMPLINGS: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def norm_layer(channels: int, *, spatial_dims: int, norm: str) -> nn.Module:
    """Build a batch, instance or group norm with a weight and a bias for each channel.

    Raises:
        ValueError: There is no such norm.
    """
    choice("norm", norm, NORMS)
    if norm == "batch":
        return BATCH_NORMS[spatial_dims](channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    return InstanceNorm(channels) if spatial_dims == 3 else nn.InstanceNorm2d(channels, affine=True)


def conv_block(in_channels: int, out_channels: int, *, spatial_dims: int, norm: str) -> nn.Sequential:
    """Build a convolution with bias, a norm and a leaky rectifier in place."""
    conv = CONVOLUTIONS[spatial_dims](in_channels, out_channels, 3, padding=1)
    layer = norm_layer(out_channels, spatial_dims=spatial_dims, norm=norm)
    return nn.Sequential(OrderedDict(conv=conv, norm=layer, act=nn.LeakyReLU(SLOPE, inplace=True)))


def initialise(module: nn.Module) -> None:
    """Draw the weights of a convolution, transposed or not, from He's normal distribution; biases are 0."""
    if isinstance(module, _ConvNd):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pooled(x: Float[Tensor, "batch channel *spatial"], step: Sequence[int]) -> Float[Tensor, "batch channel *coarse"]:
    """Return the largest value of every cell of `step` voxels, along two or three axes."""
    return F.max_pool3d(x, tuple(step)) if x.ndim == 5 else F.max_pool2d(x, tuple(step))


def inflated(kernel: Float[Tensor, "out channel side side"]) -> Float[Tensor, "out channel side side side"]:
    """Return the kernel (odd sides) in the middle plane of a new last axis, with zeros in the other planes."""
    half = kernel.shape[-1] // 2
    return F.pad(kernel[..., None], (half, half))


def steps_of(
    strides: Sequence[int | Sequence[int]] | None, *, num_maps: int, spatial_dims: int
) -> list[tuple[int, ...]]:
    """Return one step along each axis for each map; an integer stands for all axes, None for 1 and then 2.

    Raises:
        ValueError: An entry is missing or has another number of axes, or the first is not 1.
    """
    entries: list[Any] = [1] + [2] * (num_maps - 1) if strides is None else list(strides)
    steps = [(entry,) * spatial_dims if isinstance(entry, int) else tuple(entry) for entry in entries]
    wrong = any(len(step) != spatial_dims or min(step) < 1 for step in steps)
    if len(steps) != num_maps or wrong or set(steps[0]) != {1}:
        raise ValueError(
            f"strides need an entry for each of {num_maps} maps, a number or {spatial_dims} of them, the first of them "
            f"1; got {entries}"
        )
    return steps


def strides_of(steps: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Return the product of the steps up to each map."""
    done = [steps[0]]
    for step in steps[1:]:
        done.append(tuple(a * b for a, b in zip(done[-1], step, strict=True)))
    return tuple(done)


def with_axes(recipe: Mapping[str, Any], spatial_dims: int | None) -> dict[str, Any]:
    """Return the recipe of a pooled U-Net for images of `spatial_dims` axes; None leaves them as they are.

    Where a third axis is added, its steps are the larger ones of the other two.
    """
    if spatial_dims is None or recipe.get("spatial_dims", 3) == spatial_dims:
        return dict(recipe)
    steps = [step if isinstance(step, int) else [*step, max(step)] for step in recipe.get("strides") or ()]
    return {**recipe, "spatial_dims": spatial_dims, **({"strides": steps} if steps else {})}


def check_image(image: Float[Tensor, "batch channel *spatial"], stride: Sequence[int]) -> None:
    """Check that an image fits a network of the coarsest stride `stride`.

    Raises:
        ValueError: The image has another number of axes than `stride`, or sides that are no multiples of it.
    """
    size = tuple(image.shape[2:])
    if len(size) != len(stride) or any(side % step for side, step in zip(size, stride, strict=True)):
        raise ValueError(f"an image of {size} voxels does not fit; sides must be multiples of {tuple(stride)}")


def fit_axes(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return the weights with kernels of two axes extended to the three of `network`: its planes act as slices did.

    Kernels go to the middle plane. A transposed convolution without overlap gets a copy for each of its planes.
    """
    fitted = dict(tensors)
    for name, module in network.named_modules():
        kernel = fitted.get(key := f"{name}.weight")
        if isinstance(module, _ConvNd) and kernel is not None and kernel.ndim == module.weight.ndim - 1:
            spread = module.transposed
            fitted[key] = torch.stack([kernel] * module.weight.shape[-1], -1) if spread else inflated(kernel)
    return fitted
