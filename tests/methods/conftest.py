"""Small views and a small GL-MAE whose every mechanism is alive."""

import sys
from pathlib import Path

import pytest
import torch

from medssl.data.views import View
from medssl.methods.glmae import GLMAE
from medssl.models.heads import ProjectionHead
from medssl.models.vit import MaskedDecoder, VisionTransformer

sys.path.append(str(Path(__file__).parent))  # test files share pairs_of_views.py


def view_of(image):
    """A `View` with these images, of the volumes 0, 1, ... themselves."""
    b, v = image.shape[:2]
    eye = torch.eye(4, dtype=torch.float64).expand(b, v, 4, 4)
    case = torch.arange(b)[:, None].expand(b, v)
    shape = torch.tensor(image.shape[3:]).expand(b, v, 3)
    location = torch.full((b, v, 3), 0.5, dtype=torch.float64)
    return View(image, eye, eye, shape, case, torch.zeros_like(case), location)


@pytest.fixture
def views():
    """Makes a batch of smooth pictures; `sides` of the p global and the q local views."""

    def make(*, b=2, p=2, q=3, seed=0, sides=(24, 16)):
        generator = torch.Generator().manual_seed(seed)

        def group(count, side):
            coarse = torch.rand(b * count, 1, 5, 5, 5, generator=generator)
            fine = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear")
            return view_of(fine.unflatten(0, (b, count)))

        return {"global": group(p, sides[0])} | ({"local": group(q, sides[1])} if q else {})

    return make


@pytest.fixture
def glmae():
    """Makes a GL-MAE with patch 4, 216 and 64 tokens; keywords go to the method."""

    def make(*, dropout=0.0, **options):
        torch.manual_seed(0)
        home = {"size_voxel": 24, "patch_voxel": 4}
        encoder = VisionTransformer(**home, dim=24, depth=2, num_heads=4, dropout=dropout)
        decoder = MaskedDecoder(**home, encoder_dim=24, dim=12, depth=1, num_heads=3)
        head = ProjectionHead(in_dim=24, hidden_dim=32, bottleneck_dim=8, num_prototypes=16, init_std=0.1)
        return GLMAE(encoder=encoder, decoder=decoder, head=head, **options)

    return make
