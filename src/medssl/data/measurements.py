"""The measurements of a volume that its record holds: modality, padding and statistics of each channel."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from medssl.data.modality import Stated, by_channel, doubt_about, guess_modality
from medssl.data.padding import Padding, find_padding, is_padding
from medssl.data.volume import Volume, channel_statistics, resample_label, resample_volume

SETTING, SOURCE, HEADER, VOXELS = "setting", "source", "header", "voxels"
"""Who states a modality, from the most believed down."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """The measurements of a volume.

    Args:
        volume: The volume, with the smallest other value in place of its padding.
        modality: The modality of each channel.
        modality_from: Who stated the modality of the first channel: "setting", "source", "header" or "voxels".
        statistics: The statistics of each channel, without its padding.
        padding: The values of each channel that are padding, with their shares.
        doubts: Sentences on what a person should look at.
        masks: Voxels of each channel that are padding; None for a channel without any.
        looks: What the header says of each channel, or else what its values look like.
    """

    volume: Volume
    modality: tuple[str, ...]
    modality_from: str
    statistics: tuple[dict[str, float], ...]
    padding: tuple[Padding, ...]
    doubts: tuple[str, ...]
    masks: tuple[Bool[np.ndarray, "x y z"] | None, ...]
    looks: tuple[str, ...]


def measure(
    volume: Volume, *, setting: Stated = None, source: Stated = None, chosen: str | int | None = None
) -> Measurements:
    """Return the measurements of a volume.

    Args:
        volume: The volume as it was read.
        setting: The modality that a person states, believed before all else.
        source: The modality that the table or the list of the data states; the header and the values follow.
        chosen: The channel that was chosen from several.

    Raises:
        ValueError: The stated modalities do not fit the number of channels.
    """
    number = volume.num_channels
    words = [(SETTING, by_channel(setting, number, chosen=chosen)), (SOURCE, by_channel(source, number, chosen=chosen))]
    words.append((HEADER, by_channel(volume.stated_modality, number)))
    modality, origins, padding, masks, statistics, looks = [], [], [], [], [], []  # type: ignore[var-annotated]
    doubts = list(volume.doubts)
    channels = volume.array
    for channel in range(number):
        stated, origin = next(((w[channel], who) for who, w in words if w[channel] is not None), (None, VOXELS))
        here = find_padding(volume.array[channel], is_ct=None if stated in (None, "unknown") else stated == "ct")
        mask = is_padding(volume.array[channel], here) if here else None
        values = volume.array[channel] if mask is None else volume.array[channel][~mask]
        guess = guess_modality(values)
        if mask is not None:
            channels = channels.copy() if channels is volume.array else channels
            channels[channel][mask] = values.min()
        doubt = guess.doubt if stated is None else doubt_about(stated, guess)
        doubts += [doubt if number == 1 else f"channel {channel}: {doubt}"] if doubt else []
        modality.append(stated or guess.modality)
        looks.append(words[-1][1][channel] or guess.modality)
        origins.append(origin)
        padding.append(here)
        masks.append(mask)
        statistics.append(channel_statistics(values))
    return Measurements(
        volume=volume if channels is volume.array else replace(volume, array=channels),
        modality=tuple(modality),
        modality_from=origins[0],
        statistics=tuple(statistics),
        padding=tuple(padding),
        doubts=tuple(doubts),
        masks=tuple(masks),
        looks=tuple(looks),
    )


def resampled(measured: Measurements, spacing_mm: Sequence[float]) -> Measurements:
    """Return the measurements of a volume on a grid of `spacing_mm`; what is padding there is no part of statistics."""
    volume = resample_volume(measured.volume, spacing_mm)
    masks = [
        None if mask is None else resample_label(mask.astype(np.int8), measured.volume, spacing_mm) > 0
        for mask in measured.masks
    ]
    values = [c if m is None else c[~m] for c, m in zip(volume.array, masks, strict=True)]
    return replace(measured, volume=volume, masks=tuple(masks), statistics=tuple(channel_statistics(v) for v in values))
