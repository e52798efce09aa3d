"""Weights and inputs that are written down as a formula, for numbers recorded elsewhere."""

import math

import torch


def fill(module):
    """Give every parameter its formula values, by its name in `module`; returns the module."""
    for name, parameter in module.named_parameters():
        phase = 0.1 * (sum(map(ord, name)) % 97)
        values = 0.05 * torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + phase)
        if parameter.ndim == 1 and name.endswith("weight"):
            values = 1 + values
        if name.endswith("weight_g"):
            values = torch.ones_like(values)
        parameter.data.copy_(values.reshape(parameter.shape))
    return module


def wave(shape, step):
    """The sine of `step` times the flat index."""
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64)).float().reshape(shape)
