"""The layout of files of Alice's code."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from medssl.checks import choice
from medssl.layouts.base import Layout

ALICE_NAMES = {  # start of a name there: start of ours
    "model_down.": "encoder.",
    "decoder.": "decoder.",
    "final.0.up.": "reconstruction.",
    "head.mlp.": "head.projector.mlp.",
    "head.mlp3.": "head.bottleneck_layer.",
    "head.mlp4.": "head.decoded_layer.",
    "head.last_layer.": "head.projector.last_layer.",
    "head.last_layer2.": "head.token_layer.",
}


def alice(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Return encoder, decoder, reconstruction and head of a file of Alice.

    A training file holds `student` and `teacher`. A file of one extracted network holds its tensors at the top, beside
    an empty `state_dict` or not, or under `state_dict`; it is read as `student`. Three kinds of tensors are left out:
    the two reconstructions of coarser maps, which nothing uses; the indices of the bias tables, which the network
    computes; and the token prototypes of a teacher that are those of its crops.

    Raises:
        ValueError: There is no such branch, or no encoder and decoder.
    """
    choice("branch", branch, ("student", "teacher"))
    held = checkpoint if isinstance(checkpoint, Mapping) else {}
    state = held.get(branch)
    if state is None and branch == "student" and "teacher" not in held:
        state = held.get("state_dict") or held
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} has no branch `{branch}`; its entries are {sorted(map(str, held))[:4]}")
    parts: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = str(key).removeprefix("module.").removeprefix("backbone.")
        start = next((start for start in ALICE_NAMES if name.startswith(start)), None)
        if start is not None and isinstance(tensor, Tensor) and not name.endswith(".relative_position_index"):
            parts[ALICE_NAMES[start] + name.removeprefix(start).replace("Upsample", "upsample")] = tensor
    if "encoder.patch_embed.proj1.conv1.weight" not in parts or "decoder.layers.0.upsample.up.weight" not in parts:
        shown = ", ".join(list(map(str, state))[:4])
        raise ValueError(f"{source} holds no network of the layout `alice`; its first entries are {shown}")
    crops, tokens = (parts.get(f"head.{layer}.weight_v") for layer in ("projector.last_layer", "token_layer"))
    if branch == "teacher" and crops is not None and tokens is not None and torch.equal(crops, tokens):
        parts = {key: tensor for key, tensor in parts.items() if not key.startswith("head.token_layer.")}
    return parts


def alice_encoder_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of nnFormer's encoder in a file of Alice.

    It was trained with a position table of random numbers, which no file holds. Leaving the table out comes closest,
    since it is their mean.
    """
    stem = tensors["encoder.patch_embed.proj1.conv1.weight"]
    sizes = {"in_channels": stem.shape[1], "feature_size": 2 * len(stem), "ape": "none"}
    return {"_target_": "medssl.models.nnformer.NnFormerEncoder", **sizes, **_windows(tensors, "encoder")}


def alice_decoder_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of nnFormer's decoder in a file of Alice."""
    return {"_target_": "medssl.models.nnformer.NnFormerDecoder", **_windows(tensors, "decoder")}


def _windows(tensors: Mapping[str, Tensor], part: str) -> dict[str, Any]:
    """Return the settings that nnFormer's bias tables show, and the smallest image with grids that hold the windows."""
    tables: dict[int, list[tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{part}.layers.") and key.endswith(".relative_position_bias_table"):
            tables.setdefault(int(key.split(".")[2]), []).append(tuple(tensor.shape))
    shapes = [tables[level][0] for level in sorted(tables)]
    windows = [(round(rows ** (1 / 3)) + 1) // 2 for rows, _ in shapes]
    return {
        "size_voxel": max(16, *(side * (2 << level) for level, side in enumerate(windows))),
        "depths": [len(tables[level]) for level in sorted(tables)],
        "num_heads": [heads for _, heads in shapes],
        "window_tokens": windows,
    }


LAYOUT = Layout("alice", alice, {"encoder": alice_encoder_recipe, "decoder": alice_decoder_recipe})
