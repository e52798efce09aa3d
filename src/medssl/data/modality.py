"""The modality of a channel: the words for it, who states it, and the guess from the values."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Shaped

MODALITIES = ("ct", "mr", "pet", "us", "unknown")
"""CT in Hounsfield units, magnetic resonance, positron emission, ultrasound; all but CT are shown by percentiles."""
SYNONYMS = {
    "ct": "ct", "cbct": "ct", "cect": "ct", "ncct": "ct",
    "mr": "mr", "mri": "mr", "mra": "mr", "adc": "mr", "dwi": "mr", "dce": "mr", "swi": "mr", "flair": "mr", "pd": "mr",
    "t1": "mr", "t1w": "mr", "t1c": "mr", "t1ce": "mr", "t1gd": "mr", "t2": "mr", "t2w": "mr", "t2f": "mr",
    "pet": "pet", "pt": "pet", "suv": "pet", "fdg": "pet", "us": "us", "ultrasound": "us",
}  # fmt: skip
"""Words of lists and tables, in small letters."""

CT_MINIMUM_HU = -200.0
CORNER_HU, AIR_HU, PARTIAL_HU, LUNG_HU, FAT_HU, DENSE_HU = -3100.0, -1100.0, -900.0, -700.0, -100.0, 2000.0
LEAST_AIR, LEAST_TISSUE, LEAST_PARTIAL, LEAST_LOWER = 0.005, 0.01, 0.005, 0.002
WATER_AT = (1024, 1000, 32768)
"""Stored values of water in a CT whose intercept is lost."""
LEAST_AT_LOW, LEAST_AT_HIGH = 0.05, 0.002
"""Shares of voxels at both ends of a range that was cut off there."""
NARROW = 20.0
"""A range that images have after normalisation and hardly ever before."""
SAMPLE = 400_000

Stated = str | Sequence[str | None] | None
"""A modality of all channels, one of each (None where it is not stated), or nothing."""


def named_modality(word: object) -> str | None:
    """Return the modality that a word of a list means, such as `MRI`, `T1w` or `FDG-PET`; None where it means none."""
    text = str(word).lower().strip()
    parts = text.replace("-", " ").replace("_", " ").split()
    found = {SYNONYMS[part] for part in (text, *parts) if part in SYNONYMS}
    return found.pop() if len(found) == 1 else None


def listed_modalities(words: Sequence[str]) -> tuple[str | None, ...] | None:
    """Return the modality of each channel by the names of channels in a dataset.json; None if they name none.

    Words that are no modality, such as names of normalisations, are passed over.
    """
    found = tuple(named_modality(word) for word in words)
    return found if any(found) else None


def parsed_modalities(value: Any) -> tuple[str, ...] | None:
    """Return the modalities that a setting or a cell of a table states: `ct`, `[ct,T1w]` or `ct+pet`; None for nothing.

    Raises:
        ValueError: A word is not known.
    """
    words = value.split("+") if isinstance(value, str) else value
    if words is None or words == [""]:
        return None
    if not isinstance(words, Iterable) or not (listed := list(words)):
        raise ValueError(f"{value!r} is no modality; {ALLOWED}")
    found = []
    for word in listed:
        text = str(word).strip().lower()
        name = text if text in MODALITIES else named_modality(text)
        if not isinstance(word, str) or name is None:
            raise ValueError(f"{word!r} is no modality; {ALLOWED}")
        found.append(name)
    return tuple(found)


ALLOWED = f"allowed are {', '.join(MODALITIES)}, or one a channel such as ct+pet"


def by_channel(stated: Stated, num_channels: int, *, chosen: str | int | None = None) -> tuple[str | None, ...]:
    """Return what is stated of each channel that was read.

    Args:
        stated: One modality of all channels, or one of each channel of the file.
        num_channels: Number of channels that were read.
        chosen: The channel that was chosen from several.

    Raises:
        ValueError: The numbers do not fit.
    """
    words = tuple(stated.split("+")) if isinstance(stated, str) else tuple(stated or (None,))
    if len(words) == 1:
        return words * num_channels
    if num_channels == 1 and isinstance(chosen, int) and chosen < len(words):
        return (words[chosen],)
    if len(words) != num_channels:
        held = f"{num_channels} channel{'s' * (num_channels != 1)}"
        raise ValueError(f"{len(words)} modalities are stated, the image has {held}; state one, or one a channel")
    return words


class Guess(NamedTuple):
    """What the values of a channel look like.

    Args:
        modality: One of `MODALITIES`.
        doubt: A sentence on why it is doubtful; "" for no doubt.
        may_be_hu: Whether the values can be Hounsfield units.
    """

    modality: str
    doubt: str = ""
    may_be_hu: bool = True


def guess_modality(values: Shaped[np.ndarray, "..."]) -> Guess:
    """Return the modality that the values of a channel look like, and a doubt about it.

    Padding should be left out of the values. The rules, in Hounsfield units, of a sample of 400,000 voxels:

    - `ct`: the minimum lies below -200, and there is air or lung as CT has them: at least 0.5 % of the voxels from
      -1100 to -700, denser than the values from -600 to -250, few below but one value down to -3100, which scanners
      fill corners with, soft tissue, and voxels that are in part air (`has_partial_air`), which an image that was
      filled with -1000 does not have.
    - `ct` without air: 0.2 % to 15 % lie below -200, 95 % below 500, at least 60 % are soft tissue (-200 to 300), all
      values are whole, and the most common one does not lie near 0, where all other images have their background.
    - `mr`: all else with less than 0.5 % below -700. An MR image may be negative where it was interpolated, corrected
      or subtracted.
    - `unknown`: all else; CT without air of fractional values or whose most common one is near 0; values that look like
      CT stored without its intercept (air near 0, water near 1024; also 1000 or 32768); negative values that were cut
      off, such as those of CT in a window (`_is_cut_off`); and a range under 20, which a normalised image or a PET in
      SUV may have. All of them are named as doubtful. PET in other units, and CT that was mapped to 0 to 255, cannot be
      told from MR by their values.
    """
    low, high = float(values.min()), float(values.max())
    sample = sampled(values)
    span = f"{low:.6g} to {high:.6g}"
    if high - low <= NARROW:
        return Guess("unknown", f"a range of {span} does not tell the modality: a normalised image?", may_be_hu=False)
    if low < CT_MINIMUM_HU:
        soft = _is_soft_tissue(sample)
        has_lower = _share(sample, -np.inf, CT_MINIMUM_HU) >= LEAST_LOWER
        if _has_air(sample) or (soft and has_lower and _are_whole(sample) and not _peaks_at_zero(sample)):
            return Guess("ct")
        if soft:
            return Guess("unknown", f"values of {span} fit a piece of a CT as well as a difference of MR images")
        if _share(sample, -np.inf, LUNG_HU) >= LEAST_AIR:
            return Guess("unknown", f"values of {span} are spread neither as in CT nor as in MR")
    elif water := next((water for water in WATER_AT if _is_offset_ct(sample, water)), None):
        doubt = f"values of {span} look like a CT stored without its intercept (water near {water})"
        return Guess("unknown", doubt, may_be_hu=False)
    if _is_cut_off(sample, low, high):
        return Guess("unknown", f"values of {span} are cut off at the ends: a CT in a window?")
    return Guess("mr", may_be_hu=low < 0)


def doubt_about(stated: str, guess: Guess) -> str:
    """Return why a stated modality may be wrong; "" where the values do not speak against it."""
    if stated == "ct" and not guess.may_be_hu:
        return f"stated as CT, but {guess.doubt or 'no value lies below 0 HU'}"
    if stated in ("mr", "pet", "us") and guess.modality == "ct":
        return f"stated as {stated.upper()}, but its values look like CT"
    return ""


def sampled(values: Shaped[np.ndarray, "..."]) -> Float64[np.ndarray, " sample"]:
    """Return at most about 400,000 of the values, evenly spread."""
    step = max(1, values.size // SAMPLE) | 1  # odd: sides are mostly even, so that no plane is met alone
    return values.reshape(-1)[::step].astype(np.float64)


def _share(sample: Float64[np.ndarray, " n"], low: float, high: float) -> float:
    """Return the share of values from `low` to `high`."""
    return float(((sample >= low) & (sample <= high)).mean())


def has_partial_air(sample: Float64[np.ndarray, " n"]) -> bool:
    """Return whether voxels are in part air, as lungs, bowel and skin of CT are, beside tissue no denser than bone.

    At least 0.5 % lie between -900 and -200 HU, and of those above 95 % are below 2000 HU.
    """
    above = sample[sample > CT_MINIMUM_HU]
    partial = ((sample > PARTIAL_HU) & (sample < CT_MINIMUM_HU)).mean() >= LEAST_PARTIAL
    return bool(partial and above.size and np.percentile(above, 95) <= DENSE_HU)


def _has_air(sample: Float64[np.ndarray, " n"]) -> bool:
    corner = sample[(sample >= CORNER_HU) & (sample < AIR_HU)]
    filling = np.unique(corner, return_counts=True)[1].max() if corner.size else 0
    air, between = _share(sample, AIR_HU, LUNG_HU), _share(sample, -600, -250)
    is_denser = air / (LUNG_HU - AIR_HU) >= 1.2 * between / 350
    ends = (corner.size - filling) / sample.size <= 0.3 * air and _share(sample, -np.inf, CORNER_HU - 1) < LEAST_AIR
    has_tissue = _share(sample, -200, 300) >= LEAST_TISSUE
    return bool(air >= LEAST_AIR and is_denser and ends and has_tissue and has_partial_air(sample))


def _is_soft_tissue(sample: Float64[np.ndarray, " n"]) -> bool:
    few_below = _share(sample, -np.inf, CT_MINIMUM_HU) <= 0.15
    return few_below and _share(sample, -200, 300) >= 0.6 and float(np.percentile(sample, 95)) <= 500


def _peaks_at_zero(sample: Float64[np.ndarray, " n"]) -> bool:
    counts, edges = np.histogram(sample, bins=np.arange(-205, 306, 10))
    return bool(abs(edges[counts.argmax()] + 5) <= 10)


def _is_offset_ct(sample: Float64[np.ndarray, " n"], water: float) -> bool:
    """Return whether values look like HU above `water`: soft tissue about it, air far below, little between.

    At least 40 % of what is denser than lung lies from -150 to 250 HU, at least 0.5 % are air or lung, nothing lies far
    below air, and from -600 to -250 HU lies at most a quarter of what lies below -700. Or, without air, at least 60 %
    lie from -100 to 150 HU and 90 % from -250 to 400 HU.
    """
    hu = sample - water
    if float(hu.min()) < CORNER_HU or float(hu.max()) < 100:
        return False
    if _share(hu, -100, 150) >= 0.6 and _share(hu, -250, 400) >= 0.9:
        return True
    body, air = hu[hu > LUNG_HU], _share(hu, AIR_HU, LUNG_HU)
    if air < LEAST_AIR or body.size < LEAST_TISSUE * hu.size:
        return False
    is_empty_between = _share(hu, -600, -250) <= 0.25 * _share(hu, -np.inf, LUNG_HU)
    return _share(body, -150, 250) >= 0.4 and is_empty_between


def _is_cut_off(sample: Float64[np.ndarray, " n"], low: float, high: float) -> bool:
    """Return whether 5 % of the values pile up at a smallest one below 0, and others lie as those of a cut CT do.

    0.2 % lie at the largest value too, or the smallest is -100 or less and most others lie from -200 to 300.
    """
    at_low, at_high = _share(sample, low, low), _share(sample, high, high)
    is_soft = low <= FAT_HU and _share(sample, CT_MINIMUM_HU, 300) >= 0.6 * (1 - at_low)
    return low < 0 and at_low >= LEAST_AT_LOW and (is_soft or at_high >= LEAST_AT_HIGH)


def _are_whole(sample: Float64[np.ndarray, " n"]) -> bool:
    return bool((sample == np.rint(sample)).all())
