"""Volumes as sequences of patch vectors, and back."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

Triple = tuple[int, int, int]


def triple(value: int | Sequence[int]) -> Triple:
    """Return one number per axis: an integer is repeated, a sequence must hold three positive integers.

    Raises:
        ValueError: `value` is neither.
    """
    sides = (value,) * 3 if isinstance(value, int) else tuple(int(side) for side in value)
    if len(sides) != 3 or min(sides) < 1:
        raise ValueError(f"expected one positive integer or three of them, got {value!r}")
    return sides


def axes_of(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number an axis: two numbers as they are, anything else as a `triple`.

    Raises:
        ValueError: `value` is neither.
    """
    return tuple(map(int, value)) if isinstance(value, Sequence) and len(value) == 2 else triple(value)


def patch_grid(size_voxel: Sequence[int], patch_voxel: Sequence[int]) -> Triple:
    """Return the number of patches along each axis.

    Raises:
        ValueError: A side is not a positive multiple of the patch side.
    """
    size, patch = triple(size_voxel), triple(patch_voxel)
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise ValueError(
            f"an image of {size} voxels cannot be cut into patches of {patch}; use sides that are multiples of the "
            f"patch, for instance {tuple(-(-side // step) * step for side, step in zip(size, patch, strict=True))}"
        )
    return triple([side // step for side, step in zip(size, patch, strict=True)])


def patchify(
    image: Float[Tensor, "batch channel x y z"], patch_voxel: int | Sequence[int]
) -> Float[Tensor, "batch token voxel"]:
    """Return patch vectors; tokens and voxels run with the last axis fastest, channels fastest of all.

    Token `(i * grid[1] + j) * grid[2] + k` is patch `(i, j, k)`; inside it voxel `(u, v, w)` of channel `c` has index
    `((u * patch[1] + v) * patch[2] + w) * channels + c`.

    Raises:
        ValueError: A side is not a multiple of the patch side.
    """
    a, b, c = triple(patch_voxel)
    grid = patch_grid(image.shape[2:], (a, b, c))
    cut = image.unflatten(4, (grid[2], c)).unflatten(3, (grid[1], b)).unflatten(2, (grid[0], a))
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def unpatchify(
    patches: Float[Tensor, "batch token voxel"], grid: Sequence[int], *, patch_voxel: int | Sequence[int]
) -> Float[Tensor, "batch channel x y z"]:
    """Return the volume that `patchify` cuts into `patches`; the number of channels follows from the vector length."""
    patch = triple(patch_voxel)
    volume = patches.unflatten(2, (*patch, -1)).unflatten(1, triple(grid))  # (batch, *grid, *patch, channel)
    return volume.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
