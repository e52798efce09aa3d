"""KAF written out under its published names: samples without padding, one keypoint, head and query at a time."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

CODE_WIDTHS = (32, 64, 128, 256)


def published_shapes(
    *, base, pairs, dim=256, hidden=64, in_channels=1, code_widths=CODE_WIDTHS, embed=None, classes=None
):
    """Names and shapes in a file of pre-training (with `embed`) or of segmentation (with `classes`)."""
    shapes = {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def norm(name, width):
        shapes.update({f"{name}.{entry}": (width,) for entry in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def code(name):
        widths = (2, *code_widths, dim)
        for number, (before, width) in enumerate(pairwise(widths)):
            layer(f"{name}.{3 * number}", width, before, 1)
            if number < len(widths) - 2:
                norm(f"{name}.{3 * number + 1}", width)

    def network(name, num_layers):
        code(f"{name}.kenc.encoder")
        for number in range(num_layers):
            inner = f"{name}.gnn.layers.{number}"
            for which in ("merge", "proj.0", "proj.1", "proj.2"):
                layer(f"{inner}.attn.{which}", dim, dim, 1)
            layer(f"{inner}.mlp.0", 2 * dim, 2 * dim, 1)
            norm(f"{inner}.mlp.1", 2 * dim)
            layer(f"{inner}.mlp.3", dim, 2 * dim, 1)
        layer(f"{name}.final_proj", dim, dim, 1)
        shapes[f"{name}.bin_score"] = ()

    before = in_channels
    for level in range(4):
        width = base << level
        for number, inputs in ((1, before), (2, width)):
            layer(f"encoder.contr_{level + 1}_{number}.0", width, inputs, 3, 3)
            norm(f"encoder.contr_{level + 1}_{number}.1", width)
        graph = f"encoder.graph_{level + 1}"
        layer(f"{graph}.feature_mlp", dim, width, 1)
        network(f"{graph}.superglue", 2 * pairs)
        layer(f"{graph}.diffusion_cnn.0", hidden, dim, 3, 3)
        norm(f"{graph}.diffusion_cnn.1", hidden)
        layer(f"{graph}.diffusion_cnn.3", width, hidden, 3, 3)
        before = 2 * width
    layer("encoder.center.0", 32 * base, 16 * base, 3, 3)
    layer("encoder.center.2", 32 * base, 32 * base, 3, 3)
    if embed:
        layer("head.2", 16 * base, 32 * base)
        layer("head.4", embed, 16 * base)
        layer("graph_feature_mlp", dim, 4 * dim, 1)
        for name, shape in (("graph_head", ()), ("graph_local_head", (1,))):
            layer(f"{name}.0", dim, dim, *shape)
            norm(f"{name}.1", dim)
            layer(f"{name}.3", embed, dim, *shape)
        network("superglue", 4)
    if classes:
        for level in (4, 3, 2, 1):
            width = 2 * base << (level - 1)
            shapes[f"decoder.upscale{level + 1}.weight"] = (2 * width, width, 2, 2)
            shapes[f"decoder.upscale{level + 1}.bias"] = (width,)
            for number, inputs in ((1, 2 * width), (2, width)):
                layer(f"decoder.expand_{level}_{number}.0", width, inputs, 3, 3)
                norm(f"decoder.expand_{level}_{number}.1", width)
        layer("decoder.head.0", classes, 2 * base, 1, 1, bias=False)
    return shapes


def fill(shapes, *, seed=0, dtype=torch.float64):
    """Weights of sensible size; norms that do something and are strictly positive."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        drawn = torch.rand(shape, generator=generator, dtype=dtype)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = 0.5 + drawn
        elif len(shape) < 2:
            state[name] = 0.4 * (drawn - 0.5)
        else:
            state[name] = 2 * (drawn - 0.5) * math.sqrt(3 / math.prod(shape[1:]))
    return state


class Oracle:
    """The released arithmetic on a state dict, which keeps the running statistics."""

    def __init__(self, state, *, train, scatter="overwrite", axis_swap=True, num_heads=4):
        self.state, self.train, self.num_heads = dict(state), train, num_heads
        self.scatter, self.axis_swap = scatter, axis_swap

    def linear(self, name, rows):
        weight = self.state[f"{name}.weight"].flatten(1)
        return rows @ weight.T + self.state[f"{name}.bias"]

    def norm(self, name, rows):
        """Batch norm over rows (m, channel) with one update of the running statistics, momentum 0.1."""
        mean, variance = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.train:
            now, spread = rows.mean(0), rows.var(0, unbiased=False)
            unbiased = spread * len(rows) / (len(rows) - 1)
            self.state[f"{name}.running_mean"] = (0.9 * mean + 0.1 * now).detach()
            self.state[f"{name}.running_var"] = (0.9 * variance + 0.1 * unbiased).detach()
            mean, variance = now, spread
        scaled = (rows - mean) / torch.sqrt(variance + 1e-5)
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def norm_map(self, name, x):
        return (
            self.norm(name, x.movedim(1, -1).reshape(-1, x.shape[1]))
            .view(len(x), *x.shape[2:], x.shape[1])
            .movedim(-1, 1)
        )

    def tokenwise(self, function, tokens):
        """A function of all tokens of the batch together, for a list of those of each sample."""
        return list(function(torch.cat(tokens)).split([len(own) for own in tokens]))

    def conv(self, name, x, padding=1):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, padding=padding)

    def block(self, name, x):
        return F.leaky_relu(self.norm_map(f"{name}.1", self.conv(f"{name}.0", x)), 0.01)

    def code(self, name, voxels, size):
        """The code of voxels (a list of (n, axis)) in a map of `size`."""
        places = [torch.zeros(len(own), len(size), dtype=torch.float64) for own in voxels]
        for place, own in zip(places, voxels, strict=True):
            for row, voxel in enumerate(own.tolist()):
                for axis, index in enumerate(voxel):
                    side = size[len(size) - 1 - axis] if self.axis_swap else size[axis]
                    place[row, axis] = (index - side / 2) / (0.7 * max(size))
        last = max(int(key.split(".")[-2]) for key in self.state if key.startswith(f"{name}."))

        def mlp(rows):
            for number in range(0, last, 3):
                rows = torch.relu(self.norm(f"{name}.{number + 1}", self.linear(f"{name}.{number}", rows)))
            return self.linear(f"{name}.{last}", rows)

        return self.tokenwise(mlp, places)

    def attend(self, name, tokens, source):
        """The message for each of (n, dim) from (m, dim): channel d * heads + head."""
        query = self.linear(f"{name}.proj.0", tokens)
        key, value = self.linear(f"{name}.proj.1", source), self.linear(f"{name}.proj.2", source)
        rows = []
        for number in range(len(tokens)):
            row = [None] * tokens.shape[1]
            for head in range(self.num_heads):
                mine = query[number, head :: self.num_heads]
                scores = [(mine * other[head :: self.num_heads]).sum() / math.sqrt(len(mine)) for other in key]
                share = torch.stack(scores).softmax(0)
                mixed = sum(part * other[head :: self.num_heads] for part, other in zip(share, value, strict=True))
                for channel in range(len(mine)):
                    row[channel * self.num_heads + head] = mixed[channel]
            rows.append(torch.stack(row))
        return self.linear(f"{name}.merge", torch.stack(rows)) if rows else tokens.clone()

    def gain(self, name, tokens, source):
        """What lists of tokens gain from lists of sources in one layer."""
        messages = [self.attend(f"{name}.attn", own, other) for own, other in zip(tokens, source, strict=True)]

        def mlp(rows):
            return self.linear(
                f"{name}.mlp.3", torch.relu(self.norm(f"{name}.mlp.1", self.linear(f"{name}.mlp.0", rows)))
            )

        joined = [torch.cat(pair, dim=1) for pair in zip(tokens, messages, strict=True)]
        return self.tokenwise(mlp, joined)

    def layers(self, name, first, second, kinds):
        """Both sets through all layers; in a cross layer both look at what the other was before it."""
        for number, kind in enumerate(kinds):
            layer = f"{name}.gnn.layers.{number}"
            others = (first, second) if kind == "self" else (second, first)
            gains = self.gain(layer, first, others[0]), self.gain(layer, second, others[1])
            first = [own + gained for own, gained in zip(first, gains[0], strict=True)]
            second = [own + gained for own, gained in zip(second, gains[1], strict=True)]
        return first, second

    def write(self, tokens, voxels, size):
        """Tokens written into zeros, one after another."""
        dim = tokens[0].shape[1]
        empty = torch.zeros(dim, dtype=torch.float64)
        maps = []
        for own, places in zip(tokens, voxels, strict=True):
            held = {}
            for token, voxel in zip(own, places.tolist(), strict=True):
                held.setdefault(tuple(voxel), []).append(token)
            rows = []
            for flat in range(math.prod(size)):
                voxel = tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), size))
                here = held.get(voxel)
                rows.append(
                    empty if here is None else here[-1] if self.scatter == "overwrite" else sum(here) / len(here)
                )
            maps.append(torch.stack(rows).T.reshape(dim, *size))
        return torch.stack(maps)

    def kaf(self, name, x, voxels):
        """The released layer: one set of keypoints goes through both branches, of which the first is kept."""
        size = tuple(x.shape[2:])
        gathered = [
            torch.stack([sample[(slice(None), *voxel)] for voxel in own.tolist()])
            if len(own)
            else x.new_zeros(0, x.shape[1])
            for sample, own in zip(x, voxels, strict=True)
        ]
        features = self.tokenwise(lambda rows: self.linear(f"{name}.feature_mlp", rows), gathered)
        code = self.code(f"{name}.superglue.kenc.encoder", voxels, size)
        start = [a + b for a, b in zip(features, code, strict=True)]
        num_layers = sum(key.startswith(f"{name}.superglue.gnn") and key.endswith("merge.bias") for key in self.state)
        tokens, _ = self.layers(f"{name}.superglue", start, start, ["self"] * num_layers)
        spread = self.conv(f"{name}.diffusion_cnn.0", self.write(tokens, voxels, size))
        spread = torch.relu(self.norm_map(f"{name}.diffusion_cnn.1", spread))
        return self.conv(f"{name}.diffusion_cnn.3", spread), tokens

    def encode(self, image, points):
        """Bottleneck, skips, and tokens of each sample (n, 4 dim)."""
        skips, tokens, x = [], [], image
        for level in range(4):
            if level:
                x = F.max_pool2d(x, 2)
            for number in (1, 2):
                x = self.block(f"encoder.contr_{level + 1}_{number}", x)
            voxels = [(own / 2**level).trunc().long() for own in points]
            joined, learnt = self.kaf(f"encoder.graph_{level + 1}", x, voxels)
            x = torch.cat([x, joined], dim=1)
            skips.append(x)
            tokens.append(learnt)
        x = F.max_pool2d(x, 2)
        for number in (0, 2):
            x = torch.relu(self.conv(f"encoder.center.{number}", x))
        return x, skips, [torch.cat(levels, dim=1) for levels in zip(*tokens, strict=True)]

    def decode(self, bottleneck, skips):
        """The decoded map at full resolution."""
        x = bottleneck
        for level in (4, 3, 2, 1):
            name = f"decoder.upscale{level + 1}"
            x = F.conv_transpose2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride=2)
            x = torch.cat([x, skips[level - 1]], dim=1)
            for number in (1, 2):
                x = self.block(f"decoder.expand_{level}_{number}", x)
        return x

    def heads(self, bottleneck, tokens):
        """Image embeddings, keypoint embeddings, fused tokens of each sample."""
        image = self.linear("head.4", torch.relu(self.linear("head.2", bottleneck.mean((2, 3)))))
        fused = self.tokenwise(lambda rows: self.linear("graph_feature_mlp", rows), tokens)
        mean = self.linear("graph_head.0", torch.stack([own.mean(0) for own in fused]))
        return image, self.linear("graph_head.3", torch.relu(self.norm("graph_head.1", mean))), fused

    def match(self, first, second, points, size):
        """Scores of each sample's pairs."""
        name = "superglue"
        sides = []
        for tokens, places in zip((first, second), points, strict=True):
            code = self.code(f"{name}.kenc.encoder", [own.long() for own in places], size)
            sides.append([a + b for a, b in zip(tokens, code, strict=True)])
        first, second = self.layers(name, *sides, ["self", "cross", "self", "cross"])
        scores = []
        for a, b in zip(first, second, strict=True):
            rows = [
                [(p * q).sum() / math.sqrt(len(p)) for q in self.linear(f"{name}.final_proj", b)]
                for p in self.linear(f"{name}.final_proj", a)
            ]
            scores.append(torch.stack([torch.stack(row) for row in rows]))
        return scores
