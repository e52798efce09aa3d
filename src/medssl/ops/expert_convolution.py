"""3x3x3 convolutions whose kernel is a mixture of experts' kernels, weighted by gates that depend on the place."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SHARED = 4
"""Samples for each place from which one convolution for each place is fastest."""


def convolve(
    x: Float[Tensor, "batch channel x y z"],
    weight: Float[Tensor, "expert width channel 3 3 3"],
    *,
    bias: Float[Tensor, " width"],
    gates: Float[Tensor, "place expert"],
    counts: Sequence[int],
    stride: int,
    impl: str,
) -> Float[Tensor, "batch width i j k"]:
    """Convolve each sample with the sum of the experts' kernels times the gates of its place.

    Args:
        x: Samples in the order of the places.
        weight: Kernels of the experts; the padding is 1, with zeros.
        bias: Bias of each output channel, without a gate.
        gates: Gates of every place.
        counts: Number of samples of each place, all above 0.
        stride: Stride of the convolution.
        impl: Name of an implementation in `IMPLEMENTATIONS`, or `auto`; all give the same result.

    Source: arXiv:2302.10390; repository batmanlab/DrasCLR, models/condconv3d.py.
    """
    assert len(counts) == len(gates), "one count for each place"
    assert sum(counts) == len(x), "every sample has a place"
    name = fastest(x, counts=counts) if impl == "auto" else impl
    return IMPLEMENTATIONS[name](x, weight, bias, gates, counts, stride)


def fastest(x: Float[Tensor, "batch channel x y z"], *, counts: Sequence[int]) -> str:
    """Return the name of the implementation that was fastest on a CPU (`scripts/bench_drasclr.py`).

    Groups of one channel are slow on several threads. At the last layers the kernels of every sample are larger than
    the maps of all experts.
    """
    if len(counts) == 1 or x.shape[1] == 1 or len(x) >= SHARED * len(counts):
        return "plain"
    return "mixture" if x[0, 0].numel() <= 8 else "grouped"


def convolve_voxelwise(
    x: Float[Tensor, "batch channel x y z"],
    weight: Float[Tensor, "expert width channel 3 3 3"],
    *,
    bias: Float[Tensor, " width"],
    router_weight: Float[Tensor, "expert 3"],
    router_bias: Float[Tensor, " expert"],
    coordinate: Float[Tensor, "batch 3 i j k"],
    stride: int,
) -> Float[Tensor, "batch width i j k"]:
    """Convolve as `convolve` does, with a place, and so with gates, for every voxel of the output.

    The experts' maps are added one after another and recomputed for the gradient, so that memory does not grow with
    their number.
    """
    total = None
    experts = zip(weight.unbind(), router_weight.unbind(), router_bias.unbind(), strict=True)
    for kernel, direction, offset in experts:
        inputs = (x, kernel, direction, offset, coordinate, stride)
        if torch.is_grad_enabled():
            term = checkpoint(_one_expert, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            term = _one_expert(*inputs)
        total = term if total is None else total.add_(term)  # nothing keeps the sum for the gradient
    assert total is not None
    return total.add_(bias.view(-1, 1, 1, 1))


def gate(
    coordinate: Float[Tensor, "place 3"], weight: Float[Tensor, "expert 3"], bias: Float[Tensor, " expert"]
) -> Float[Tensor, "place expert"]:
    """Return gates between 0 and 1, not normalised over the experts; never in half precision."""
    with torch.autocast(weight.device.type, enabled=False):
        dtype = _whole(weight)
        return F.linear(coordinate.to(dtype), weight.to(dtype), bias.to(dtype)).sigmoid()


def synthesise(
    weight: Float[Tensor, "expert width channel 3 3 3"], gates: Float[Tensor, "place expert"]
) -> Float[Tensor, "place width channel 3 3 3"]:
    """Return the kernel of each place, summed in single precision or better."""
    with torch.autocast(weight.device.type, enabled=False):
        kernels = gates @ weight.to(gates.dtype).flatten(1)
    return kernels.view(len(gates), *weight.shape[1:]).to(weight.dtype)


def _loop(x: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, counts: Sequence[int], stride: int) -> Tensor:
    """Run a kernel and a convolution for each sample, as released; the reference in tests and measurements."""
    rows = gates[_place_of(counts, gates)]
    outputs = []
    for sample, row in zip(x, rows, strict=True):
        with torch.autocast(weight.device.type, enabled=False):
            kernel = (row.view(-1, 1, 1, 1, 1, 1) * weight).sum(0).to(weight.dtype)
        outputs.append(_conv3d(sample[None], kernel, bias, stride))
    return torch.cat(outputs)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, counts: Sequence[int], stride: int) -> Tensor:
    """Run one convolution for each place."""
    kernels = synthesise(weight, gates)
    if len(kernels) == 1:
        return _conv3d(x, kernels[0], bias, stride)
    parts = zip(x.split(list(counts)), kernels, strict=True)
    return torch.cat([_conv3d(part, kernel, bias, stride) for part, kernel in parts])


def _grouped(x: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, counts: Sequence[int], stride: int) -> Tensor:
    """Run one convolution in which each sample is a group of channels with a kernel of its own."""
    kernels = synthesise(weight, gates)
    if len(kernels) < len(x):
        kernels = kernels[_place_of(counts, gates)]
    batch, channels = x.shape[:2]
    as_one = x.reshape(1, batch * channels, *x.shape[2:])
    y = _conv3d(as_one, kernels.flatten(0, 1), bias.repeat(batch), stride, groups=batch)
    return y.view(batch, -1, *y.shape[2:])


def _mixture(x: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, counts: Sequence[int], stride: int) -> Tensor:
    """Run all experts over all samples, then add the gated maps; no kernel is mixed."""
    y = _conv3d(x, weight.flatten(0, 1), None, stride)
    rows = gates[_place_of(counts, gates)]
    with torch.autocast(weight.device.type, enabled=False):
        whole = y.view(len(x), len(weight), -1).to(rows.dtype)
        total = (rows[:, None] @ whole).view(len(x), weight.shape[1], *y.shape[2:])
        return (total + bias.view(-1, 1, 1, 1)).to(y.dtype)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int], int], Tensor]] = {
    "plain": _plain,
    "grouped": _grouped,
    "mixture": _mixture,
    "loop": _loop,
}


def _one_expert(
    x: Tensor, kernel: Tensor, direction: Tensor, offset: Tensor, coordinate: Tensor, stride: int
) -> Tensor:
    """Return one expert's map times its gate at each voxel."""
    y = _conv3d(x, kernel, None, stride)
    with torch.autocast(x.device.type, enabled=False):
        dtype = _whole(direction)
        score = (coordinate.to(dtype) * direction.to(dtype).view(1, 3, 1, 1, 1)).sum(1, keepdim=True) + offset.to(dtype)
        return y.to(dtype) * score.sigmoid()


def _conv3d(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, *, groups: int = 1) -> Tensor:
    """Convolve with a padding of 1; an axis of one voxel is not strided, which changes nothing there.

    In bfloat16 on a CPU a strided kernel over a single voxel has undefined numbers in its gradient (torch 2.13).
    """
    a, b, c = (stride if side > 1 else 1 for side in x.shape[2:])
    return F.conv3d(x, kernel, bias, (a, b, c), 1, groups=groups)


def _place_of(counts: Sequence[int], gates: Tensor) -> Tensor:
    """Return the number of the place of each sample."""
    places = torch.arange(len(counts), device=gates.device)
    return places.repeat_interleave(torch.tensor(counts, device=gates.device), output_size=sum(counts))


def _whole(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
