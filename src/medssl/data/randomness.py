"""Counter-based random numbers: every draw is a pure function of its key, so that runs resume and split over ranks."""

import math
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

Key = int | str

CACHED_NUMBERS = 65_536
"""Numbers per row that are computed at once on a CPU: they stay in its cache, which halves the time."""


def counter_key(*key: Key) -> int:
    """Return a 63-bit number that depends on every entry of `key` and on their order."""
    return int.from_bytes(_digest(key, 8), "little") >> 1


def counter_generator(*key: Key) -> np.random.Generator:
    """Return a NumPy generator (Philox) whose whole stream is a function of `key`."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key, 16), "little")))


def _digest(key: tuple[Key, ...], size: int) -> bytes:
    return blake2b("\x1f".join(map(str, key)).encode(), digest_size=size).digest()


def hash_normal(num: int, key: Int64[Tensor, " row"]) -> Float32[Tensor, "row {num}"]:
    """Return standard normal numbers, a pure function of (row's key, column): equal on all devices to about 1e-6.

    Two 32-bit hashes (a multiply-xorshift finaliser over a counter) make two numbers by the Box-Muller transform.

    Args:
        num: Numbers per row.
        key: One 63-bit key per row, on the device where the numbers are needed.
    """
    half = -(-num // 2)
    low, high = (_int32(key & 0xFFFFFFFF)[:, None], _int32(key >> 32)[:, None])
    numbers = torch.empty((len(key), 2 * half), device=key.device)
    part = CACHED_NUMBERS if key.device.type == "cpu" else half
    for start in range(0, half, part):
        stop = min(start + part, half)
        counter = torch.arange(start, stop, dtype=torch.int32, device=key.device)
        radius = _uniform(_mix((counter + low).bitwise_xor_(high))).log_().mul_(-2).sqrt_()
        angle = _uniform(_mix((counter ^ ~low).add_(high))).mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=numbers[:, start:stop])
        torch.mul(radius, angle.sin_(), out=numbers[:, half + start : half + stop])
    return numbers[:, :num]


def _int32(value: Int64[Tensor, " row"]) -> Tensor:
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits thoroughly, in place; integer products wrap alike on all devices."""
    shifted = torch.empty_like(x)  # fresh memory costs more than the arithmetic
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, None)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x ^= shifted.bitwise_and_((1 << (32 - shift)) - 1)
        if factor is not None:
            x *= factor
    return x


def _uniform(x: Tensor) -> Float32[Tensor, "row half"]:
    """Turn bits into numbers in (0, 1): the upper 23 bits and a half, so that the logarithm is finite."""
    return x.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
