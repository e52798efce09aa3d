"""The layout of files of MACL's code, and of PCL's, on which it is built."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medssl.layouts.base import Layout
from medssl.layouts.kaf import unet_name

NETWORKS = {"share_encoder.": "encoder.", "online_decoder.": "decoder."}
HEADS = {
    "target_instance_projector.2.": "heads.auxiliary.fc.0.",
    "target_instance_projector.4.": "heads.auxiliary.fc.2.",
    "online_instance_projector.2.": "heads.dominant.fc.0.",
    "online_instance_projector.4.": "heads.dominant.fc.2.",
    "target_pixel_projector.0.": "heads.auxiliary_pixel.0.conv.",
    "target_pixel_projector.1.": "heads.auxiliary_pixel.0.norm.",
    "target_pixel_projector.3.": "heads.auxiliary_pixel.1.conv.",
    "target_pixel_projector.4.": "heads.auxiliary_pixel.1.norm.",
}
STATES = ("net", "model_state_dict")
log = logging.getLogger(__name__)


def macl(checkpoint: Any, *, source: str, branch: str) -> dict[str, Tensor]:
    """Return encoder, decoder and heads of a file of MACL; its state dict lies under `net` or `model_state_dict`.

    Files of PCL hold an encoder, and fine-tuned ones encoder and decoder, under these names. Tensors that belong to no
    part of ours are left out and logged: the output layer of a segmentation, and heads of other methods.

    Raises:
        ValueError: There is no such branch or no encoder.
    """
    if branch != "student":
        raise ValueError(f"branch is {branch!r}, files of the layout `macl` hold one network only; leave it out")
    held = checkpoint if isinstance(checkpoint, Mapping) else {}
    state = next((held[key] for key in STATES if isinstance(held.get(key), Mapping)), held)
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    names = {key: _macl_name(key) for key in tensors}
    if "encoder.center.2.weight" not in names.values() or "encoder.stages.0.0.conv.weight" not in names.values():
        shown = ", ".join(list(tensors)[:4]) or type(checkpoint).__name__
        raise ValueError(f"{source} holds no encoder of the layout `macl`; its first entries are {shown}")
    if left_out := [key for key, name in names.items() if name is None]:
        log.info("%s: left out %s", source, ", ".join(left_out))
    return {name: tensors[key] for key, name in names.items() if name is not None}


def _macl_name(key: str) -> str | None:
    """Return our name of a tensor; None if it belongs to no part of ours."""
    for start, ours in HEADS.items():
        if key.startswith(start):
            return ours + key.removeprefix(start)
    for start, ours in NETWORKS.items():
        key = ours + key.removeprefix(start) if key.startswith(start) else key
    if not key.startswith(tuple(NETWORKS.values())) or key.startswith("decoder.head."):
        return None
    return unet_name(key)


def macl_encoder_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of the encoder in a MACL file, for volumes.

    The kernels of a file for slices become the middle planes of the encoder's kernels.
    """
    base_channels, in_channels = tensors["encoder.stages.0.0.conv.weight"].shape[:2]
    num_levels = len({key.split(".")[2] for key in tensors if key.startswith("encoder.stages.")})
    sizes = {"in_channels": in_channels, "base_channels": base_channels, "num_levels": num_levels}
    return {"_target_": "medssl.models.macl_unet.MACLUNetEncoder", **sizes}


def macl_decoder_recipe(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the recipe of the decoder in a MACL file, which fits the encoder's maps."""
    return {"_target_": "medssl.models.macl_unet.MACLUNetDecoder"}


def macl_trained_blocks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of decoder blocks that pre-training trained.

    Each block halves the width, down to the width that the dominant head reads. The result is empty for files without
    that head, such as fine-tuned ones, in which all blocks are trained.
    """
    head = tensors.get("heads.dominant.fc.0.weight")
    if head is None:
        return {}
    return {"decoder_blocks": (len(tensors["encoder.center.2.weight"]) // head.shape[1]).bit_length() - 1}


def _decoder_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return macl_trained_blocks(tensors) if any(key.startswith("decoder.") for key in tensors) else {}


LAYOUT = Layout(
    "macl", macl, {"encoder": macl_encoder_recipe, "decoder": macl_decoder_recipe}, facts=_decoder_facts
)  # trained on slices that are turned and mirrored
