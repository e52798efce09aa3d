"""Vision transformers that predict the voxels of hidden patches: the masked autoencoder and SimMIM."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from medssl.models.vit import MaskedDecoder, VisionTransformer
from medssl.ops.masking import TokenMask
from medssl.ops.patches import unpatchify


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, and decoder of all of them.

    Args:
        encoder: Transformer with a CLS token, which the decoder decodes too, and without a mask token.
        decoder: Transformer with the mask token.

    Raises:
        ValueError: The encoder has no CLS token or has a mask token, or the decoder does not fit it.

    Source: arXiv:2111.06377.
    """

    def __init__(self, encoder: VisionTransformer, decoder: MaskedDecoder) -> None:
        super().__init__()
        if encoder.cls_token is None or encoder.mask_token is not None:
            raise ValueError("a masked autoencoder needs an encoder with class_token=true and mask_token=false")
        voxels = math.prod(encoder.patch_voxel) * encoder.in_channels
        if (read := decoder.embed.in_features) != encoder.dim:
            raise ValueError(f"method.decoder.encoder_dim={read} must be that of the encoder, {encoder.dim}")
        if (predicted := decoder.pred.out_features) != voxels:
            raise ValueError(
                f"the decoder predicts {predicted} values for each patch, which has {voxels}: give method.decoder the "
                f"patch_voxel of the encoder, {list(encoder.patch_voxel)}, and its {encoder.in_channels} out_channels"
            )
        self.encoder, self.decoder = encoder, decoder

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], mask: TokenMask
    ) -> Float[Tensor, "batch channel x y z"]:
        """Return the prediction at full resolution; the voxels of masked patches are never read."""
        grid = self.encoder.grid_of(image)
        patches = self.decoder(self.encoder.tokens(image, mask.keep), mask.keep, grid=grid)
        return unpatchify(patches, grid, patch_voxel=self.encoder.patch_voxel)


class SimMIM(nn.Module):
    """Encoder of all patches, the masked ones as mask tokens, and a linear layer from tokens to voxels.

    Args:
        encoder: Transformer with a mask token.

    Raises:
        ValueError: The encoder has none.

    Source: arXiv:2111.09886.
    """

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        if encoder.mask_token is None:
            raise ValueError("SimMIM needs an encoder with mask_token=true")
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, math.prod(encoder.patch_voxel) * encoder.in_channels)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], mask: TokenMask
    ) -> Float[Tensor, "batch channel x y z"]:
        """Return the prediction at full resolution; the voxels of masked patches have no influence on it."""
        tokens = self.encoder.tokens(image, masked=mask.masked)[:, self.encoder.num_class_rows :]
        return unpatchify(self.head(tokens), self.encoder.grid_of(image), patch_voxel=self.encoder.patch_voxel)
