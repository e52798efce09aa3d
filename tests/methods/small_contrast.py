"""Crops of smooth noise for the contrastive methods, and networks that pass given vectors through."""

import torch
from pairs_of_views import volume
from torch import nn

from medssl.data.views import View
from medssl.models.pooled import PooledProjector


class GivenMaps(nn.Module):
    """An encoder whose only map is the image."""

    channels, strides = (8,), (1,)

    def forward(self, image):
        return [image]


def given_projector():
    """A projector that only takes the mean of the map."""
    projector = PooledProjector((8,), (1,), hidden_dim=1, out_dim=1)
    projector.mlp = nn.Identity()
    return projector


def given_views(vectors):
    """Vectors (b, v, 8) as views of a single voxel whose channels they are."""
    return View.of(vectors[..., None, None, None])


def cut(corners, side, *, size=(48, 48, 48), channels=1, seed=0):
    """Crops (b, v, 3 first voxels) of smooth volumes, one a sample, as views that know their place."""
    images = []
    for number, sample in enumerate(corners.tolist()):
        whole = torch.stack([volume(seed=97 * seed + 7 * number + c, size=size) for c in range(channels)])
        whole = (whole - whole.mean()) / whole.std()
        images += [whole[:, x : x + side, y : y + side, z : z + side] for x, y, z in sample]
    image = torch.stack(images).unflatten(0, corners.shape[:2])
    return View.of(image, corner_voxel=corners, volume_shape=list(size))


def pairs_of_crops(*, b=3, k=2, side=16, channels=1, seed=0):
    """The batch of SimCLR: `k` pairs of crops of `b` volumes; partners lie up to half a side apart."""
    generator, free = torch.Generator().manual_seed(seed), max(48 - side, 9)
    options = {"size": (free + side - 1,) * 3, "channels": channels, "seed": seed}
    corners = torch.randint(0, free, (b, k, 3), generator=generator)
    moved = corners + torch.randint(-side // 2, side // 2 + 1, (b, k, 3), generator=generator)
    second = cut(moved.clamp(0, free - 1), side, **options)
    second.image = second.image.flip(3) * 1.1
    return {"first": cut(corners, side, **options), "second": second}


def cells_and_targets(*, b=2, t=4, side=16, grid=(3, 3, 3), channels=1, seed=0):
    """The batch of VoCo: all cells of `b` volumes, and `t` crops of a cell's size."""
    size = tuple(side * n for n in grid)
    corners = torch.cartesian_prod(*[torch.arange(0, n, side) for n in size]).expand(b, -1, 3)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.stack([torch.randint(0, n - side + 1, (b, t), generator=generator) for n in size], dim=-1)
    options = {"size": size, "channels": channels, "seed": seed}
    return {"base": cut(corners, side, **options), "target": cut(targets, side, **options)}
