"""The device that a command works on."""

import torch


def find_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here. Raises: ValueError: it is not known, or there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name} is not known; it takes auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: PyTorch finds no CUDA device here; device=cpu does without")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
