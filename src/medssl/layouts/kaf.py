"""The layout of files of KAF's code."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medssl.layouts.base import Layout

TOKENS = (  # of a network over keypoints
    (r"\.kenc\.encoder\.", ".position.mlp."),
    (r"\.gnn\.layers\.(\d+)\.", r".attention.\1."),
    (r"\.attn\.proj\.0\.", ".query."),
    (r"\.attn\.proj\.1\.", ".key."),
    (r"\.attn\.proj\.2\.", ".value."),
    (r"\.attn\.merge\.", ".merge."),
)
LEVELS = (  # whatever counts from 1 there counts from 0 here
    (r"^encoder\.contr_(\d)_(\d)\.(\d)\.", "encoder.stages.{0}.{1}.{2}."),
    (r"^encoder\.graph_(\d)\.superglue\.", "encoder.kaf.{0}."),
    (r"^encoder\.graph_(\d)\.feature_mlp\.", "encoder.kaf.{0}.embed."),
    (r"^encoder\.graph_(\d)\.diffusion_cnn\.0\.", "encoder.kaf.{0}.spread."),
    (r"^encoder\.graph_(\d)\.diffusion_cnn\.1\.", "encoder.kaf.{0}.norm."),
    (r"^encoder\.graph_(\d)\.diffusion_cnn\.3\.", "encoder.kaf.{0}.restore."),
    (r"^decoder\.expand_(\d)_(\d)\.(\d)\.", "decoder.stages.{0}.{1}.{2}."),
)
HEADS = {
    "head.2.": "heads.bottleneck.0.",
    "head.4.": "heads.bottleneck.2.",
    "graph_head.": "heads.keypoint.",
    "graph_local_head.": "heads.local.",
    "graph_feature_mlp.": "heads.fusion.",
    "superglue.final_proj.": "matcher.final.",
    "superglue.bin_score": "matcher.dustbin",
    "superglue.": "matcher.",
    "decoder.head.": "head.",
}
UNUSED = r"^encoder\.graph_\d\.superglue\.(final_proj\.|bin_score)"
log = logging.getLogger(__name__)


def kaf(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Return the parts of a file of KAF, whose state dict lies under `net`.

    They are encoder, heads (also that of the optional local contrast) and matcher, or encoder, decoder and the output
    layer `head` of a segmentation. Tensors that its keypoint layers never use are left out and logged.

    Raises:
        ValueError: There is no such branch or no encoder.
    """
    if branch != "student":
        raise ValueError(f"branch is {branch!r}, files of the layout `kaf` hold one network only; leave it out")
    state = checkpoint.get("net", checkpoint) if isinstance(checkpoint, Mapping) else {}
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    parts = {
        _kaf_name(key): tensor.squeeze(2) if tensor.ndim == 3 else tensor
        for key, tensor in tensors.items()
        if not re.match(UNUSED, key)
    }
    if "encoder.kaf.0.embed.weight" not in parts or "encoder.center.2.weight" not in parts:
        shown = ", ".join(list(tensors)[:4]) or type(checkpoint).__name__
        raise ValueError(f"{source} holds no encoder of the layout `kaf`; its first entries are {shown}")
    if left_out := [key for key in tensors if re.match(UNUSED, key)]:
        log.info("%s: left out %s", source, ", ".join(left_out))
    return parts


def unet_name(key: str) -> str:
    """Return our name of a tensor of the U-Net that PCL, KAF and MACL share, or of KAF's levels; others keep theirs."""
    for pattern, ours in LEVELS:
        if found := re.match(pattern, key):
            level, *inner = (int(number) - 1 for number in found.groups())
            kinds = [*inner[:1], *(("conv", "norm")[number + 1] for number in inner[1:])]
            return ours.format(level, *kinds) + key.removeprefix(found.group())
    if found := re.match(r"^decoder\.upscale(\d)\.", key):  # which count from 2
        return f"decoder.ups.{int(found.group(1)) - 2}." + key.removeprefix(found.group())
    return key


def _kaf_name(key: str) -> str:
    key = unet_name(key)
    start = next((start for start in HEADS if key.startswith(start)), None)
    if start is not None:
        key = HEADS[start] + key.removeprefix(start)
    if key.startswith(("encoder.kaf.", "matcher.")):
        for pattern, ours in TOKENS:
            key = re.sub(pattern, ours, key)
    return key


def kaf_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of the encoder in a KAF file, for volumes in [0, 1].

    The kernels of a file for slices become the middle planes of the encoder's kernels.

    Raises:
        ValueError: The levels have different numbers of attention layers.
    """
    depths = {
        level: len({key.split(".")[4] for key in tensors if key.startswith(f"encoder.kaf.{level}.attention.")})
        for level in range(4)
    }
    if len(set(depths.values())) != 1 or depths[0] % 2:
        raise ValueError(f"{source} has {list(depths.values())} attention layers at its levels; expected pairs, equal")
    base_channels, in_channels = tensors["encoder.stages.0.0.conv.weight"].shape[:2]
    code = "encoder.kaf.0.position.mlp."
    codes = [key for key in tensors if key.startswith(code) and key.endswith(".weight") and tensors[key].ndim == 2]
    hidden, dim = tensors["encoder.kaf.0.spread.weight"].shape[:2]
    return {
        "_target_": "medssl.models.kaf_unet.KAFEncoder",
        "in_channels": in_channels,
        "base_channels": base_channels,
        "dim": dim,
        "num_layers": depths[0] // 2,
        "hidden": hidden,
        "detector": {"_target_": "medssl.models.keypoints.DifferenceOfGaussians", "value_range": [0, 1]},
        "position_widths": [len(tensors[key]) for key in sorted(codes, key=lambda key: int(key.split(".")[5]))[:-1]],
    }


LAYOUT = Layout("kaf", kaf, {"encoder": kaf_recipe})  # trained on slices that are turned and mirrored
