"""The settings of the commands `features` and `match`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from omegaconf import DictConfig, ListConfig, OmegaConf

from medssl import checks
from medssl.data.reading import check_channels
from medssl.data.recipes import assumed_spacing

LARGEST_BATCH = 64
"""Most patches per call of the network."""
BRANCHES = ("student", "teacher")
PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class FeatureSettings:
    """The checked settings of an extraction: which encoder, which patches, and where the results go.

    Args:
        weights: File of the encoder.
        layout: Layout of a published file; None for a file of ours.
        branch: `student` or `teacher`.
        output_dir: Folder of the results.
        overwrite: Whether features that exist are made again.
        table: Derived table of locations; None for none.
        grid: Locations in equal cells of the body, along x, y, z; None for none.
        spacing_mm: Spacing of the patches, three numbers or `native`; None for that of the encoder's training.
        size_voxel: Sides of a patch; None for those of the training.
        window_hu: Grey values of CT that are mapped to 0 to 1; None for those of the training.
        stride_voxel: Steps between the patches of a map; None if no maps are made, 0 for half a patch.
        untrained: Seed of random weights; None for those of the file.
        batch_size: Patches per call of the network.
        device: `auto`, `cpu` or `cuda`.
        allow_modules: Packages whose networks a file may name.
    """

    weights: Path
    layout: str | None
    branch: str
    output_dir: Path
    overwrite: bool
    table: str | None
    grid: tuple[int, int, int] | None
    spacing_mm: str | tuple[float, float, float] | None
    size_voxel: tuple[int, int, int] | None
    window_hu: tuple[float, float] | None
    dense: bool
    stride_voxel: tuple[int, int, int] | None
    untrained: int | None
    batch_size: int
    device: str
    allow_modules: tuple[str, ...]

    @classmethod
    def of(cls, config: DictConfig) -> "FeatureSettings":
        """Return the settings of a configuration, checked.

        Raises:
            ValueError: A setting is missing or wrong, or names a file that is not there.
        """
        if config.weights.path is None:
            raise ValueError("weights is missing; give it as weights=RUN/encoder.safetensors")
        dense = checks.switch("dense", config.dense)
        if config.stride_voxel is not None and not dense:
            raise ValueError("stride_voxel belongs to the maps of dense=true; give both or none")
        if config.locations is not None and config.grid is not None:
            raise ValueError("give locations=TABLE or grid=[x,y,z], not both")
        return cls(
            weights=checks.existing("weights", config.weights.path, what="weight file"),
            layout=config.weights.layout,
            branch=checks.choice("weights.branch", config.weights.branch, BRANCHES),
            output_dir=checks.result_folder(config.output_dir),
            overwrite=checks.switch("overwrite", config.overwrite),
            table=config.locations,
            grid=_sides("grid", config.grid),
            spacing_mm=_spacing(config.spacing_mm),
            size_voxel=_sides("size_voxel", config.size_voxel),
            window_hu=_window(config.window_hu),
            dense=dense,
            stride_voxel=_sides("stride_voxel", config.stride_voxel),
            untrained=checks.whole("untrained", config.untrained, or_null="for the weights of the file"),
            batch_size=checks.whole("batch_size", config.batch_size, least=1, most=LARGEST_BATCH),
            device=checks.choice("device", config.device, checks.DEVICES),
            allow_modules=tuple(config.allow_modules),
        )


@dataclass(frozen=True, eq=False)
class MatchSettings:
    """The checked settings of a matching: two scans, the points of one, and the embedding that finds them.

    Args:
        weights: File of the embedding.
        layout: Layout of a published file; None for a file of ours.
        query: The scan with the points.
        reference: The scan to find them in.
        points_mm: The points, RAS millimetres; None for nine that are spread over the body.
        output: The picture.
        channels: The channels that are taken from images with several.
        modality: Modality of all channels or of each; None for what header and voxels say.
        assume_spacing_mm: Spacing along the axes of files whose headers state none; None refuses these files.
        device: `auto`, `cpu` or `cuda`.
        tile_voxel: Slices per call of the network; None for all.
        allow_modules: Packages whose networks a file may name.
    """

    weights: Path
    layout: str | None
    query: Path
    reference: Path
    points_mm: Float64[np.ndarray, "n 3"] | None
    output: Path
    channels: str | int | None
    modality: tuple[str, ...] | None
    assume_spacing_mm: tuple[float, ...] | None
    device: str
    tile_voxel: int | None
    allow_modules: tuple[str, ...]

    @classmethod
    def of(cls, config: DictConfig) -> "MatchSettings":
        """Return the settings of a configuration, checked.

        Raises:
            ValueError: A setting is missing or wrong, or names a file that is not there.
        """
        points_mm = _points(config.point_mm)
        if not isinstance(config.grid, bool) or (points_mm is None) != config.grid:
            raise ValueError("say which points: either point_mm=[x,y,z] in RAS millimetres, or grid=true")
        if config.weights.path is None:
            raise ValueError("weights is missing; give it as weights=RUN/encoder.safetensors of method=sam_embed")
        check_channels(config.data.channels)
        return cls(
            weights=checks.existing("weights", config.weights.path, what="weight file"),
            layout=config.weights.layout,
            query=checks.existing("query", config.query, what="image", folder=None),
            reference=checks.existing("reference", config.reference, what="image", folder=None),
            points_mm=points_mm,
            output=_picture(config.output),
            channels=config.data.channels,
            modality=checks.modalities("data.modality", config.data.modality),
            assume_spacing_mm=assumed_spacing(config.data.assume_spacing_mm),
            device=checks.choice("device", config.device, checks.DEVICES),
            tile_voxel=checks.whole("tile_voxel", config.tile_voxel, least=1, or_null="for all slices at once"),
            allow_modules=tuple(config.allow_modules),
        )


def _sides(name: str, given: Any) -> tuple[int, int, int] | None:
    return None if given is None else checks.triple(name, given)


def _spacing(given: Any) -> Any:
    if given is None or given == "native" or (isinstance(given, ListConfig) and list(given) == ["native"] * 3):
        return None if given is None else "native"
    try:
        return checks.triple("spacing_mm", given, kind=float)
    except ValueError:
        raise ValueError(f"spacing_mm={given} must be one or three positive numbers, or native") from None


def _window(given: Any) -> tuple[float, float] | None:
    if given is None:
        return None
    is_pair = isinstance(given, ListConfig) and len(given) == 2
    if not is_pair or not all(checks.is_number(value) for value in given) or not given[0] < given[1]:
        raise ValueError(f"window_hu={given} must be two numbers [low,high], low below high")
    return float(given[0]), float(given[1])


def _picture(given: Any) -> Path:
    """Return the path of the picture, whose folder is made.

    Raises:
        ValueError: The path is no picture, or cannot be written.
    """
    output = Path(str(given)).expanduser()
    if output.suffix.lower() not in PICTURES:
        raise ValueError(f"output={output} is no picture; give a name that ends in .png, .pdf or .svg")
    folder = output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={output} cannot be written: {error.strerror or error}, {error.filename}") from None
    if output.is_dir() or not os.access(output if output.exists() else folder, os.W_OK):
        what = "it is a folder" if output.is_dir() else "there is no permission to write"
        raise ValueError(f"output={output} cannot be written: {what}; give another file")
    return output


def _points(given: object) -> Float64[np.ndarray, "n 3"] | None:
    if given is None:
        return None
    values = OmegaConf.to_container(given) if isinstance(given, ListConfig) else given
    try:
        points = np.array(values, dtype=np.float64)
    except (ValueError, TypeError):
        points = np.empty(0)
    points = points[None] if points.ndim == 1 else points
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"point_mm={values}: give [x,y,z] in RAS millimetres, or several as [[x,y,z],[x,y,z]]")
    return points
