"""Counter-based randomness: every draw is a pure function of its key, so that runs resume and split over ranks."""

import math
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

Key = int | str


def counter_key(*key: Key) -> int:
    """A 63-bit number that depends on every entry of `key` and on their order."""
    return int.from_bytes(_digest(key, 8), "little") >> 1


def counter_generator(*key: Key) -> np.random.Generator:
    """A NumPy generator (Philox) whose whole stream is a function of `key`."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key, 16), "little")))


def _digest(key: tuple[Key, ...], size: int) -> bytes:
    return blake2b("\x1f".join(map(str, key)).encode(), digest_size=size).digest()


def hash_normal(num: int, key: Int64[Tensor, " row"]) -> Float32[Tensor, "row {num}"]:
    """Standard normal numbers, a pure function of (row's key, column): the same on every device to about 1e-6.

    Two 32-bit hashes (a multiply-xorshift finaliser over a counter) make two numbers by the Box-Muller transform.

    Args:
        num: numbers a row.
        key: one 63-bit key a row, on the device where the numbers are wanted.
    """
    half = -(-num // 2)
    counter = torch.arange(half, dtype=torch.int32, device=key.device)
    low, high = (_int32(key & 0xFFFFFFFF)[:, None], _int32(key >> 32)[:, None])
    radius = _uniform(_mix((counter + low) ^ high)).log_().mul_(-2).sqrt_()
    angle = _uniform(_mix((counter ^ ~low) + high)).mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin_()], dim=1)[:, :num]


def _int32(value: Int64[Tensor, " row"]) -> Tensor:
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """An avalanche over 32 bits, in place; integer products wrap alike on all devices."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, None)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        if factor is not None:
            x *= factor
    return x


def _uniform(x: Tensor) -> Float32[Tensor, "row half"]:
    """Bits to (0, 1): the upper 23 and a half, so that the logarithm is finite."""
    return ((x >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
