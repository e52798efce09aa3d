"""The settings of the command `predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from medssl import checks
from medssl.data.reading import check_channels
from medssl.data.recipes import assumed_spacing


@dataclass(frozen=True)
class PredictSettings:
    """The checked settings of a prediction: which images, by which networks, and how.

    Args:
        weights: Files of the networks, whose predictions are averaged.
        input: An image file, a folder of images, the folder of a DICOM series, or `phantom:SEED`.
        output_dir: Folder of the results.
        device: `auto`, `cpu` or `cuda`.
        flips: Axes (0 to 2) whose mirror images are averaged over.
        overlap: Share that neighbouring windows have in common.
        window_batch: Windows per call of the network.
        probabilities: Whether the probability of every class is written too.
        overwrite: Whether results that exist are replaced; they are skipped otherwise.
        include_labels: Whether images that look like label maps are predicted too.
        channels: The channels that are taken from images with several; None for those of the card.
        modality: Modality of all channels or of each; None for that of the card, or else what header and voxels say.
        assume_spacing_mm: Spacing along the axes of files whose headers state none; None refuses these files.
        allow_modules: Packages whose networks a file may name.
    """

    weights: tuple[Path, ...]
    input: Path
    output_dir: Path
    device: str
    flips: tuple[int, ...]
    overlap: float
    window_batch: int
    probabilities: bool
    overwrite: bool
    include_labels: bool
    channels: str | int | None
    modality: tuple[str, ...] | None
    assume_spacing_mm: tuple[float, ...] | None
    allow_modules: tuple[str, ...]

    @classmethod
    def of(cls, config: DictConfig) -> "PredictSettings":
        """Return the settings of a configuration, checked.

        Raises:
            ValueError: A setting is missing or wrong, or names a file that is not there.
        """
        given = config.weights.path
        paths = [] if given is None else list(given) if isinstance(given, ListConfig) else [given]
        if not paths:
            raise ValueError("weights is missing; give it as weights=RUN/segmenter.safetensors, several as [A,B]")
        check_channels(config.data.channels)
        source = Path(config.input).expanduser()
        if not str(source).startswith("phantom:"):
            checks.existing("input", config.input, what="image or folder", folder=None)
        return cls(
            weights=tuple(checks.existing("weights", path, what="weight file") for path in paths),
            input=source,
            output_dir=checks.result_folder(config.output_dir),
            device=checks.choice("device", config.device, checks.DEVICES),
            flips=_axes(config.flips),
            overlap=check_overlap(config.overlap),
            window_batch=checks.whole("window_batch", config.window_batch, least=1),
            probabilities=checks.switch("probabilities", config.probabilities),
            overwrite=checks.switch("overwrite", config.overwrite),
            include_labels=checks.switch("data.include_labels", config.data.include_labels),
            channels=config.data.channels,
            modality=checks.modalities("data.modality", config.data.modality),
            assume_spacing_mm=assumed_spacing(config.data.assume_spacing_mm),
            allow_modules=tuple(config.allow_modules),
        )


def check_overlap(overlap: Any) -> float:
    """Return the share that neighbouring windows have in common.

    Raises:
        ValueError: It does not lie in [0, 1).
    """
    if not checks.is_number(overlap) or not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap!r}")
    return overlap


def _axes(flips: Any) -> tuple[int, ...]:
    if isinstance(flips, bool):
        return (0, 1, 2) if flips else ()
    if isinstance(flips, ListConfig) and set(flips) <= {0, 1, 2} and len(set(flips)) == len(flips):
        return tuple(flips)
    raise ValueError(f"flips={flips} is not understood; it takes true, false or axes such as [0,1] (x and y)")
