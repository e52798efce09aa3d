"""A network in place of a trained embedding: differences of grey values around a place, without training."""

import torch
import torch.nn.functional as F
from torch import nn

FINE, COARSE = (2, 2, 2), (16, 16, 4)


class FixedFeatures(nn.Module):
    """Unit vectors of cells: differences between the means of cells at fixed random offsets, fine and coarse."""

    def __init__(self, *, dim: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.in_channels, self.channels, self.strides = 1, (dim, dim), (FINE, COARSE)
        generator = torch.Generator().manual_seed(seed)
        self.offsets = [torch.randint(-reach, reach + 1, (dim, 2, 3), generator=generator) for reach in (4, 1)]

    def forward(self, image, coordinate=None):
        maps = []
        for cell, offsets, reach in zip((FINE, COARSE), self.offsets, (4, 1), strict=True):
            means = F.avg_pool3d(image, cell)
            padded = F.pad(means, (reach,) * 6, mode="replicate")[0, 0]
            x, y, z = means.shape[2:]
            seen = [[padded[a : a + x, b : b + y, c : c + z] for a, b, c in pair + reach] for pair in offsets]
            channels = torch.stack([first - second for first, second in seen]) + 1e-3
            maps.append(F.normalize(channels[None], dim=1))
        return maps
