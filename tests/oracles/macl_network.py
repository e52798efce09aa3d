"""Names and shapes of MACL's published network in the order in which they are defined, and weights by a formula."""

import math

import torch


def published_shapes(*, base=32, in_channels=1, proj_dim=128):
    """Name and shape of every tensor of a pre-training file, statistics of batch norms among them."""
    shapes = {}

    def layer(name, *shape, out=0):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (shape[out],)

    def norm(name, width):
        shapes.update({f"{name}.{entry}": (width,) for entry in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def block(name, inputs, width):
        layer(f"{name}.0", width, inputs, 3, 3)
        norm(f"{name}.1", width)

    before = in_channels
    for level in (1, 2, 3, 4):
        width = base << (level - 1)
        block(f"share_encoder.contr_{level}_1", before, width)
        block(f"share_encoder.contr_{level}_2", width, width)
        before = width
    deepest = 16 * base
    layer("share_encoder.center.0", deepest, before, 3, 3)
    layer("share_encoder.center.2", deepest, deepest, 3, 3)
    for level in (4, 3, 2, 1):
        width = base << (level - 1)
        layer(f"online_decoder.upscale{level + 1}", 2 * width, width, 2, 2, out=1)
        block(f"online_decoder.expand_{level}_1", 2 * width, width)
        block(f"online_decoder.expand_{level}_2", width, width)
    for name, inputs in (("target", deepest), ("online", 4 * base)):
        layer(f"{name}_instance_projector.2", 4 * base, inputs)
        layer(f"{name}_instance_projector.4", proj_dim, 4 * base)
    for number, inputs in ((0, deepest), (3, 4 * base)):
        layer(f"target_pixel_projector.{number}", 4 * base, inputs, 3, 3)
        norm(f"target_pixel_projector.{number + 1}", 4 * base)
    return shapes


def fill(shapes, *, dtype=torch.float64):
    """Tensors of these shapes: sines in weights of two axes and more, ones in norms, zeros in biases and means.

    The k-th value of the j-th trained tensor is (2 / sqrt(fan)) sin(0.9 k + 0.3 j), its fan the values of one row.
    """
    state, number = {}, 0
    for name, shape in shapes.items():
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            state[name] = torch.tensor(0)
            continue
        if len(shape) >= 2:
            count = math.prod(shape)
            angle = 0.9 * torch.arange(count, dtype=torch.float64) + 0.3 * number
            state[name] = (2 / math.sqrt(count / shape[0]) * angle.sin()).view(shape).to(dtype)
        else:
            state[name] = torch.full(shape, float(kind in ("weight", "running_var")), dtype=dtype)
        number += kind in ("weight", "bias")
    return state


def golden_images():
    """The four views (auxiliary and dominant, still and moved) that the recorded numbers were computed from."""
    k = torch.arange(65536, dtype=torch.float64).view(4, 1, 128, 128)
    still = [0.5 + 0.5 * (0.0131 * k + phase).sin() for phase in (0, 0.2)]
    return *still, 0.5 + 0.5 * (0.0173 * k).cos(), 0.5 + 0.5 * (0.0171 * k + 0.1).cos()
