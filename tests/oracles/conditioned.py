"""The location-conditioned network in plain loops: one sample, one kernel entry and one layer at a time."""

import math

import torch

BLOCKS = ("downsample1", "downsample2", "downsample3")
LAYERS = (  # convolution, norm, stride
    *(("conv1", "bn1", 1), ("conv2", "bn2", 2)),
    *((f"{block}.conv{n}", f"{block}.bn{n}", 1 + n // 3) for block in BLOCKS for n in (1, 2, 3)),
    *(("conv3", "bn3", 1), ("conv4", "bn4", 2)),
)


def gates(coordinate, router_weight, router_bias):
    """One number between 0 and 1 for each expert."""
    scores = [
        sum(float(a) * float(c) for a, c in zip(row, coordinate, strict=True)) + float(offset)
        for row, offset in zip(router_weight, router_bias, strict=True)
    ]
    return [1 / (1 + math.exp(-score)) for score in scores]


def convolve_sample(x, kernel, bias, stride):
    """x (channel x y z) by a 3x3x3 kernel, padded with one zero: the sum over its 27 entries of shifted copies."""
    padded = x.new_zeros(x.shape[0], *(side + 2 for side in x.shape[1:]))
    padded[:, 1:-1, 1:-1, 1:-1] = x
    sides = [(side - 1) // stride + 1 for side in x.shape[1:]]
    total = bias[:, None, None, None].expand(-1, *sides).clone()
    for i in range(3):
        for j in range(3):
            for k in range(3):
                reach = [
                    slice(n, n + stride * (side - 1) + 1, stride) for n, side in zip((i, j, k), sides, strict=True)
                ]
                total = total + torch.einsum("oc,cxyz->oxyz", kernel[:, :, i, j, k], padded[(slice(None), *reach)])
    return total


def conditional_convolution(x, coordinates, weight, bias, router_weight, router_bias, *, stride):
    """Samples (b channel x y z) with a coordinate each."""
    outputs = []
    for sample, coordinate in zip(x, coordinates, strict=True):
        kernel = torch.zeros_like(weight[0])
        for number, gate in enumerate(gates(coordinate, router_weight, router_bias)):
            kernel = kernel + gate * weight[number]
        outputs.append(convolve_sample(sample, kernel, bias, stride))
    return torch.stack(outputs)


def voxelwise_convolution(x, coordinates, weight, bias, router_weight, router_bias, *, stride):
    """Every output voxel from a convolution of its own place; `coordinates` (b 3 i j k) of the output's voxels."""
    outputs = []
    for sample, places in zip(x, coordinates, strict=True):
        total = torch.zeros(weight.shape[1], *places.shape[1:], dtype=x.dtype)
        for i in range(places.shape[1]):
            for j in range(places.shape[2]):
                for k in range(places.shape[3]):
                    here = gates(places[:, i, j, k], router_weight, router_bias)
                    kernel = sum(gate * experts for gate, experts in zip(here, weight, strict=True))
                    total[:, i, j, k] = convolve_sample(sample, kernel, bias, stride)[:, i, j, k]
        outputs.append(total)
    return torch.stack(outputs)


def norm_and_elu(x, state, name, *, training):
    """Batch norm and ELU, channel by channel."""
    outputs = []
    for channel in range(x.shape[1]):
        values = x[:, channel]
        mean, variance = state[f"{name}.running_mean"][channel], state[f"{name}.running_var"][channel]
        if training:
            mean = values.mean()
            variance = ((values - mean) ** 2).mean()
        scaled = (values - mean) / (variance + 1e-5) ** 0.5
        scaled = state[f"{name}.weight"][channel] * scaled + state[f"{name}.bias"][channel]
        outputs.append(torch.where(scaled > 0, scaled, torch.exp(scaled.clamp(max=0)) - 1))
    return torch.stack(outputs, dim=1)


def network(state, image, coordinates, *, training):
    """The maps after every convolution of the thirteen, from a state dict with our names."""
    x, maps = image, []
    for conv, norm, stride in LAYERS:
        names = ("weight", "bias", "router.weight", "router.bias")
        tensors = [state[f"{conv}.{name}"] for name in names]
        x = conditional_convolution(x, coordinates, *tensors, stride=stride)
        x = norm_and_elu(x, state, norm, training=training)
        maps.append(x)
    return maps
