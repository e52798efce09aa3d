"""The layout of files of GL-MAE's code, and of masked autoencoders with the same names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medssl.checks import choice
from medssl.layouts.base import Layout

WRAPPERS = ("module.backbone.", "backbone.", "module.")


DECODER_NAMES = {
    "decoder_pos_embed": "pos_embed",
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "pred",
    "mask_token": "mask_token",
}


ENCODER_NAMES = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")


HEADS_BY_WIDTH = {192: 3, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1344: 16}


def glmae(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Return encoder, decoder and head of a published GL-MAE file, or of a masked autoencoder with the same names.

    The state dict lies under `student` (or `teacher`), `state_dict` or `model`, or is the file itself. Tensors that
    belong to none of the three parts are left out.

    Raises:
        ValueError: There is no such branch or no encoder.
    """
    choice("branch", branch, ("student", "teacher"))
    entries = [branch] if branch == "teacher" else ["student", "state_dict", "model"]
    state = next((checkpoint[key] for key in entries if isinstance(checkpoint, Mapping) and key in checkpoint), None)
    if state is None and branch == "student":
        state = checkpoint
    if not isinstance(state, Mapping):
        held = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"{source} has no branch `{branch}`; its entries are {held}")
    parts: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = str(key)
        name = next((name.removeprefix(wrapper) for wrapper in WRAPPERS if name.startswith(wrapper)), name)
        first, dot, rest = name.partition(".")
        if not isinstance(tensor, Tensor):
            continue
        if first in ENCODER_NAMES:
            parts[f"encoder.{name}"] = tensor
        elif first in DECODER_NAMES:
            parts[f"decoder.{DECODER_NAMES[first]}{dot}{rest}"] = tensor
        elif first == "head":
            parts[name] = tensor
    if "encoder.cls_token" not in parts:
        shown = ", ".join(list(map(str, state))[:4])
        raise ValueError(f"{source} holds no encoder of the layout `glmae`; its first entries are {shown}")
    return parts


def glmae_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of the transformer in a GL-MAE file.

    Raises:
        ValueError: The position table belongs to no cubic grid, or the number of heads of this width is not known.
    """
    weight, table = tensors["encoder.patch_embed.proj.weight"], tensors["encoder.pos_embed"]
    dim, in_channels, *patch = weight.shape
    side = round((table.shape[1] - 1) ** (1 / 3))
    if side**3 != table.shape[1] - 1:
        raise ValueError(f"the position table of {source} has {table.shape[1]} rows, which is no cubic grid plus CLS")
    if dim not in HEADS_BY_WIDTH:
        raise ValueError(
            f"{source} has an encoder of width {dim} whose number of heads is not known; build the VisionTransformer "
            "yourself and use medssl.weights.load_parts"
        )
    return {
        "_target_": "medssl.models.vit.VisionTransformer",
        "size_voxel": [side * step for step in patch],
        "patch_voxel": patch,
        "in_channels": in_channels,
        "dim": dim,
        "depth": len({key.split(".")[2] for key in tensors if key.startswith("encoder.blocks.")}),
        "num_heads": HEADS_BY_WIDTH[dim],
    }


LAYOUT = Layout("glmae", glmae, {"encoder": glmae_recipe})  # axes inferred from the author's loaders
