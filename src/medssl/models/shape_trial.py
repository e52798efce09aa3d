"""A trial of a network on the shape of an image, without computing values."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn
from torch.func import functional_call


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
