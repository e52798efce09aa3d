"""A trial of a network on the shape of an image, without computing values."""

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn
from torch.func import functional_call

from medssl.models.segmenter import channels_read, levels


def check_multiple(sides: Sequence[int], steps: Sequence[int], *, setting: str, of: str) -> None:
    """Check that the sides of a crop are multiples of `steps`.

    Args:
        sides: Sides of the crop, in voxels.
        steps: What they are multiples of, one for each axis.
        setting: Setting that gives the crop, for the message.
        of: Name of `steps`, for the message.

    Raises:
        ValueError: A side is no multiple; the message gives the next larger crop that fits.
    """
    if any(side % step for side, step in zip(sides, steps, strict=True)):
        fitting = ",".join(str(-(-side // step) * step) for side, step in zip(sides, steps, strict=True))
        raise ValueError(
            f"{setting}={list(sides)} is no multiple of {of}, which is {list(steps)}; what fits: {setting}=[{fitting}]"
        )


def check_strides(encoder: nn.Module, sides: Sequence[int], *, setting: str) -> None:
    """Check that the sides of a crop are multiples of the strides of all maps of an encoder.

    Raises:
        ValueError: A side is no multiple; `setting` names the crop in the message.
    """
    steps = [math.lcm(*axis) for axis in zip(*levels(encoder)[1], strict=True)]
    check_multiple(sides, steps, setting=setting, of=f"the coarsest stride of {type(encoder).__name__}")


def check_crop(network: nn.Module, encoder: nn.Module, size_voxel: Sequence[int], *, setting: str) -> None:
    """Check that a network takes crops of a size.

    Args:
        network: The network, whose only argument is the image.
        encoder: The encoder in it, or the same network, described by its `channels` and `strides`.
        size_voxel: Sides of the crops.
        setting: Setting that gives them, for the message.

    Raises:
        ValueError: A side is no multiple of the encoder's strides, or the network refuses the size.
    """
    sides = [int(side) for side in size_voxel]
    check_strides(encoder, sides, setting=setting)
    try:
        try_shape(network, sides, in_channels=channels_read(encoder))
    except ValueError as error:
        raise ValueError(f"{setting}={sides} does not fit {type(encoder).__name__}: {error}") from error


def try_shape(network: nn.Module, size_voxel: Sequence[int], *, in_channels: int) -> None:
    """Run a network on an image without values, two samples large.

    Networks that need values are left to the first batch.

    Raises:
        ValueError: The network refuses the size, as instance norm refuses a single voxel.
    """
    state = {name: tensor.to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    image = torch.empty((2, in_channels, *size_voxel), device="meta")
    with torch.no_grad(), suppress(RuntimeError):
        functional_call(network, state, (image,))
