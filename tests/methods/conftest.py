"""Small views, and a small GL-MAE and Alice whose every mechanism is alive."""

import sys
from pathlib import Path

import pytest
import torch

from medssl.methods.glmae import GLMAE
from medssl.models.heads import ProjectionHead
from medssl.models.vit import MaskedDecoder, VisionTransformer

sys.path.append(str(Path(__file__).parent))  # test files share pairs_of_views.py

from pairs_of_views import global_and_local
from small_alice import make_alice, pair_of_contrasts


@pytest.fixture
def views():
    """Makes a batch of smooth pictures; `sides` of the p global and the q local views."""
    return global_and_local


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


@pytest.fixture
def alice():
    """Makes a small Alice: 8 bottleneck and 64 decoder tokens for crops of 16 voxels; keywords go to the method."""
    return make_alice


@pytest.fixture
def pairs():
    """Makes a batch of smooth pictures; the key is the query in another contrast, with some noise."""
    return pair_of_contrasts
