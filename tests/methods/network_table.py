"""Every method on every network: small settings of each, a batch of each method, and the table of docs/networks.md."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from medssl.data.views import View

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
CHANNELS = 2


@dataclass(frozen=True)
class Network:
    """A preset of configs/model, made small, and the smallest crop that it takes."""

    settings: Mapping[str, object]
    size: tuple[int, int, int] = (16, 16, 16)


@dataclass(frozen=True)
class Row:
    """A row of the table: a method.

    Args:
        config: the configuration that is tried.
        batch: a batch of crops of a size.
        group: the view group whose size the crops have.
        settings: what makes the method small.
        own: the size of the crops where the method has a network of its own.
        factor: crops are so many times as large as the smallest one of the network.
        flat: crops are slices.
    """

    config: str
    batch: Callable[[tuple[int, int, int]], dict[str, View]]
    group: str
    settings: Mapping[str, object] = field(default_factory=dict)
    own: tuple[int, int, int] | None = None
    factor: int = 1
    flat: bool = False


STAGES = {"widths": [2, 4, 4], "strides": [1, 2, 2]}
LEVELS_OF_POINTS = {"base_channels": 2, "dim": 12, "num_heads": 2, "num_layers": 1, "hidden": 2}
LEVELS = {"base_channels": 2, "num_levels": 2}
NETWORKS = {
    "unet": Network(STAGES),
    "resenc": Network({**STAGES, "blocks": [1, 1, 1]}),
    "resenc_l": Network({"widths": [2, 2, 2, 2, 4, 4], "blocks": [1] * 6}, (32, 32, 64)),
    "swinunetr": Network({"feature_size": 6, "depths": [1] * 4, "num_heads": [1] * 4, "window_voxel": 2}, (32, 32, 32)),
    "unetr": Network({"patch_voxel": [8, 8, 8], "dim": 12, "depth": 4, "num_heads": 2}),
    "nnformer": Network({"size_voxel": 16, "feature_size": 12, "num_heads": [1, 2, 4, 8], "depths": [1] * 4}),
    "macl_unet": Network(LEVELS),
    "attention_unet": Network(LEVELS),
    "kaf": Network({**LEVELS_OF_POINTS, "max_points": 16, "position_widths": [8]}, (32, 32, 32)),
}
DECODERS = {"unetr": {"feature_size": 4}, "nnformer": {"num_heads": [1, 2, 4], "depths": [1] * 3}}


def images(*shape):
    """Smooth grey values in [0, 1], equal along the leading axes but for some noise."""
    size, generator = shape[-3:], torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, *(max(1, side // 4) for side in size), generator=generator)
    return 0.7 * F.interpolate(coarse, size=size, mode="trilinear")[0, 0] + 0.3 * torch.rand(shape, generator=generator)


def views(**counts):
    """Makes batches of two samples with so many views in each group."""
    return lambda size: {name: View.of(images(2, count, CHANNELS, *size)) for name, count in counts.items()}


def local_and_global(size):
    """The batch of GL-MAE."""
    half = [side // 2 for side in size]
    return {"global": View.of(images(2, 2, CHANNELS, *size)), "local": View.of(images(2, 1, CHANNELS, *half))}


def cells(size):
    """Two cells of a field and a crop across them."""
    x, y, z = size
    place = {"volume_shape": [2 * x, y, z]}
    return {
        "base": View.of(images(2, 2, CHANNELS, *size), corner_voxel=[[[0, 0, 0], [x, 0, 0]]], **place),
        "target": View.of(images(2, 1, CHANNELS, *size), corner_voxel=[[[x // 4, 0, 0]]], **place),
    }


def still_and_moved(size):
    """Two crops of one place."""
    still = images(2, CHANNELS, *size)
    return {
        "still": View.of(still, corner_voxel=[0, 0, 0], volume_shape=[2 * side for side in size]),
        "moved": View.of(torch.stack([still.flip(2), still.sqrt()], dim=1)),
    }


def shifted(size):
    """Two views of each of two volumes, a voxel apart in the plane."""
    x, y, z = size
    wide = images(2, CHANNELS, x + 1, y + 1, z)
    return {
        "first": View.of(wide[..., :x, :y, :], corner_voxel=[0, 0, 0], volume_shape=[x + 1, y + 1, z]),
        "second": View.of(wide[..., 1:, 1:, :], corner_voxel=[1, 1, 0], volume_shape=[x + 1, y + 1, z]),
    }


def located(size):
    """Two views at a place of the body, and its neighbours."""
    anchor, near = torch.zeros(4, 2, dtype=torch.long), torch.tensor([[1, 2]]).expand(4, 2)
    return {
        name: View.of(
            images(4, 2, CHANNELS, *size), location_index=index, coordinate=(index[..., None] - 1.0).expand(4, 2, 3)
        )
        for name, index in (("anchor", anchor), ("neighbours", near))
    }


def one_volume(size):
    """Two crops of a volume that overlap, for the embedding."""
    corners = torch.tensor([[[0, 0, 0], [4, 4, 2]]]).expand(2, 2, 3)
    return {"pair": View.of(100 * images(2, 2, CHANNELS, *size), corner_voxel=corners, volume_shape=[64, 64, 32])}


PROJECTOR = {"method.projector.hidden_dim": 8, "method.projector.out_dim": 8}
HEADS = {"method.head.hidden_dim": 8, "method.head.bottleneck_dim": 8, "method.head.num_prototypes": 16}
CAFA = {"method.cafa.hidden_dim": 8, "method.cafa.num_heads": 2, "method.cafa.head_dim": 4}
VIT = {"method.encoder.dim": 12, "method.encoder.depth": 2, "method.encoder.num_heads": 2}
MAE_DECODER = {"method.decoder.dim": 12, "method.decoder.depth": 1, "method.decoder.num_heads": 2}
KAF = {
    "method.heads.embed_dim": 8,
    "method.points.min_points": 0,
    "method.transport_iterations": 5,
    "views.groups.first.points": None,
}
METHODS = {
    "mae": Row("mae_tiny", views(crop=1), "crop"),
    "mae_vit": Row("mae_vit_tiny", views(crop=1), "crop", {**VIT, **MAE_DECODER}, own=(16, 16, 16)),
    "simmim": Row("simmim_tiny", views(crop=1), "crop", VIT, own=(16, 16, 16)),
    "models_genesis": Row("models_genesis_tiny", views(crop=1), "crop", {"method.num_windows": 20}),
    "simclr": Row("simclr_tiny", views(first=1, second=1), "first", PROJECTOR),
    "voco": Row("voco_tiny", cells, "base", PROJECTOR),
    "glmae": Row("glmae_tiny", local_and_global, "global", {**VIT, **MAE_DECODER, **HEADS}, own=(32, 32, 32)),
    "alice": Row("alice_tiny", views(pair=2), "pair", {**HEADS, **CAFA}),
    "drasclr": Row("drasclr_tiny", located, "anchor", {"method.encoder.num_experts": 2}, own=(16, 16, 16)),
    "sam_embed": Row("sam_embed_tiny", one_volume, "pair", {"method.encoder.net.base_channels": 2}, own=(48, 48, 16)),
    "kaf": Row("kaf_tiny", shifted, "first", {**KAF, "method.points.match": "geometric"}),
    "kaf_2d": Row("kaf_2d", shifted, "first", KAF, flat=True),
    "macl": Row("macl_tiny", still_and_moved, "still", {"method.heads.hidden_dim": 8}, factor=2),
    "macl_2d": Row("macl_2d", still_and_moved, "still", {"method.heads.hidden_dim": 8}, factor=4, flat=True),
}
REASONS = {
    "keypoints": "reads keypoints beside the image",
    "tokens": "has no tokens of keypoints",
    "slices": "takes no slices",
    "own": "reads no model= here",
}
"""What the words of the table stand for in the message of a refusal."""


def table():
    """The cells of the page by method and column; the first column is what trains without `model=`."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    names, *rows = [[cell.replace("`", "").strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], name): cell for row in rows for name, cell in zip(names[1:], row[1:], strict=True)}


def size_of(method, network):
    """The size of the crops of a cell."""
    row = METHODS[method]
    if row.own:
        return row.own
    x, y, z = (row.factor * side for side in NETWORKS[network].size)
    return (x, y, 1) if row.flat else (x, y, z)


def settings_of(method, network):
    """The settings that make a cell small, but for those of the network, which may be left out for its own."""
    size = list(size_of(method, network))
    sizes = {f"views.groups.{METHODS[method].group}.size": size}
    if method == "voco":
        sizes |= {"views.groups.base.grid": [2, 1, 1], "views.groups.base.extent_voxel": [2 * size[0], *size[1:]]}
    if method == "glmae":
        sizes |= {"views.groups.local.size": [side // 2 for side in size]}
    return {**sizes, **METHODS[method].settings}


def network_settings(network):
    """The settings that make a network small."""
    decoder = {f"model.decoder.{key}": value for key, value in DECODERS.get(network, {}).items()}
    return {f"model.encoder.{key}": value for key, value in NETWORKS[network].settings.items()} | decoder


def words(settings):
    """Settings as on a command line."""
    return [f"{key}={'null' if value is None else str(value).replace(' ', '')}" for key, value in settings.items()]
