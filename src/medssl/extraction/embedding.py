"""The embedding of a volume, and the matching of points by nearest neighbours among the unit vectors of two of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from medssl.data.geometry import apply
from medssl.data.store import Record

SIMILARITIES = 2**23
"""Number of similarities held at once while a volume is searched: 32 MB."""


@dataclass(frozen=True, eq=False)
class VolumeEmbedding:
    """The vectors of a volume: a fine map of small cells and a coarse one of their surroundings, axes x, y, z.

    Args:
        fine: Unit vectors (over the channels) of the cells.
        coarse: Unit vectors of larger cells that cover the same box.
        cell_to_mm: Index of a fine cell -> RAS mm of its middle.
        volume_to_mm: Voxel of the volume -> RAS mm.
        volume_shape: Voxels of the volume.
    """

    fine: Float[Tensor, "e i j k"]
    coarse: Float[Tensor, "e a b c"]
    cell_to_mm: Float64[np.ndarray, "4 4"]
    volume_to_mm: Float64[np.ndarray, "4 4"]
    volume_shape: tuple[int, int, int]

    def half(self) -> "VolumeEmbedding":
        """Return the embedding in half precision; scores change by about 0.001."""
        return VolumeEmbedding(
            self.fine.half(), self.coarse.half(), self.cell_to_mm, self.volume_to_mm, self.volume_shape
        )

    def cells(self, points_mm: Float[np.ndarray, "n 3"]) -> Int64[np.ndarray, "n 3"]:
        """Return the cell whose middle is nearest to each point, among those with their middle in the volume."""
        nearest = np.rint(apply(np.linalg.inv(self.cell_to_mm), points_mm)).astype(np.int64)
        first, last = self._inside
        return np.clip(nearest, first, last - 1)

    def descriptors(self, cells: Int64[np.ndarray, "n 3"]) -> Float32[Tensor, "n two e"]:
        """Return the fine and the coarse unit vector of each cell; the coarse map is interpolated linearly."""
        i, j, k = (torch.from_numpy(np.ascontiguousarray(column)) for column in cells.T)
        fine = self.fine[:, i.to(self.fine.device), j.to(self.fine.device), k.to(self.fine.device)].T.float()
        x, y, z = (weight[index.to(weight.device)] for weight, index in zip(self._weights, (i, j, k), strict=True))
        coarse = torch.einsum("eabc,na,nb,nc->ne", self.coarse.float(), x, y, z)
        return torch.stack([F.normalize(fine, dim=1), F.normalize(coarse, dim=1)], dim=1)

    def search(
        self, descriptors: Float[Tensor, "n two e"]
    ) -> tuple[Int64[np.ndarray, "n 3"], Float32[np.ndarray, " n"]]:
        """Return the most similar cell of each pair of vectors, and its score in [-1, 1]; the first of equal ones.

        The score is the mean of the cosines of the fine and of the interpolated coarse vectors. Only cells with their
        middle in the volume are searched. Interpolation is linear: similarities to coarse cells are interpolated and
        divided by the length of the interpolated vector, which is what interpolating the vectors first gives.

        Source: arXiv:2012.02383, section III-C; repository alibaba-damo-academy/alice, interfaces.py.
        """
        fine, coarse = descriptors.to(self.fine.device, torch.float32).unbind(1)
        first, last = self._inside
        to_coarse = torch.einsum("ne,eabc->nabc", coarse, self.coarse.float())
        x, y, z = (w[a:b] for w, a, b in zip(self._weights, first, last, strict=True))
        num_cells = (last - first)[1:].prod()
        best = torch.full((len(fine),), -torch.inf, device=fine.device)
        place = torch.zeros(len(fine), dtype=torch.int64, device=fine.device)
        for start, stop in _slabs(len(x), max(1, SIMILARITIES // int(len(fine) * num_cells))):
            slab = self.fine[:, first[0] + start : first[0] + stop, first[1] : last[1], first[2] : last[2]].float()
            similar = torch.einsum("ne,eijk->nijk", fine, slab)
            surroundings = torch.einsum("nabc,ia,jb,kc->nijk", to_coarse, x[start:stop], y, z)
            similar += surroundings / self._coarse_norm[start:stop]
            value, index = similar.flatten(1).max(1)
            place = torch.where(value > best, index + start * num_cells, place)
            best = torch.maximum(value, best)
        cells = np.stack(np.unravel_index(place.cpu().numpy(), tuple(last - first)), axis=1)
        return (cells + first).astype(np.int64), (best / 2).cpu().numpy()

    def to_mm(self, cells: Int64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3"]:
        """Return the middles of cells, moved into the volume where they lie beyond the middle of its outer voxels."""
        points = apply(np.linalg.inv(self.volume_to_mm), apply(self.cell_to_mm, cells))
        return apply(self.volume_to_mm, np.clip(points, 0, np.array(self.volume_shape) - 1))

    @cached_property
    def _inside(self) -> tuple[Int64[np.ndarray, "3"], Int64[np.ndarray, "3"]]:
        """Return, per axis, the first and one-past-last cell with the middle in the volume; the grids share axes."""
        to_voxel = np.linalg.inv(self.volume_to_mm) @ self.cell_to_mm
        step, start = to_voxel.diagonal()[:3], to_voxel[:3, 3]
        shape = np.array(self.fine.shape[1:])
        first = np.clip(np.ceil((-0.5 - start) / step - 1e-6), 0, shape - 1).astype(np.int64)
        last = np.floor((np.array(self.volume_shape) - 0.5 - start) / step + 1e-6).astype(np.int64) + 1
        return first, np.clip(last, first + 1, shape)

    @cached_property
    def _weights(self) -> tuple[Float32[Tensor, "cell coarse"], ...]:
        """The share of each coarse cell in a fine one, for each axis: linear, and that of the edge beyond the edge."""
        device = self.coarse.device
        return tuple(
            F.interpolate(torch.eye(m, device=device)[None], n, mode="linear", align_corners=False)[0].T
            for m, n in zip(self.coarse.shape[1:], self.fine.shape[1:], strict=True)
        )

    @cached_property
    def _coarse_norm(self) -> Float32[Tensor, "i j k"]:
        """The lengths of the interpolated coarse vectors of the cells in the volume."""
        x, y, z = (w[a:b] for w, a, b in zip(self._weights, *self._inside, strict=True))
        coarse = torch.einsum("eabc,jb,kc->eajk", self.coarse.float(), y, z)
        slabs = _slabs(len(x), max(1, SIMILARITIES // coarse[:, 0].numel()))
        norms = [torch.einsum("eajk,ia->eijk", coarse, x[a:b]).norm(dim=0) for a, b in slabs]
        return torch.cat(norms).clamp_min(1e-12)


def match_points(
    query: VolumeEmbedding, points_mm: Float[np.ndarray, "n 3"], key: VolumeEmbedding
) -> tuple[Float64[np.ndarray, "n 3"], Float32[np.ndarray, " n"]]:
    """Return the places of points of one volume in another (both RAS mm), and their similarity, in [-1, 1].

    A place is the middle of a cell of the other volume. Scores of different networks cannot be compared.
    """
    cells, scores = key.search(query.descriptors(query.cells(points_mm)))
    return key.to_mm(cells), scores


def contains(record: Record, points_mm: Float[np.ndarray, "n 3"]) -> np.ndarray:
    """Return whether points lie in the volume of a record, up to the outer faces of its voxels."""
    voxel = apply(record.mm_to_volume, points_mm)
    return np.all((voxel >= -0.5) & (voxel <= np.array(record.shape) - 0.5), axis=1)


def _slabs(total: int, height: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + height, total)) for start in range(0, total, height))
