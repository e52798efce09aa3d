"""The embedder of volumes: the network of an anatomical embedding and how it reads images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from medssl.data.store import Record, VolumeStore
from medssl.extraction.embedding import VolumeEmbedding
from medssl.inference.reading import Normalise, Reading, normalising
from medssl.inference.record import fetch_from
from medssl.inference.working_grid import Fetch, WorkingImage
from medssl.weights import load_encoder, read_card

TILE_MARGIN_VOXEL = 32
"""Slices that a tile sees beyond its own, on each side; SAM sees 28 on each side, so that tiles change nothing."""
NORM_TOLERANCE = 0.02


@dataclass(frozen=True)
class Embedder:
    """Embeds volumes.

    Args:
        network: The network; it gives a fine and a coarse map of unit vectors for images (b c x y z) in RAS.
        reading: Grid spacing, what lies beyond the volume, normalisation.
        device: Device of the network.
        tile_voxel: Slices along z per call of the network, for less memory; None for all at once.
    """

    network: nn.Module
    reading: Reading
    device: torch.device
    tile_voxel: int | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        layout: str | None = None,
        device: torch.device | str = "cpu",
        tile_voxel: int | None = None,
        allow_modules: Sequence[str] = (),
    ) -> "Embedder":
        """Return the embedder of a file of ours, or with `layout` of a published checkpoint.

        Raises:
            ValueError: The file cannot be loaded, or holds another kind of encoder.
        """
        if tile_voxel is not None and not (isinstance(tile_voxel, int) and tile_voxel > 0):
            raise ValueError(f"tile_voxel must be a number of slices above 0, or null; got {tile_voxel!r}")
        reading: Reading | None
        if layout is None:
            card = read_card(path)
            reading = reading_of(card, source=str(path), allow_modules=allow_modules)
        else:
            card, reading = {"method": layout}, Reading.from_layout(layout)
        network = load_encoder(path, layout=layout, allow_modules=allow_modules)
        channels = tuple(network.channels)  # type: ignore[arg-type, union-attr]
        if len(channels) != 2 or channels[0] != channels[1]:
            kind = f"{str(card.get('method', 'unknown')).rpartition('.')[2]}, with maps of {list(channels)} channels"
            raise ValueError(f"{path} holds an encoder of {kind}; {_WANTED}")
        if reading is None:
            raise ValueError(f"the layout {layout} does not say how images are read; {_WANTED}")
        return cls(network.to(device).eval(), reading, torch.device(device), tile_voxel)

    def __call__(self, record: Record, fetch: Fetch) -> VolumeEmbedding:
        """Return the embedding of a volume.

        Raises:
            ValueError: The network reads other channels, or gives no unit vectors.
        """
        wanted = getattr(self.network, "in_channels", None) or record.channels
        if record.channels != wanted:
            raise ValueError(f"{record.source} has {record.channels} channels, the embedding reads {wanted}")
        return embed_volume(
            self.network,
            fetch,
            record,
            reading=self.reading,
            normalise=self.reading.normaliser(record),
            device=self.device,
            tile_voxel=self.tile_voxel,
        )

    def of_case(self, store: VolumeStore, case: int) -> VolumeEmbedding:
        """Return the embedding of a case of a store."""
        return self(store.record(case), lambda lower, upper: store.read(case, 0, lower, upper).result())

    def of_array(self, voxels: Shaped[np.ndarray, "c x y z"], record: Record) -> VolumeEmbedding:
        """Return the embedding of a volume in memory; `record_of` makes its record."""
        return self(record, fetch_from(voxels))


def embed_volume(
    network: nn.Module,
    fetch: Fetch,
    record: Record,
    *,
    reading: Reading,
    normalise: Normalise,
    device: torch.device,
    tile_voxel: int | None = None,
) -> VolumeEmbedding:
    """Return the embedding of a volume by a fully convolutional network.

    The volume is drawn at the reading's spacing about its centre, on whole coarse cells: the margin is filled with the
    reading's `outside`.

    Args:
        network: Image (1 c x y z) -> [fine (1 e i j k), coarse (1 e a b c)], of `strides` along x, y, z.
        fetch: The function that gives voxels of the volume.
        record: The record of the volume.
        reading: The rules that give the spacing and the values beyond the volume.
        normalise: The function that makes network input of file units.
        device: Device of the network.
        tile_voxel: Slices along z per call of the network; None for all.

    Raises:
        ValueError: The maps have other shapes than their strides say, or vectors of other lengths than 1.
    """
    fine_step, coarse_step = (np.array(stride) for stride in network.strides)  # type: ignore[union-attr]
    steps = np.ones(3) if isinstance(reading.spacing_mm, str) else np.array(reading.spacing_mm) / record.spacing_mm
    sides = np.maximum(1, np.rint(np.array(record.shape) / steps)).astype(int)
    whole = -(-sides // coarse_step) * coarse_step
    x, y, z = map(int, whole)
    image = WorkingImage(record, replace(reading, crop_voxel=(x, y, z)), fetch, device)
    with torch.inference_mode():
        drawn = normalise(image.layer(0, z)[None])
        fine, coarse = _maps(network, drawn, coarse_step=int(coarse_step[2]), tile_voxel=tile_voxel)
    for level, step in ((fine, fine_step), (coarse, coarse_step)):
        if tuple(level.shape[1:]) != tuple(whole // step):
            raise ValueError(f"the network gives a map of {tuple(level.shape[1:])} cells for {tuple(whole)} voxels")
        if abs(level.float().norm(dim=0).max() - 1) > NORM_TOLERANCE:  # narrow networks give zeros in plain air
            raise ValueError(f"the network does not give unit vectors; {_WANTED}")
    cell_to_voxel = np.diag([*fine_step, 1.0])
    cell_to_voxel[:3, 3] = (fine_step - 1) / 2
    cell_to_mm = record.volume_to_mm @ image.grid.frame.matrix @ cell_to_voxel
    return VolumeEmbedding(fine.clone(), coarse.clone(), cell_to_mm, record.volume_to_mm, record.shape)


def reading_of(card: Mapping[str, Any], *, source: str, allow_modules: Sequence[str] = ()) -> Reading:
    """Return how a pre-training run read its images, without augmentations.

    The first group of views with its own size gives the reading.

    Raises:
        ValueError: The card does not say how its images are read.
    """
    try:
        view = next(view for view in card["reading"]["views"]["groups"].values() if "size" in view)
        recipes = [dict(recipe) for recipe in view["augment"]]
    except (KeyError, StopIteration, TypeError, AttributeError):
        raise ValueError(f"the card of {source} does not say how its images are read; {_WANTED}") from None
    return Reading.from_card(
        {
            "spacing_mm": view.get("spacing_mm", "native"),
            "crop_voxel": view["size"],
            "outside": view.get("outside", "minimum"),
            "normalise": normalising(recipes, card["reading"], allow_modules=allow_modules),
            "channels": card["reading"].get("channels"),
        },
        allow_modules=allow_modules,
    )


def _maps(
    network: nn.Module, image: Float[Tensor, "one channel x y z"], *, coarse_step: int, tile_voxel: int | None
) -> tuple[Float[Tensor, "e i j k"], Float[Tensor, "e a b c"]]:
    """Return both maps of the whole image, computed tile by tile along z with `tile_voxel`."""
    depth = image.shape[-1]
    if tile_voxel is None or tile_voxel >= depth:
        fine, coarse = network(image)
        return fine[0], coarse[0]
    tile, margin = (-(-n // coarse_step) * coarse_step for n in (tile_voxel, TILE_MARGIN_VOXEL))
    parts = []
    for start in range(0, depth, tile):
        stop = min(start + tile, depth)
        low, high = max(0, start - margin), min(depth, stop + margin)
        maps = network(image[..., low:high])
        steps = [(high - low) // level.shape[-1] for level in maps]
        parts.append(
            [m[0][..., (start - low) // s : (stop - low) // s].clone() for m, s in zip(maps, steps, strict=True)]
        )
    fine, coarse = (torch.cat(levels, dim=-1) for levels in zip(*parts, strict=True))
    return fine, coarse


_WANTED = (
    "matching needs an anatomical embedding, whose two maps hold unit vectors: the encoder.safetensors of a run with "
    "method=sam_embed, or a published SAM checkpoint with weights.layout=sam"
)
