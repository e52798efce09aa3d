"""A small network of each form of MAE, and crops for it: 64 blocks of 4 voxels in 16."""

import torch
import torch.nn.functional as F

from medssl.data.views import View
from medssl.methods.mae import MAE
from medssl.models.unet import UNetEncoder
from medssl.models.vit import MaskedDecoder, VisionTransformer
from medssl.ops.masking import random_mask

FORMS = ("cnn", "vit", "simmim")
HOME = {"size_voxel": 16, "patch_voxel": 4}


def make_mae(form="cnn", *, in_channels=1, mask=None, drop_path=0.0, **options):
    """The method; `mask` (row, block), true where hidden, replaces what is drawn."""
    torch.manual_seed(0)
    decoder = None
    if form == "cnn":
        encoder = UNetEncoder(in_channels=in_channels, widths=(4, 8))
    else:
        width = {"in_channels": in_channels, "dim": 24, "depth": 2, "num_heads": 4, "drop_path": drop_path}
        encoder = VisionTransformer(**HOME, **width, class_token=form == "vit", mask_token=form == "simmim")
    if form == "vit":
        decoder = MaskedDecoder(**HOME, encoder_dim=24, dim=12, depth=1, num_heads=3, out_channels=in_channels)
    method = MAE(encoder=encoder, decoder=decoder, form=form, **{"block_voxel": 4, **options})
    if mask is not None:
        method._mask = lambda image, progress: given(mask)
    return method


def given(masked):
    """The mask that hides these blocks, an equal number in each row."""
    return random_mask(masked.float(), ratio=masked[0].float().mean().item())


def crops(*, b=2, v=1, channels=1, side=16, seed=0, **fields):
    """A batch of smooth pictures of about mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(b * v, channels, side // 4, side // 4, side // 4, generator=generator)
    fine = F.interpolate(coarse, size=(side,) * 3, mode="trilinear")
    return {"crop": View.of((5 * (fine - 0.5)).unflatten(0, (b, v)), **fields)}
