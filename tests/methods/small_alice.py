"""A small Alice on convolutions, and pairs of crops for it."""

import torch
import torch.nn.functional as F
from torch import nn

from medssl.data.views import View
from medssl.methods.alice import Alice
from medssl.models.alice_backbones import Backbone
from medssl.models.alice_head import AliceHead
from medssl.models.cafa import CAFA

TERMS = ("inter_volume", "intra_volume", "reconstruction")
CHOICES = [{}, {"cafa_ema": True}, {"teacher_tokens": "encoder"}, {"teacher_shared_head": False}]
CHOICES += [{"mask_shape": "cube"}, {"mask_per_sample": False}, {"teacher_drop_path": True}, {"mask_ratio": 0.0}]
CHOICES += [{"cafa_ema": True, "teacher_tokens": "encoder", "teacher_shared_head": False}]


class Encoder(nn.Module):
    """Maps of strides 4 and 8."""

    channels, strides, in_channels = (8, 12), (4, 8), 1

    def __init__(self, dropout):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv3d(1, 8, 4, stride=4), nn.GELU(), nn.Dropout3d(dropout))
        self.coarse = nn.Conv3d(8, 12, 2, stride=2)

    def forward(self, image):
        """Fine to coarse."""
        fine = self.fine(image)
        return [fine, self.coarse(fine)]


class Decoder(nn.Module):
    """One map of stride 4."""

    channels, strides = (6,), (4,)

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(12, 6, 2, stride=2)

    def forward(self, image, maps):
        """A list of the one."""
        return [self.up(maps[-1])]


def make_alice(*, dropout=0.0, cafa_dropout=0.0, **options):
    """Make a small Alice: 8 bottleneck and 64 decoder tokens for crops of 16 voxels; keywords go to the method."""
    torch.manual_seed(0)
    widths = {"bottleneck_channels": 12, "decoded_channels": 6, "hidden_dim": 20, "bottleneck_dim": 8}
    head = AliceHead(**widths, num_prototypes=16, init_std=0.3)
    cafa = CAFA(dim=16, hidden_dim=24, num_heads=2, head_dim=6, dropout=cafa_dropout)
    options = {"mask_patch_voxel": 4, "freeze_last_layer_epochs": 0, **options}
    return Alice(backbone=Backbone(Encoder(dropout), Decoder()), head=head, cafa=cafa, **options)


def pair_of_contrasts(*, b=2, seed=0, noise=0.1):
    """Make a batch of smooth pictures; the key is the query in another contrast, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(b, 1, 5, 5, 5, generator=generator)
    query = F.interpolate(coarse, size=(16, 16, 16), mode="trilinear")
    key = 0.8 * query + noise * torch.rand(query.shape, generator=generator)
    return {"pair": View.of(torch.stack([query, key], dim=1))}
