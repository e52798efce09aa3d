"""The matcher of KAF: scores between the keypoints of two views, after attention within and between them."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.models.kaf_layer import find_tokens
from medssl.models.keypoint_attention import MessageLayer, PositionCode, fit_code

LAYERS = ("self", "cross")


class KeypointMatcher(nn.Module):
    """Matcher of fused tokens with a code of their place: self- and cross-attention, then products of the two views.

    Both views go through the same layers one after the other, so that batch norm takes its statistics from one view at
    a time. The parameter `dustbin` is the score of a keypoint without a partner, for the transport that follows.

    Args:
        spatial_dims: Number of spatial axes, 2 or 3.
        dim: Width of the tokens.
        num_heads: Heads of the attention.
        layers: Kinds of the layers, `self` or `cross`, in order.
        position_widths: Widths of the hidden layers of the position code.
        token_norm: Norm of the MLPs over tokens, `batch` or `layer`.
        axis_swap: See `medssl.models.keypoint_attention.normalised`.

    Source: arXiv:2310.01680 and arXiv:1911.11763, section 3.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        dim: int = 256,
        num_heads: int = 4,
        layers: Sequence[str] = ("self", "cross", "self", "cross"),
        position_widths: Sequence[int] = (32, 64, 128, 256),
        token_norm: str = "batch",
        axis_swap: bool = False,
    ) -> None:
        super().__init__()
        if wrong := sorted(set(layers) - set(LAYERS)):
            raise ValueError(f"matcher layers are {', '.join(LAYERS)}; got {', '.join(wrong)}")
        self.kinds, self.spatial_dims = tuple(layers), spatial_dims
        self.position = PositionCode(spatial_dims, dim, widths=position_widths, norm=token_norm, axis_swap=axis_swap)
        self.attention = nn.ModuleList(MessageLayer(dim, num_heads=num_heads, norm=token_norm) for _ in layers)
        self.final = nn.Linear(dim, dim)
        self.dustbin = nn.Parameter(torch.tensor(1.0))

    def forward(
        self,
        first: Float[Tensor, "batch dim n"],
        second: Float[Tensor, "batch dim m"],
        *,
        points: tuple[Float[Tensor, "batch n axis"], Float[Tensor, "batch m axis"]],
        valid: tuple[Bool[Tensor, "batch n"], Bool[Tensor, "batch m"]],
        size_voxel: Sequence[int],
    ) -> Float[Tensor, "batch n m"]:
        """Return the score of every pair: product over the root of `dim`, in single precision, 0 for invalid keypoints.

        Args:
            first: Fused tokens of one view.
            second: Fused tokens of the other view.
            points: Keypoints of both views, each in voxels of its view.
            valid: Which of the keypoints count.
            size_voxel: Size of both views.
        """
        tokens, packings = [], []
        for padded, places, known in zip((first, second), points, valid, strict=True):
            keypoints, _ = find_tokens(places, known, size_voxel=size_voxel)
            code = self.position(keypoints.voxel((1,) * len(size_voxel)), size_voxel)
            tokens.append(keypoints.packing.pack(padded.mT) + code)
            packings.append(keypoints.packing)
        for kind, layer in zip(self.kinds, self.attention, strict=True):
            sources = (0, 1) if kind == "self" else (1, 0)
            gains = [
                layer(tokens[view], tokens[source], at=packings[view], of=packings[source])
                for view, source in enumerate(sources)
            ]
            tokens = [own + gain for own, gain in zip(tokens, gains, strict=True)]
        with torch.autocast(first.device.type, enabled=False):
            dtype = self.final.weight.dtype
            a, b = (packing.pad(self.final(own.to(dtype))) for packing, own in zip(packings, tokens, strict=True))
            return a @ b.mT / a.shape[-1] ** 0.5

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights, those of slices fitted to volumes: the last coordinate has a weight of zero."""
        return fit_code(tensors, "position", self.spatial_dims)
