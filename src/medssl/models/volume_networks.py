"""The networks that methods of volumes train, and what these methods need of an encoder."""

from collections.abc import Sequence

from torch import nn

from medssl.models.segmenter import levels

VOLUME_NETWORKS = ("unet", "resenc", "resenc_l", "swinunetr", "unetr", "nnformer", "macl_unet", "attention_unet")
"""Presets of `configs/model` that `check_encoder` accepts."""
SLICE_NETWORKS = ("macl_unet", "attention_unet")
"""Those of them that take slices too."""


def fitting(presets: Sequence[str]) -> str:
    """Return the words of a message that list the presets that fit."""
    return f"networks that fit: model={' | '.join(presets)}"


def check_encoder(encoder: nn.Module, *, method: str, axes: Sequence[int] = (3,)) -> None:
    """Check that an encoder computes maps, which it describes, of images alone.

    Args:
        encoder: The network.
        method: Name of the method that trains it, for the message.
        axes: Numbers of axes that the images of the method can have.

    Raises:
        ValueError: The encoder lacks `channels` or `strides`, takes images of other axes, or takes coordinates or
            keypoints beside the image.
    """
    name, fits = type(encoder).__name__, fitting(VOLUME_NETWORKS)
    try:
        num_axes = len(levels(encoder)[1][-1])
    except ValueError:
        raise ValueError(
            f"{name} does not describe its maps by `channels` and `strides`, which {method} needs; {fits}"
        ) from None
    if num_axes not in axes:
        raise ValueError(f"{name} takes slices, {method} trains on volumes: spatial_dims must be 3; {fits}")
    if num_axes == 2:
        fits = fitting(SLICE_NETWORKS)
    for attribute, what in (("takes_coordinate", "coordinates"), ("takes_points", "keypoints")):
        if getattr(encoder, attribute, False):
            raise ValueError(f"{name} reads {what} beside the image, which {method} does not give it; {fits}")
