"""Deformations of crops that a network learns to undo: local shuffling, intensity maps, in- and out-painting.

All draws are arguments, so that every function is pure. All channels of a crop are deformed alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from medssl.ops.patches import triple

LEAST_SIDE = 16
"""Smallest side of a crop, in voxels; below 14 some ranges of windows are empty."""
PAINT_MARGIN = 3
"""Distance of painted windows from the faces of the crop, in voxels."""
MOST_PAINTED = 5
"""Largest number of painted windows of a crop."""
NUM_NODES = 1001
"""Points of a curve between which intensities are interpolated."""


class Windows(NamedTuple):
    """Boxes of voxels in each crop: their lowest voxel and their sides; a box with a side of 0 is empty."""

    start: Int64[Tensor, "batch window 3"]
    side: Int64[Tensor, "batch window 3"]

    def volume(self) -> Int64[Tensor, "batch window"]:
        """Return the number of voxels of each box."""
        return self.side.prod(2)

    def without(self, empty: Bool[Tensor, "batch _"]) -> "Windows":
        """Return the same boxes, those at `empty` without voxels."""
        return Windows(self.start, self.side.masked_fill(empty[..., None], 0))


class Deformation(NamedTuple):
    """The draws of one deformation of each crop.

    Args:
        shuffled: Windows of the shuffle, in the order in which they are written; empty ones where nothing is shuffled.
        keys: Order of the voxels of each window, see `shuffle_in_windows`.
        controls: Coordinates of the inner control points of the intensity curve.
        increasing: Whether the curve keeps the order of intensities.
        mapped: Whether intensities are mapped.
        painted: Windows of the painting.
        inside: Whether the windows are painted (in-painting), or everything else is (out-painting).
        noise: Values that are painted.
    """

    shuffled: Windows
    keys: Float[Tensor, " voxel"]
    controls: Float[Tensor, "batch 4"]
    increasing: Bool[Tensor, " batch"]
    mapped: Bool[Tensor, " batch"]
    painted: Windows
    inside: Bool[Tensor, " batch"]
    noise: Float[Tensor, "batch channel x y z"]


class Stages(NamedTuple):
    """A crop after each step of its deformation."""

    shuffled: Float[Tensor, "batch channel x y z"]
    mapped: Float[Tensor, "batch channel x y z"]
    painted: Float[Tensor, "batch channel x y z"]


def deform(image: Float[Tensor, "batch channel x y z"], draws: Deformation) -> Stages:
    """Return crops with intensities in [0, 1] after shuffling, intensity map and painting, in this order.

    Source: arXiv:1908.06912.
    """
    shuffled = shuffle_in_windows(image, draws.shuffled, draws.keys)
    curved = map_intensity(shuffled, draws.controls, increasing=draws.increasing)
    mapped = torch.where(draws.mapped.view(-1, 1, 1, 1, 1), curved, shuffled)
    painted = inside_windows(draws.painted, image.shape[2:]) == draws.inside.view(-1, 1, 1, 1, 1)
    return Stages(shuffled, mapped, torch.where(painted, draws.noise, mapped))


def shuffle_windows(
    noise: Float[Tensor, "batch window 2 3"], size_voxel: Sequence[int], *, divisor: int = 10
) -> Windows:
    """Return windows anywhere in a crop, with sides from one voxel to a part of the crop's side.

    Args:
        noise: Uniform numbers in [0, 1) for side and start.
        size_voxel: Size of the crop.
        divisor: The largest side is that of the crop over this number.

    Raises:
        ValueError: A side of the crop is shorter than `divisor`.
    """
    most = [side // divisor for side in triple(size_voxel)]
    if min(most) < 1:
        raise ValueError(f"a crop of {list(size_voxel)} voxels has no windows of a side over {divisor}")
    return _windows(noise, size_voxel, least=[1, 1, 1], most=most, margin=0)


def inpainted_windows(
    noise: Float[Tensor, "batch window 2 3"],
    chance: Float[Tensor, "batch window"],
    size_voxel: Sequence[int],
    *,
    probability: float = 0.95,
) -> Windows:
    """Return windows with a sixth to a third of the crop's sides, each only if all before it were drawn.

    `noise` and `chance` are uniform in [0, 1).

    Raises:
        ValueError: A side of the crop is shorter than `LEAST_SIDE`.
    """
    sides = check_sides(size_voxel)
    least, most = [side // 6 for side in sides], [side // 3 for side in sides]
    windows = _windows(noise, sides, least=least, most=most, margin=PAINT_MARGIN)
    return windows.without((chance >= probability).cumsum(1) > 0)


def kept_windows(
    noise: Float[Tensor, "batch window 2 3"],
    chance: Float[Tensor, "batch window"],
    size_voxel: Sequence[int],
    *,
    probability: float = 0.95,
) -> Windows:
    """Return the windows that out-painting keeps, which lack three to four sevenths of the crop's sides.

    The first is always there, each other only if all before it were drawn. `noise` and `chance` are uniform in [0, 1).

    Raises:
        ValueError: A side of the crop is shorter than `LEAST_SIDE`.
    """
    sides = check_sides(size_voxel)
    least, most = [side - 4 * side // 7 for side in sides], [side - 3 * side // 7 for side in sides]
    windows = _windows(noise, sides, least=least, most=most, margin=PAINT_MARGIN)
    absent = chance >= probability
    absent[:, 0] = False
    return windows.without(absent.cumsum(1) > 0)


def check_sides(size_voxel: Sequence[int], *, setting: str = "the crop") -> tuple[int, int, int]:
    """Return the sides of a crop; `setting` names it in an error.

    Raises:
        ValueError: A side is shorter than `LEAST_SIDE`.
    """
    sides = triple(size_voxel)
    if min(sides) < LEAST_SIDE:
        raise ValueError(
            f"{setting}={list(sides)}: painted windows need sides of at least {LEAST_SIDE} voxels; "
            f"take {[max(side, LEAST_SIDE) for side in sides]}"
        )
    return sides


def shuffle_in_windows(
    image: Float[Tensor, "batch channel x y z"], windows: Windows, keys: Float[Tensor, " voxel"]
) -> Float[Tensor, "batch channel x y z"]:
    """Return crops in which the voxels of each window are permuted, windows written one after the other.

    Each window permutes the voxels of the undeformed crop, and a later window replaces earlier ones where they overlap:
    the result is that of a loop over the windows.

    Args:
        image: The crops.
        windows: The windows, in order.
        keys: Numbers in [0, 1) for the voxels of window after window, crop after crop, z fastest. The voxel of the
            smallest key moves to the first place of its window, and so on; rising keys leave all voxels in place.

    Raises:
        ValueError: There are not as many keys as voxels in windows.
    """
    batch, _, *size = image.shape
    start, side = (part.flatten(0, 1) for part in windows)  # (batch * window, 3)
    volume = side.prod(1)
    number = torch.repeat_interleave(volume)  # the window of each (window, voxel) pair
    if len(keys) != len(number):
        raise ValueError(f"the windows hold {len(number)} voxels, there are {len(keys)} keys")
    rank = torch.arange(len(number), device=image.device) - (volume.cumsum(0) - volume)[number]
    crop = number // windows.side.shape[1]
    x, y, z = start[number].unbind(1)
    _, rows, columns = side[number].unbind(1)
    x, y, z = x + rank // (rows * columns), y + rank // columns % rows, z + rank % columns
    voxel = ((crop * size[0] + x) * size[1] + y) * size[2] + z
    order = (number + keys.double()).argsort(stable=True)  # sorted within each window
    place = torch.arange(batch * size[0] * size[1] * size[2], device=image.device)
    last = torch.full_like(place, -1).scatter_reduce(
        0, voxel, torch.arange(len(number), device=image.device), "amax"
    )  # pairs of later windows have larger numbers
    if len(number):
        place = torch.where(last >= 0, voxel[order[last.clamp(min=0)]], place)
    flat = image.transpose(0, 1).flatten(1)  # (channel, batch * voxel)
    return flat[:, place].unflatten(1, (batch, *size)).transpose(0, 1)


def map_intensity(
    image: Float[Tensor, "batch channel x y z"],
    controls: Float[Tensor, "batch 4"],
    *,
    increasing: Bool[Tensor, " batch"],
    num_nodes: int = NUM_NODES,
) -> Float[Tensor, "batch channel x y z"]:
    """Return crops whose intensities in [0, 1] are mapped by a cubic Bezier curve through (0, 0) and (1, 1).

    Where `increasing` is set, both coordinates of the curve's nodes are sorted; elsewhere the first alone, and the map
    runs from (0, 1) to (1, 0). Values between nodes are interpolated, values beyond [0, 1] are those of the ends.

    Args:
        image: The crops.
        controls: Inner control points (x, y), (x, y) in [0, 1].
        increasing: Direction of the map of each crop.
        num_nodes: Number of nodes.

    Source: arXiv:1908.06912.
    """
    t = torch.linspace(0, 1, num_nodes, dtype=torch.float64, device=image.device)
    weights = torch.stack([3 * t.square() * (1 - t), 3 * t * (1 - t).square(), (1 - t) ** 3])  # (3, node)
    ends = torch.ones_like(controls[:, :1], dtype=torch.float64)
    across, up = (torch.cat([controls[:, axis::2].double(), ends], dim=1) @ weights for axis in (0, 1))
    across = across.sort(dim=1).values
    up = torch.where(increasing[:, None], up.sort(dim=1).values, up).to(image.dtype)
    across = across.to(image.dtype)
    value = image.flatten(1)
    right = torch.searchsorted(across, value.contiguous()).clamp(1, num_nodes - 1)
    low, high = across.gather(1, right - 1), across.gather(1, right)
    share = ((value - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)).clamp(0, 1)
    return torch.lerp(up.gather(1, right - 1), up.gather(1, right), share).view_as(image)


def inside_windows(windows: Windows, size_voxel: Sequence[int]) -> Bool[Tensor, "batch 1 x y z"]:
    """Return true in the voxels of any window."""
    covered = []
    for axis, length in enumerate(size_voxel):
        place = torch.arange(length, device=windows.start.device)
        start, side = windows.start[..., axis, None], windows.side[..., axis, None]
        covered.append((place >= start) & (place < start + side))  # (batch, window, length)
    x, y, z = covered
    return (x[..., None, None] & y[..., None, :, None] & z[..., None, None, :]).any(1, keepdim=True)


def _windows(
    noise: Float[Tensor, "batch window 2 3"],
    size_voxel: Sequence[int],
    *,
    least: Sequence[int],
    most: Sequence[int],
    margin: int,
) -> Windows:
    """Return windows with sides from `least` to `most` and starts from `margin` to as far from the upper face."""
    size, low, high = (torch.tensor(list(given), device=noise.device) for given in (size_voxel, least, most))
    side = low + _up_to(noise[:, :, 0], high - low)
    return Windows(margin + _up_to(noise[:, :, 1], size - side - 2 * margin), side)


def _up_to(noise: Float[Tensor, "*dim"], largest: Int64[Tensor, "..."]) -> Int64[Tensor, "*dim"]:
    """Return whole numbers from 0 to `largest`, which may round up for noise just below 1."""
    return torch.minimum((noise * (largest + 1)).long(), largest)
