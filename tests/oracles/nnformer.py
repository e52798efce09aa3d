"""Attention in shifted windows written out: one window, head and pair of tokens at a time. And the published names."""

import itertools
import math

import torch


def plain_attention(query, key, value, bias, mask=None):
    """The straight composition: every score is kept, nothing is fused."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias
    if mask is not None:
        scores = scores + torch.where(mask.patterns[mask.number], -100.0, 0.0)[:, None]
    return scores.softmax(-1) @ value


def windowed(query, key, value, table, *, window, shift, published):
    """Attention over volumes of tokens (i, j, k, head, channel) whose sides are multiples of the window.

    Tokens of the volume rolled back by `shift` see each other in windows; those that the roll brought together get
    -100, found by the labels of regions that Swin gives: before the last window, in it, and wrapped.
    """
    size, (num_heads, channels) = query.shape[:3], query.shape[3:]

    def labels(n, w, s):
        return [0 if i < n - w else 1 if i < n - s else 2 for i in range(n)] if s else [0] * n

    regions = [labels(n, w, s) for n, w, s in zip(size, window, shift, strict=True)]
    out = torch.zeros_like(query)
    for start in itertools.product(*(range(0, n, w) for n, w in zip(size, window, strict=True))):
        rolled = [tuple(a + b for a, b in zip(start, d, strict=True)) for d in itertools.product(*map(range, window))]
        places = [tuple((a + s) % n for a, s, n in zip(p, shift, size, strict=True)) for p in rolled]
        for head in range(num_heads):
            for a, place in zip(rolled, places, strict=True):
                scores = []
                for b, other in zip(rolled, places, strict=True):
                    score = float(query[place][head] @ key[other][head]) / math.sqrt(channels)
                    z, y, x = (i - j + w - 1 for i, j, w in zip(a, b, window, strict=True))
                    (_, wy, wx) = window
                    first = 3 * wy - 1 if published else (2 * wy - 1) * (2 * wx - 1)
                    score += float(table[z * first + y * (2 * wx - 1) + x, head])
                    same = all(r[i] == r[j] for r, i, j in zip(regions, a, b, strict=True))
                    scores.append(score if same else score - 100)
                share = torch.tensor(scores).softmax(0)
                out[place][head] = sum(s * value[other][head] for s, other in zip(share, places, strict=True))
    return out


def published_shapes(*, width, heads, windows, in_channels=1):
    """Names and shapes of the tensors of nnFormer in a file of Alice."""
    shapes = {"model_down.mask_token": (1, 1, width)}

    def linear(name, outputs, inputs):
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name, size):
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    def conv(name, *shape, bias):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": (bias,)})

    def block(name, dim, level, *, source, entries):
        norm(f"{name}.norm1", dim)
        shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * windows[level] - 1) ** 3, heads[level])
        shapes[f"{name}.attn.relative_position_index"] = (windows[level] ** 3, windows[level] ** 3)
        linear(f"{name}.attn.{source}", entries * dim, dim)
        linear(f"{name}.attn.proj", dim, dim)
        norm(f"{name}.norm2", dim)
        linear(f"{name}.mlp.fc1", 4 * dim, dim)
        linear(f"{name}.mlp.fc2", dim, 4 * dim)

    half, embed = width // 2, "model_down.patch_embed"
    conv(f"{embed}.proj1.conv1", half, in_channels, 3, 3, 3, bias=half)
    conv(f"{embed}.proj1.conv2", half, half, 3, 3, 3, bias=half)
    conv(f"{embed}.proj2.conv1", width, half, 3, 3, 3, bias=width)
    conv(f"{embed}.proj2.conv2", width, width, 3, 3, 3, bias=width)
    for name, size in (("proj1.norm1", half), ("proj1.norm2", half), ("proj2.norm1", width), ("norm", width)):
        norm(f"{embed}.{name}", size)
    for level in range(4):
        dim, layer = width << level, f"model_down.layers.{level}"
        for number in range(2):
            block(f"{layer}.blocks.{number}", dim, level, source="qkv", entries=3)
        if level < 3:
            conv(f"{layer}.downsample.reduction", 2 * dim, dim, 3, 3, 3, bias=2 * dim)
            norm(f"{layer}.downsample.norm", dim)
        norm(f"model_down.norm{level}", dim)
    for level in range(3):
        dim, layer = width << level, f"decoder.layers.{level}"
        block(f"{layer}.blocks.0", dim, level, source="kv", entries=2)
        block(f"{layer}.blocks.1", dim, level, source="qkv", entries=3)
        norm(f"{layer}.Upsample.norm", 2 * dim)
        conv(f"{layer}.Upsample.up", 2 * dim, dim, 2, 2, 2, bias=dim)
        conv(f"final.{level}.up", dim, in_channels, 2, 2, 2, bias=in_channels)
    return shapes


def fill(name, shape):
    """The made-up weights that golden numbers belong to, by the published name of a tensor."""
    flat = torch.arange(math.prod(shape), dtype=torch.float64)
    values = 0.05 * torch.sin(0.37 * flat + 0.1 * (sum(map(ord, name)) % 97))
    one = len(shape) == 1 and name.endswith("weight")
    return (values + one).float().reshape(shape)


def wave(shape, step):
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64)).float().reshape(shape)
