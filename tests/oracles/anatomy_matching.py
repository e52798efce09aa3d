"""Matching a point by the index arithmetic of the official code, cell by cell, in plain loops."""

import math

import numpy as np


def upsampled(coarse, shape):
    """A map (e a b c) at `shape`, trilinear between the middles of its cells, every vector of length 1 again."""
    result = np.zeros((coarse.shape[0], *shape))
    for place in np.ndindex(*shape):
        corners = []
        for position, num, num_coarse in zip(place, shape, coarse.shape[1:], strict=True):
            at = min(max((position + 0.5) * num_coarse / num - 0.5, 0.0), num_coarse - 1.0)
            low = min(math.floor(at), num_coarse - 1)
            corners.append(((low, 1 - (at - low)), (min(low + 1, num_coarse - 1), at - low)))
        total = np.zeros(coarse.shape[0])
        for i, weight_i in corners[0]:
            for j, weight_j in corners[1]:
                for k, weight_k in corners[2]:
                    total += weight_i * weight_j * weight_k * coarse[:, i, j, k]
        result[(slice(None), *place)] = total / np.linalg.norm(total)
    return result


def find_point(query, key, point_voxel, *, query_spacing_mm, key_spacing_mm, key_shape):
    """The voxel of the key volume that matches a voxel of the query volume, its cell, and the score.

    `query` and `key` are pairs (fine, coarse); all triples follow the axes of the maps. Embeddings are of 2 mm voxels,
    two of which make a cell.
    """
    query_coarse, key_coarse = (upsampled(coarse, fine.shape[1:]) for fine, coarse in (query, key))
    cell = tuple(math.floor(p * s / 2 / 2) for p, s in zip(point_voxel, query_spacing_mm, strict=True))
    fine_vector, coarse_vector = query[0][(slice(None), *cell)], query_coarse[(slice(None), *cell)]
    best, found = -math.inf, None
    for place in np.ndindex(*key[0].shape[1:]):
        at = (slice(None), *place)
        score = (fine_vector @ key[0][at] + coarse_vector @ key_coarse[at]) / 2
        if score > best:
            best, found = score, place
    voxel = [math.trunc((2 * u + 0.5) / (s / 2)) for u, s in zip(found, key_spacing_mm, strict=True)]
    return tuple(min(v, n - 1) for v, n in zip(voxel, key_shape, strict=True)), found, best
