"""The heads of KAF: embeddings of image and keypoints, and the tokens that are matched."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.models.kaf_unet import KAFOutput
from medssl.models.keypoint_attention import TokenBatchNorm, token_mlp


class KAFEmbeddings(NamedTuple):
    """Embeddings of a batch of views, not normalised, and fused tokens (0 where there is no keypoint)."""

    image: Float[Tensor, "batch embed"]
    keypoints: Float[Tensor, "batch embed"]
    tokens: Float[Tensor, "batch dim n"]
    has_keypoints: Bool[Tensor, " batch"]
    points: Float[Tensor, "batch n embed"] | None = None  # embeddings of single keypoints, 0 where there is none


class KAFHeads(nn.Module):
    """The bottleneck head, the fusion of the levels' tokens, and the head of their mean.

    Args:
        bottleneck_channels: Channels of the encoder's last map.
        token_channels: Channels of the encoder's tokens, summed over all levels.
        dim: Width of the fused tokens.
        embed_dim: Width of all embeddings.
        local: Whether single keypoints are embedded as well.

    Raises:
        ValueError: the encoder has no tokens.

    Source: arXiv:2310.01680; repository zshyang/kaf, network/dynamic_graph_unet2d.py.
    """

    def __init__(
        self,
        *,
        bottleneck_channels: int,
        token_channels: int,
        dim: int = 256,
        embed_dim: int = 512,
        local: bool = False,
    ) -> None:
        super().__init__()
        if not token_channels:
            raise ValueError(
                "KAF pre-trains keypoints, but the encoder uses none: set model.keypoints=use, and at least one of "
                "model.encoder.levels to 1"
            )
        half = bottleneck_channels // 2
        self.bottleneck = nn.Sequential(nn.Linear(bottleneck_channels, half), nn.ReLU(), nn.Linear(half, embed_dim))
        self.fusion = nn.Linear(token_channels, dim)
        self.keypoint = nn.Sequential(nn.Linear(dim, dim), TokenBatchNorm(dim), nn.ReLU(), nn.Linear(dim, embed_dim))
        self.local = token_mlp((dim, dim, embed_dim)) if local else None

    def forward(self, output: KAFOutput) -> KAFEmbeddings:
        """Return the embeddings of a batch.

        A view without keypoints has a keypoint embedding of zeros, and no share in the batch norm of the others.
        """
        image = self.bottleneck(output.bottleneck.flatten(2).mean(2))
        tokens = self.fusion(output.tokens.mT) * output.valid[:, :, None]  # (batch, n, dim)
        counts, has_keypoints = output.valid.sum(1), output.valid.any(1)
        mean = tokens.sum(1)[has_keypoints] / counts[has_keypoints, None]
        embedded = self.keypoint(mean)
        keypoints = embedded.new_zeros(len(image), embedded.shape[1])
        keypoints = keypoints.index_copy(0, has_keypoints.nonzero().squeeze(1), embedded)
        points = None
        if self.local is not None:
            points = embedded.new_zeros(*tokens.shape[:2], embedded.shape[1])
            points = points.index_put((output.valid,), self.local(tokens[output.valid]))
        return KAFEmbeddings(image, keypoints, tokens.mT, has_keypoints, points)

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights without the head of single keypoints, where this network has none."""
        return {
            key: tensor for key, tensor in tensors.items() if self.local is not None or not key.startswith("local.")
        }
