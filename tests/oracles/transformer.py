"""A vision transformer and a masked decoder as functions of a state dict: one sample, head and patch at a time."""

import math

import torch


def _layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def _gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def blocks(x, state, *, prefix, num_heads):
    """All transformer blocks over the tokens `x` (token, dim) of one sample."""
    dim = x.shape[1]
    size = dim // num_heads
    depth = len({key.split(".")[1] for key in state if key.startswith(prefix)})
    for i in range(depth):
        p = {
            key.removeprefix(f"{prefix}{i}."): tensor
            for key, tensor in state.items()
            if key.startswith(f"{prefix}{i}.")
        }
        h = _layer_norm(x, p["norm1.weight"], p["norm1.bias"]) @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]
        mixed = []
        for head in range(num_heads):
            q, k, v = (h[:, part * dim + head * size : part * dim + (head + 1) * size] for part in range(3))
            mixed.append(torch.softmax(q @ k.T / math.sqrt(size), dim=1) @ v)
        x = x + torch.cat(mixed, dim=1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        h = _layer_norm(x, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        x = x + _gelu(h) @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    return x


def encode(volume, state, *, patch, num_heads, keep=None):
    """Normed tokens, CLS first, of one volume (channel, x, y, z)."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    grid = [side // patch for side in volume.shape[1:]]
    tokens = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            for k in range(grid[2]):
                cube = volume[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch, k * patch : (k + 1) * patch]
                tokens.append((weight * cube).sum((1, 2, 3, 4)) + bias)
    tokens = torch.stack(tokens) + state["pos_embed"][0, 1:]
    if keep is not None:
        tokens = tokens[keep]
    tokens = torch.cat([state["cls_token"][0] + state["pos_embed"][0, :1], tokens])
    tokens = blocks(tokens, state, prefix="blocks.", num_heads=num_heads)
    return _layer_norm(tokens, state["norm.weight"], state["norm.bias"])


def decode(tokens, state, *, keep, num_tokens, num_heads):
    """Patch vectors of one sample from its CLS and visible tokens, places filled one by one."""
    embedded = tokens @ state["embed.weight"].T + state["embed.bias"]
    rows = [embedded[0]] + [state["mask_token"][0, 0]] * num_tokens
    for row, place in zip(embedded[1:], keep, strict=True):
        rows[1 + int(place)] = row
    hidden = torch.stack(rows) + state["pos_embed"][0]
    hidden = blocks(hidden, state, prefix="blocks.", num_heads=num_heads)
    hidden = _layer_norm(hidden, state["norm.weight"], state["norm.bias"])
    return (hidden @ state["pred.weight"].T + state["pred.bias"])[1:]
