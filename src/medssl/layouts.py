"""Key maps of published checkpoints: whatever a file calls its tensors becomes `part.tensor` of ours."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from medssl.layouts_kaf import kaf, kaf_recipe
from medssl.layouts_macl import macl, macl_decoder_recipe, macl_encoder_recipe, macl_trained_blocks

SAFE_GLOBALS: list[Any] = [argparse.Namespace]
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
DRASCLR_BRANCHES = {"student": "encoder_q.", "teacher": "encoder_k."}
HEADS_BY_WIDTH = {192: 3, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1344: 16}


def glmae(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Encoder, decoder and head of a published GL-MAE file, or of a masked autoencoder with the same names.

    The state dict lies under `student` (or `teacher`), `state_dict` or `model`, or is the file itself. Tensors that
    belong to none of the three parts are left out.

    Raises:
        ValueError: there is no such branch or no encoder.
    """
    if branch not in ("student", "teacher"):
        raise ValueError(f"branch is {branch!r}, allowed are student, teacher")
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


def sam(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """The encoder of a published SAM file: backbone, fine and coarse neck, without the organ branch `semantic_head`.

    The state dict lies under `state_dict` or is the file itself. All other tensors belong to the encoder, so that a
    file of another network does not load.

    Raises:
        ValueError: there is no such branch or no encoder.
    """
    if branch != "student":
        raise ValueError(f"branch is {branch!r}, files of the layout `sam` hold one network only; leave it out")
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if "backbone.conv1.conv.weight" not in tensors:
        shown = ", ".join(list(map(str, state))[:4]) or type(checkpoint).__name__
        raise ValueError(f"{source} holds no encoder of the layout `sam`; its first entries are {shown}")
    return {f"encoder.{key}": tensor for key, tensor in tensors.items() if not key.startswith("semantic_head.")}


def alice(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Encoder, decoder, reconstruction and head of a file of Alice.

    A training file holds `student` and `teacher`. A file of one extracted network holds its tensors at the top, beside
    an empty `state_dict` or not, or under `state_dict`; it is read as `student`. Left out are the two reconstructions
    of coarser maps that nothing uses, the indices of the bias tables, which the network makes anew, and the token
    prototypes of a teacher that are those of its crops.

    Raises:
        ValueError: there is no such branch, or no encoder and decoder.
    """
    if branch not in ("student", "teacher"):
        raise ValueError(f"branch is {branch!r}, allowed are student, teacher")
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


def drasclr(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Encoder and head (`fc`) of a file of DrasCLR, without the queue.

    A training file holds the trained network (`student`) and its momentum copy (`teacher`) under `state_dict`; a file
    of one extracted network holds its tensors at the top or there and is read as `student`. All other tensors belong to
    the encoder, so that a file of another network does not load.

    Raises:
        ValueError: there is no such branch or no location-conditioned encoder.
    """
    if branch not in DRASCLR_BRANCHES:
        raise ValueError(f"branch is {branch!r}, allowed are student, teacher")
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


def infer_card(tensors: Mapping[str, Tensor], *, source: str, layout: str) -> dict[str, Any]:
    """The card of a published file, read off the shapes of its tensors.

    Raises:
        ValueError: the architecture cannot be read off them.
    """
    held = {key.partition(".")[0] for key in tensors}
    recipes = {part: recipe(tensors, source) for part, recipe in RECIPES[layout].items() if part in held}
    blocks = macl_trained_blocks(tensors) if layout == "macl" and "decoder" in held else {}
    return {"method": layout, **recipes, **blocks, "transfers": list(recipes), "input_axes": INPUT_AXES[layout]}


def glmae_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The transformer in a GL-MAE file.

    Raises:
        ValueError: the position table belongs to no cubic grid, or the number of heads of this width is not known.
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


def sam_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The embedding network in a SAM file.

    Raises:
        ValueError: it has no fine neck, whose width is that of the embeddings.
    """
    neck = tensors.get("encoder.neck.fpn_convs.0.conv.weight")
    if neck is None:
        raise ValueError(f"{source} has a backbone without the fine neck `neck.*`; it is no whole embedding network")
    base_channels, in_channels = tensors["encoder.backbone.conv1.conv.weight"].shape[:2]
    sizes = {"base_channels": base_channels, "emb_dim": len(neck), "in_channels": in_channels}
    return {"_target_": "medssl.models.sam_resnet.SamResNet", **sizes}


def alice_encoder_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The encoder of nnFormer in a file of Alice.

    It was trained with a position table of random numbers that no file holds; what comes closest is none, their mean.
    """
    stem = tensors["encoder.patch_embed.proj1.conv1.weight"]
    sizes = {"in_channels": stem.shape[1], "feature_size": 2 * len(stem), "ape": "none"}
    return {"_target_": "medssl.models.nnformer.NnFormerEncoder", **sizes, **_windows(tensors, "encoder")}


def alice_decoder_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The decoder of nnFormer in a file of Alice."""
    return {"_target_": "medssl.models.nnformer.NnFormerDecoder", **_windows(tensors, "decoder")}


def drasclr_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The location-conditioned encoder in a file of DrasCLR.

    Raises:
        ValueError: its routers read something else than three coordinates.
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


def _windows(tensors: Mapping[str, Tensor], part: str) -> dict[str, Any]:
    """What nnFormer's bias tables tell, and the smallest image whose grids hold the windows."""
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


def get(layout: str) -> Callable[..., dict[str, Tensor]]:
    """The key map called `layout`.

    Raises:
        ValueError: there is none of that name.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, known are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


Recipe = Callable[[Mapping[str, Tensor], str], dict[str, Any]]
LAYOUTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "glmae": glmae,
    "sam": sam,
    "alice": alice,
    "drasclr": drasclr,
    "kaf": kaf,
    "macl": macl,
}
RECIPES: dict[str, dict[str, Recipe]] = {  # of the parts that a segmenter starts from
    "glmae": {"encoder": glmae_recipe},
    "sam": {"encoder": sam_recipe},
    "alice": {"encoder": alice_encoder_recipe, "decoder": alice_decoder_recipe},
    "drasclr": {"encoder": drasclr_recipe},
    "kaf": {"encoder": kaf_recipe},
    "macl": {"encoder": macl_encoder_recipe, "decoder": macl_decoder_recipe},
}
INPUT_AXES = {
    "glmae": "xyz",
    "sam": "SPL",
    "alice": "xyz",
    "drasclr": "SAL",
    "kaf": "xyz",
    "macl": "xyz",
}  # glmae is read as RAS: inferred from the author's loaders; kaf and macl are trained on slices turned and mirrored
