"""The network of contrastive methods: means of an encoder's maps, and a projector."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medssl.checks import choice, whole
from medssl.ops.patches import axes_of

MAPS = ("every", "last")
NORMS = ("layer", "batch")


class PooledProjector(nn.Module):
    """The global mean of an encoder's maps, concatenated, and a projector of three linear layers.

    Maps on one grid are the states of a transformer, of which only the last is pooled: the mean over all tokens. A norm
    without weights and a ReLU follow the first two linear layers.

    Args:
        encoder_channels: Channels of the encoder's maps.
        encoder_strides: Strides of the encoder's maps, in voxels.
        hidden_dim: Width of the first two layers.
        out_dim: Width of the result.
        norm: `layer` over the channels of each row, or `batch` over the rows of this process, also in evaluation.
        maps: Whether `every` map of the encoder is pooled, or the `last`.

    Raises:
        ValueError: A width is no whole number from 1 up, or a choice does not exist.

    Source: arXiv:2002.05709; arXiv:2402.17300.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        encoder_strides: Sequence[int | Sequence[int]],
        *,
        hidden_dim: int = 2048,
        out_dim: int = 2048,
        norm: str = "layer",
        maps: str = "every",
    ) -> None:
        super().__init__()
        choice("method.projector.norm", norm, NORMS)
        choice("method.projector.maps", maps, MAPS)
        whole("method.projector.hidden_dim", hidden_dim, least=1)
        whole("method.projector.out_dim", out_dim, least=1)
        is_one_grid = len({axes_of(stride) for stride in encoder_strides}) == 1
        self.num_maps = 1 if is_one_grid or maps == "last" else len(encoder_channels)
        self.in_dim, self.out_dim = sum(encoder_channels[-self.num_maps :]), out_dim
        self.mlp = nn.Sequential(
            nn.Linear(self.in_dim, hidden_dim),
            RowNorm() if norm == "layer" else BatchStandardise(),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            RowNorm() if norm == "layer" else BatchStandardise(),
            nn.ReLU(),
            nn.Linear(hidden_dim, out_dim),
        )

    def forward(self, maps: Sequence[Float[Tensor, "row _ _ _ _"]]) -> Float[Tensor, "row out"]:
        """Return vectors that are not normalised."""
        return self.mlp(self.pooled(maps))

    def pooled(self, maps: Sequence[Float[Tensor, "row _ _ _ _"]]) -> Float[Tensor, "row in"]:
        """Return the means that the projector reads, finest map first."""
        return torch.cat([level.flatten(2).mean(2) for level in maps[-self.num_maps :]], dim=1)


class RowNorm(nn.Module):
    """Layer norm over the channels of each row, without weights."""

    def forward(self, rows: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        """Return rows of mean 0 and variance 1."""
        return F.layer_norm(rows, rows.shape[1:])


class BatchStandardise(nn.Module):
    """Batch norm without weights and without running statistics."""

    def forward(self, rows: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        """Return columns of mean 0 and variance 1.

        Raises:
            ValueError: There is a single row, which batch statistics would turn to zero.
        """
        if len(rows) < 2:
            raise ValueError("batch norm needs at least 2 rows in each process; raise batch_size or take norm=layer")
        return F.batch_norm(rows, None, None, training=True)
