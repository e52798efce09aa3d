"""The Swin transformer for volumes."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from monai.networks.nets.swin_unetr import BasicLayer, SwinTransformer, WindowAttention, compute_mask, get_window_size
from torch import Tensor

from medssl.models.stem import fit_stem
from medssl.ops.patches import triple


class SwinEncoder(SwinTransformer):
    """The encoder of Swin UNETR: MONAI's modules and keys (`swinViT` there), maps at strides 2 to 32 for patches of 2.

    Its maps are those of MONAI's encoder. Between the stages the axes stay channels-last, and masks are made only for
    shifted windows. MONAI's `SwinUNETR` adds residual convolutions over every map and a deeper bottleneck;
    `UNetDecoder` takes the maps as they are.

    Args:
        in_channels: Channels of the image.
        feature_size: Channels of the finest map; they double with each map.
        depths: Blocks in each of the four stages.
        num_heads: Attention heads in each stage.
        window_voxel: Side of the attention windows, in tokens.
        patch_voxel: Voxels of a token.
        drop_path: Largest rate at which residual branches are dropped.
        checkpoint_activations: Recompute activations in the backward pass.

    Source: arXiv:2201.01266.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_voxel: int | Sequence[int] = 7,
        patch_voxel: int | Sequence[int] = 2,
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(f"depths and num_heads need four entries, got {list(depths)} and {list(num_heads)}")
        if wrong := [heads for stage, heads in enumerate(num_heads) if (feature_size << stage) % heads]:
            raise ValueError(f"feature_size {feature_size} cannot be split over {wrong[0]} attention heads")
        patch = triple(patch_voxel)
        super().__init__(
            in_chans=in_channels,
            embed_dim=feature_size,
            window_size=triple(window_voxel),
            patch_size=patch,
            depths=depths,
            num_heads=num_heads,
            drop_path_rate=drop_path,
            use_checkpoint=checkpoint_activations,
        )
        for module in self.modules():
            if isinstance(module, WindowAttention):  # fused under no_grad: 2.6 times as fast; not in MONAI 1.6.0
                module.use_flash_attention = True
        self.in_channels = in_channels
        self.channels = tuple(feature_size << level for level in range(5))
        self.strides = tuple(tuple(side << level for side in patch) for level in range(5))

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], coordinate: Tensor | None = None
    ) -> list[Float[Tensor, "batch width i j k"]]:
        """Return five maps, fine to coarse, each token normed without weights; `coordinate` is not used."""
        tokens = self.pos_drop(self.patch_embed(image)).permute(0, 2, 3, 4, 1).contiguous()
        maps = [tokens]
        for (stage,) in (self.layers1, self.layers2, self.layers3, self.layers4):
            maps.append(_run_stage(stage, maps[-1]))  # type: ignore[arg-type]
        return [F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 4, 1, 2, 3) for tokens in maps]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with the patch embedding fitted to this network's input channels."""
        return fit_stem(tensors, "patch_embed.proj.weight", self.in_channels)


def _run_stage(stage: BasicLayer, tokens: Tensor) -> Tensor:
    """Run blocks and merging of one of MONAI's stages over channels-last tokens (batch, i, j, k, width)."""
    size = tokens.shape[1:4]
    window, shift = get_window_size(size, stage.window_size, stage.shift_size)
    mask = None
    if any(shift) and stage.depth > 1:  # every second block is shifted
        padded = [-(-side // step) * step for side, step in zip(size, window, strict=True)]
        mask = compute_mask(padded, window, shift, tokens.device)
    for block in stage.blocks:  # type: ignore[union-attr]
        tokens = block(tokens, mask)
    return stage.downsample(tokens)  # type: ignore[misc, operator]
