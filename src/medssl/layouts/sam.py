"""The layout of files of SAM, self-supervised anatomical embeddings."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medssl.layouts.base import Layout


def sam(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Return the encoder of a published SAM file: backbone, fine and coarse neck, without the branch `semantic_head`.

    `semantic_head` is the branch of organs. The state dict lies under `state_dict` or is the file itself. All other
    tensors belong to the encoder, so that a file of another network does not load.

    Raises:
        ValueError: There is no such branch or no encoder.
    """
    if branch != "student":
        raise ValueError(f"branch is {branch!r}, files of the layout `sam` hold one network only; leave it out")
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if "backbone.conv1.conv.weight" not in tensors:
        shown = ", ".join(list(map(str, state))[:4]) or type(checkpoint).__name__
        raise ValueError(f"{source} holds no encoder of the layout `sam`; its first entries are {shown}")
    return {f"encoder.{key}": tensor for key, tensor in tensors.items() if not key.startswith("semantic_head.")}


def sam_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of the embedding network in a SAM file.

    Raises:
        ValueError: The file has no fine neck, which gives the width of the embeddings.
    """
    neck = tensors.get("encoder.neck.fpn_convs.0.conv.weight")
    if neck is None:
        raise ValueError(f"{source} has a backbone without the fine neck `neck.*`; it is no whole embedding network")
    base_channels, in_channels = tensors["encoder.backbone.conv1.conv.weight"].shape[:2]
    sizes = {"base_channels": base_channels, "emb_dim": len(neck), "in_channels": in_channels}
    return {"_target_": "medssl.models.sam_resnet.SamResNet", **sizes}


LAYOUT = Layout(
    "sam",
    sam,
    {"encoder": sam_recipe},
    axes="SPL",
    reading={
        "spacing_mm": 2.0,
        "crop_voxel": [32, 32, 32],
        "outside": -1024.0,
        "normalise": [
            {
                "_target_": "medssl.data.augment.ByModality",
                "window_hu": [-1024.0, 3071.0],
                "percentiles": [0.5, 99.5],
                "out": [-50.0, 205.0],
            }
        ],
    },
)
"""Images are read at 2 mm, over the whole range of CT, with -1024 beyond the volume."""
