"""Views of smooth volumes, with the matrices that say where, and the pictures that methods draw of them."""

import torch
import torch.nn.functional as F

from medssl.data.views import View


def volume(seed=0, size=(72, 72, 40), wave=3):
    """Smooth noise on the scale of the embeddings' images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *(side // wave for side in size), generator=generator)
    return 255 * F.interpolate(coarse, size=size, mode="trilinear")[0, 0] - 50


def pair_of(volumes, starts, *, size=(32, 32, 16), to_mm=None):
    """The view group of two crops a volume, `starts` (volume, 2, 3) their lowest voxels; 0 lies outside."""
    to_mm = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)) if to_mm is None else to_mm
    images = []
    for source, corners in zip(volumes, starts, strict=True):
        padded = F.pad(source, [n for side in reversed(size) for n in (side, side)])
        for corner in corners:
            images.append(padded[tuple(slice(c + side, c + 2 * side) for c, side in zip(corner, size, strict=True))])
    image = torch.stack(images).reshape(len(volumes), 2, 1, *size)
    shapes = [[source.shape] for source in volumes]
    return {"pair": View.of(image, corner_voxel=starts, volume_shape=shapes, volume_to_mm=to_mm)}


def global_and_local(*, b=2, p=2, q=3, seed=0, sides=(24, 16)):
    """A batch of smooth pictures; `sides` of the p global and the q local views."""
    generator = torch.Generator().manual_seed(seed)

    def group(count, side):
        coarse = torch.rand(b * count, 1, 5, 5, 5, generator=generator)
        fine = F.interpolate(coarse, size=(side,) * 3, mode="trilinear")
        return View.of(fine.unflatten(0, (b, count)))

    return {"global": group(p, sides[0])} | ({"local": group(q, sides[1])} if q else {})


def figures_of(method, batch, progress):
    """The pictures that a step draws."""
    return method.figures(batch, method.extras(batch, progress), progress)
