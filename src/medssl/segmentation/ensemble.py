"""An ensemble of saved segmenters, one or several, ready to predict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medssl.inference.reading import Reading
from medssl.models.segmenter import channels_read
from medssl.segmentation.segment import Averaged, Member, takes_coordinate
from medssl.weights import load_segmenter

LABEL_TYPES = (np.uint8, np.int16, np.int32)


@dataclass(frozen=True)
class Ensemble:
    """Networks that predict the same classes.

    Args:
        members: The members; networks that share a reading are one member.
        classes: Value and name of each class, in the order of the network's outputs.
        channels: The channels of a file that are read.
        num_channels: Number of channels that the networks read.
        modality: Modality of all channels or of each, if the networks were trained on that alone; None if they state
            nothing, or disagree.
        device: The device of the networks.
    """

    members: tuple[Member, ...]
    classes: tuple[dict[str, Any], ...]
    channels: str | int | None
    num_channels: int
    modality: tuple[str, ...] | None
    device: torch.device

    @classmethod
    def load(
        cls,
        paths: Sequence[Path],
        *,
        flips: Sequence[int] = (),
        device: torch.device,
        allow_modules: Sequence[str] = (),
    ) -> "Ensemble":
        """Return the ensemble of the networks in files of saved segmenters.

        Raises:
            ValueError: A file does not exist or holds no segmenter, or has other classes or channels than the first.
        """
        groups: list[tuple[Reading, list[nn.Module]]] = []
        first: tuple[Any, ...] = ()
        modalities = set()
        for path in paths:
            network, card = load_segmenter(path, allow_modules=allow_modules)
            reading = Reading.from_card(card["reading"], allow_modules=allow_modules)
            facts = (tuple(card["classes"]), reading.channels, channels_read(network.encoder))
            first = first or facts
            for what, own, others in zip(("classes", "channels", "channels"), facts, first, strict=True):
                if own != others:
                    raise ValueError(
                        f"{path} and {paths[0]} cannot be averaged, their {what} differ: {_short(own)} and "
                        f"{_short(others)}"
                    )
            modalities.add(reading.modality)
            reading = replace(reading, modality=None)  # networks of one grid are one member whatever their modality
            alike = [networks for known, networks in groups if known == reading]
            if not alike:
                alike = [[]]
                groups.append((reading, alike[0]))
            alike[0].append(network.to(device).eval())
        dtype = _fast_type(device)
        members = tuple(
            Member(Averaged(networks, flips=flips, dtype=dtype), reading, len(networks)) for reading, networks in groups
        )
        said = modalities - {None}
        classes, channels, num_channels = first
        return cls(members, classes, channels, num_channels, said.pop() if len(said) == 1 else None, device)

    @property
    def takes_coordinate(self) -> bool:
        """Whether a network needs the place in the body of each voxel."""
        return any(takes_coordinate(member.predict) for member in self.members)

    def label_values(self) -> np.ndarray:
        """Return the label value of each class, in the smallest type that holds all."""
        values = [int(c["value"]) for c in self.classes]
        fitting = next(kind for kind in LABEL_TYPES if np.iinfo(kind).max >= max(values))
        return np.array(values, dtype=fitting)

    def __str__(self) -> str:
        number = sum(int(member.weight) for member in self.members)
        networks = f"{number} networks" if number > 1 else "1 network"
        readings = []
        for reading in (member.reading for member in self.members):
            spacing = reading.spacing_mm
            spacing = "native spacing" if isinstance(spacing, str) else f"{' x '.join(f'{s:g}' for s in spacing)} mm"
            readings.append(f"windows of {' x '.join(map(str, reading.crop_voxel))} voxels at {spacing}")
        return f"{networks}, {len(self.classes)} classes, {'; '.join(readings)}"


def _fast_type(device: torch.device) -> torch.dtype | None:
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _short(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    named = [f"{c['value']} {c['name']}" for c in value]
    return ", ".join(named[:6]) + (f", ... ({len(named)})" if len(named) > 6 else "")
