"""The device that a command works on."""

import torch

from medssl.checks import DEVICES, choice


def find_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` means here.

    Raises:
        ValueError: The name is not known, or there is no CUDA device.
    """
    choice("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: PyTorch finds no CUDA device here; device=cpu does without")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
