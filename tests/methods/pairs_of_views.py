"""Pairs of views cut out of smooth volumes, with the matrices that say where."""

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
    b, images, matrices, valid = len(volumes), [], [], []
    for source, corners in zip(volumes, starts, strict=True):
        padded = F.pad(source, [n for side in reversed(size) for n in (side, side)])
        inside = F.pad(torch.ones_like(source), [n for side in reversed(size) for n in (side, side)])
        for corner in corners:
            cut = tuple(slice(c + side, c + 2 * side) for c, side in zip(corner, size, strict=True))
            images.append(padded[cut])
            valid.append(inside[cut] > 0)
            matrix = torch.eye(4, dtype=torch.float64)
            matrix[:3, 3] = torch.tensor(corner, dtype=torch.float64)
            matrices.append(matrix)
    shape = torch.tensor([source.shape for source in volumes])[:, None].expand(b, 2, 3)
    case = torch.arange(b)[:, None].expand(b, 2)
    return {
        "pair": View(
            image=torch.stack(images).reshape(b, 2, 1, *size),
            matrix=torch.stack(matrices).reshape(b, 2, 4, 4),
            volume_to_mm=to_mm.expand(b, 2, 4, 4),
            volume_shape=shape,
            case=case,
            group=torch.zeros_like(case),
            location_body=torch.full((b, 2, 3), 0.5, dtype=torch.float64),
            valid=torch.stack(valid).reshape(b, 2, 1, *size),
        )
    }


def global_and_local(*, b=2, p=2, q=3, seed=0, sides=(24, 16)):
    """A batch of smooth pictures; `sides` of the p global and the q local views."""
    generator = torch.Generator().manual_seed(seed)

    def group(count, side):
        coarse = torch.rand(b * count, 1, 5, 5, 5, generator=generator)
        fine = F.interpolate(coarse, size=(side,) * 3, mode="trilinear")
        return view_of(fine.unflatten(0, (b, count)))

    return {"global": group(p, sides[0])} | ({"local": group(q, sides[1])} if q else {})


def view_of(image):
    """A `View` with these images, of the volumes 0, 1, ... themselves."""
    b, v = image.shape[:2]
    eye = torch.eye(4, dtype=torch.float64).expand(b, v, 4, 4)
    case = torch.arange(b)[:, None].expand(b, v)
    shape = torch.tensor(image.shape[3:]).expand(b, v, 3)
    location = torch.full((b, v, 3), 0.5, dtype=torch.float64)
    return View(image, eye, eye, shape, case, torch.zeros_like(case), location)
