"""The layout of files of DrasCLR's code."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medssl.checks import choice
from medssl.layouts.base import Layout

DRASCLR_BRANCHES = {"student": "encoder_q.", "teacher": "encoder_k."}


def drasclr(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Return encoder and head (`fc`) of a file of DrasCLR, without the queue.

    A training file holds the trained network (`student`) and its momentum copy (`teacher`) under `state_dict`; a file
    of one extracted network holds its tensors at the top or there and is read as `student`. All other tensors belong to
    the encoder, so that a file of another network does not load.

    Raises:
        ValueError: There is no such branch or no location-conditioned encoder.
    """
    choice("branch", branch, DRASCLR_BRANCHES)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    state = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    wanted, others = DRASCLR_BRANCHES[branch], tuple(DRASCLR_BRANCHES.values())
    if branch == "teacher" and not any(key.startswith(wanted) for key in state):
        raise ValueError(f"{source} holds no momentum encoder: only training files do, with tensors `{wanted}*`")
    chosen = {
        key.removeprefix(wanted): tensor
        for key, tensor in state.items()
        if key.startswith(wanted) or not key.startswith((*others, "queue"))
    }
    parts = {
        f"head.{key}" if key.startswith("fc.") else f"encoder.{key.replace('._routing_fn.fc.', '.router.')}": tensor
        for key, tensor in chosen.items()
    }
    if "encoder.conv1.router.weight" not in parts or "encoder.conv4.weight" not in parts:
        plain = "encoder.conv1.weight" in parts and parts["encoder.conv1.weight"].ndim == 5
        hint = "its convolutions have one kernel, it may be a file of Context-Aware SSL, " if plain else ""
        shown = ", ".join(list(state)[:4]) or type(checkpoint).__name__
        raise ValueError(f"{source} holds no encoder of the layout `drasclr`; {hint}its first entries are {shown}")
    return parts


def drasclr_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of the location-conditioned encoder in a file of DrasCLR.

    Raises:
        ValueError: Kernels are missing, or the routers read something else than three coordinates.
    """
    kernels = {key: tensor.shape for key, tensor in tensors.items() if tensor.ndim == 6}
    layers = ("conv1", "conv2", "downsample1.conv1", "downsample2.conv1", "downsample3.conv1", "conv3", "conv4")
    if lacking := [layer for layer in layers if f"encoder.{layer}.weight" not in kernels]:
        raise ValueError(f"{source} lacks kernels of {', '.join(lacking)}; it is no whole encoder")
    inputs = tensors["encoder.conv1.router.weight"].shape[1]
    if inputs != 3:
        raise ValueError(f"the routers of {source} read {inputs} numbers instead of one coordinate of three")
    *widths, rep_dim = (kernels[f"encoder.{layer}.weight"][1] for layer in layers)
    return {
        "_target_": "medssl.models.conditioned.ConditionedEncoder",
        "in_channels": kernels["encoder.conv1.weight"][2],
        "widths": widths,
        "rep_dim": rep_dim,
        "num_experts": kernels["encoder.conv1.weight"][0],
    }


LAYOUT = Layout(
    "drasclr",
    drasclr,
    {"encoder": drasclr_recipe},
    axes="SAL",
    reading={
        "spacing_mm": 1.0,
        "crop_voxel": [32, 32, 32],
        "outside": -1024.0,
        "normalise": [
            {"_target_": "medssl.data.augment.ByModality", "window_hu": [-1024.0, 240.0], "out": [-1.0, 1.0]}
        ],
    },
)
