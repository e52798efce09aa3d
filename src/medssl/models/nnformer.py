"""nnFormer: a transformer over windows of a volume, encoder and decoder."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.alice_backbones import Backbone
from medssl.models.nnformer_blocks import SelfAttention, SkipAttention, SkipBlock, WindowBlock, initialise
from medssl.models.stem import fit_stem
from medssl.models.transformer_blocks import path_rates
from medssl.models.unet import blocks_to_run, run
from medssl.models.vit import resize_positions, sincos_positions
from medssl.ops.patches import Triple, patch_grid, triple

STRIDES = ((2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16))
POSITIONS = ("sincos", "none", "random_frozen")


class Embedding(nn.Module):
    """Two convolutions at half the width, the first of step 2, and two at full width, norms between them."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj1 = _Project(in_channels, dim // 2, stride=2, ends_normed=True)
        self.proj2 = _Project(dim // 2, dim, stride=1, ends_normed=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Float[Tensor, "batch channel x y z"]) -> Float[Tensor, "batch i j k width"]:
        """Return one token for 2 voxels along each axis."""
        return self.norm(self.proj2(self.proj1(image.permute(0, 2, 3, 4, 1))))


class _Project(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, stride: int, ends_normed: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm1 = nn.LayerNorm(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.LayerNorm(out_channels) if ends_normed else None

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = _convolve(self.conv2, self.norm1(F.gelu(_convolve(self.conv1, tokens))))
        return tokens if self.norm2 is None else self.norm2(F.gelu(tokens))


class Merging(nn.Module):
    """GELU, norm and a strided convolution that doubles the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv3d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Float[Tensor, "batch i j k width"]) -> Float[Tensor, "batch i2 j2 k2 width2"]:
        """Return tokens at half the resolution."""
        return _convolve(self.reduction, self.norm(F.gelu(tokens)))


class Expanding(nn.Module):
    """Norm and a transposed convolution that halves the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.ConvTranspose3d(dim, dim // 2, 2, stride=2)

    def forward(self, tokens: Float[Tensor, "batch i j k width"]) -> Float[Tensor, "batch i2 j2 k2 width2"]:
        """Return tokens at twice the resolution."""
        return _convolve(self.up, self.norm(tokens))


class EncoderStage(nn.Module):
    """Blocks, every second one shifted, and the merging that leads to the next stage."""

    def __init__(self, dim: int, num_heads: int, *, window: Triple, rule: str, rates: Sequence[float], last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            WindowBlock(
                SelfAttention(dim, num_heads, window=window, rule=rule, shifted=number % 2 == 1), drop_path=rate
            )
            for number, rate in enumerate(rates)
        )
        self.downsample = None if last else Merging(dim)


class DecoderStage(nn.Module):
    """Upsampling, a block that attends to the skip, then blocks of which every second one is shifted."""

    def __init__(self, dim: int, num_heads: int, *, window: Triple, rule: str, rates: Sequence[float]) -> None:
        super().__init__()
        self.upsample = Expanding(2 * dim)
        skip = SkipBlock(SkipAttention(dim, num_heads, window=window, rule=rule), drop_path=rates[0])
        others = (
            WindowBlock(
                SelfAttention(dim, num_heads, window=window, rule=rule, shifted=number % 2 == 1), drop_path=rate
            )
            for number, rate in enumerate(rates[1:], start=1)
        )
        self.blocks = nn.ModuleList([skip, *others])


class NnFormerEncoder(nn.Module):
    """Encoder of nnFormer: four normed maps at strides 2 to 16, whose width doubles with each.

    Sides of an image must be multiples of 16. Windows are clipped to the grid that an image of `size_voxel` gives, and
    so are the shapes of the bias tables: weights of one home size load into another where the clipped windows agree.

    Args:
        in_channels: Channels of the image.
        size_voxel: Home size, to whose grids the windows are clipped; images of other sizes are accepted.
        feature_size: Channels of the finest map.
        depths: Blocks in each of the four stages.
        num_heads: Attention heads in each stage.
        window_tokens: Side of the attention windows in each stage, in tokens of that stage.
        drop_path: Largest rate at which residual branches are dropped; it grows with depth from 0.
        ape: Absolute position table that is added to the tokens: `sincos` (fixed, computed for the present grid),
            `none`, or `random_frozen`: truncated normal numbers that are never trained, as in Alice's code, but saved
            with the weights and resized for other grids.
        relative_index: `published` or `correct`, see `nnformer_blocks.relative_index`. Tables learnt under one rule
            mean nothing under the other.
        checkpoint_activations: Recompute activations in the backward pass.

    Source: arXiv:2109.03201; sizes and masking as in Alice (arXiv:2302.05615, alibaba-damo-academy/alice
    models/nnFormer.py).
    """

    ape: Tensor | None

    def __init__(
        self,
        *,
        in_channels: int = 1,
        size_voxel: int | Sequence[int] = 64,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (6, 12, 24, 48),
        window_tokens: Sequence[int] = (4, 4, 8, 4),
        drop_path: float = 0.2,
        ape: str = "sincos",
        relative_index: str = "published",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if not len(depths) == len(num_heads) == len(window_tokens) == 4:
            raise ValueError(
                f"depths, num_heads and window_tokens need four entries, got {list(depths)}, {list(num_heads)} and "
                f"{list(window_tokens)}"
            )
        choice("ape", ape, POSITIONS)
        self.in_channels, self.checkpoint_activations = in_channels, checkpoint_activations
        self.channels = tuple(feature_size << level for level in range(4))
        self.strides = STRIDES
        self.grid = _grid_at(size_voxel, 0)
        self.patch_embed = Embedding(in_channels, feature_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, feature_size), requires_grad=False)
        rates = _drop_rates(drop_path, depths)
        self.layers = nn.ModuleList(
            EncoderStage(
                self.channels[level],
                num_heads[level],
                window=_clipped(window_tokens[level], _grid_at(size_voxel, level)),
                rule=relative_index,
                rates=rates[level],
                last=level == 3,
            )
            for level in range(4)
        )
        for level, width in enumerate(self.channels):
            self.add_module(f"norm{level}", nn.LayerNorm(width))
        initialise(self)
        self.position, rows = ape, None
        if ape == "sincos":
            rows = sincos_positions(self.grid, feature_size).float()
        elif ape == "random_frozen":
            rows = nn.init.trunc_normal_(torch.empty(math.prod(self.grid), feature_size), std=0.02)
        self.register_buffer("ape", rows, persistent=ape == "random_frozen")

    def forward(
        self,
        image: Float[Tensor, "batch channel x y z"],
        coordinate: Tensor | None = None,
        *,
        masked: Bool[Tensor, "#batch 1 i j k"] | None = None,
    ) -> list[Float[Tensor, "batch width _ _ _"]]:
        """Return four maps, fine to coarse; the mask token replaces tokens that are `masked` (on the finest grid).

        `coordinate` is accepted and not used.

        Raises:
            ValueError: The image has another number of channels, or sides that are no multiples of 16.
        """
        if image.shape[1] != self.in_channels:
            raise ValueError(f"the encoder reads {self.in_channels} channels, the image has {image.shape[1]}")
        patch_grid(image.shape[2:], self.strides[-1])
        tokens = self.patch_embed(image)
        if masked is not None:
            tokens = torch.where(masked.permute(0, 2, 3, 4, 1), self.mask_token.to(tokens), tokens)
        tokens, maps = self._placed(tokens), []
        for level, stage in enumerate(self.layers):
            for block in stage.blocks:  # type: ignore[union-attr]
                tokens = run(block, tokens, checkpointed=self.checkpoint_activations)
            maps.append(getattr(self, f"norm{level}")(tokens).permute(0, 4, 1, 2, 3))
            tokens = tokens if stage.downsample is None else stage.downsample(tokens)  # type: ignore[operator]
        return maps

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with the first convolution fitted to this network's input channels."""
        return fit_stem(tensors, "patch_embed.proj1.conv1.weight", self.in_channels)

    def _placed(self, tokens: Tensor) -> Tensor:
        if self.ape is None:
            return tokens
        size, rows = triple(tokens.shape[1:4]), self.ape
        if size != self.grid and self.position == "sincos":
            rows = sincos_positions(size, tokens.shape[-1], device=rows.device)
        elif size != self.grid:
            rows = resize_positions(rows[None], self.grid, size)[0]
        return tokens + rows.to(tokens).unflatten(0, size)


class NnFormerDecoder(nn.Module):
    """Decoder of nnFormer: maps at strides 2, 4 and 8 from the four maps of an `NnFormerEncoder`.

    A segmenter or a reconstruction reaches full resolution with one transposed convolution, as nnFormer does.

    Args:
        in_channels: Channels of the image, which is not used.
        encoder_channels: Channels of the encoder's maps, fine to coarse.
        encoder_strides: Strides of the encoder's maps, in voxels.
        size_voxel: Home size, to whose grids the windows are clipped.
        depths: Blocks at each of the three resolutions, fine to coarse; the first of them attends to the skip.
        num_heads: Attention heads, fine to coarse.
        window_tokens: Side of the attention windows, fine to coarse, in tokens.
        drop_path: Largest rate at which residual branches are dropped; it grows from 0 at the coarsest resolution.
        relative_index: `published` or `correct`, the same as in the encoder.
        checkpoint_activations: Recompute activations in the backward pass.

    Source: arXiv:2109.03201.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        encoder_channels: Sequence[int],
        encoder_strides: Sequence[int | Sequence[int]],
        size_voxel: int | Sequence[int] = 64,
        depths: Sequence[int] = (2, 2, 2),
        num_heads: Sequence[int] = (6, 12, 24),
        window_tokens: Sequence[int] = (4, 4, 8),
        drop_path: float = 0.2,
        relative_index: str = "published",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        strides = tuple(triple(stride) for stride in encoder_strides)
        if list(encoder_channels) != [encoder_channels[0] << level for level in range(4)] or strides != STRIDES:
            raise ValueError(
                f"the decoder of nnFormer takes four maps of doubling width at strides 2 to 16, these have "
                f"{list(encoder_channels)} channels at strides {strides}; take medssl.models.nnformer.NnFormerEncoder"
            )
        if not len(depths) == len(num_heads) == len(window_tokens) == 3 or min(depths) < 1:
            raise ValueError(
                f"depths (above 0), num_heads and window_tokens need three entries, got {list(depths)}, "
                f"{list(num_heads)} and {list(window_tokens)}"
            )
        self.in_channels, self.checkpoint_activations = in_channels, checkpoint_activations
        self.channels = tuple(encoder_channels[:3])
        self.strides = strides[:3]
        rates = _drop_rates(drop_path, depths[::-1])[::-1]
        self.layers = nn.ModuleList(
            DecoderStage(
                self.channels[level],
                num_heads[level],
                window=_clipped(window_tokens[level], _grid_at(size_voxel, level)),
                rule=relative_index,
                rates=rates[level],
            )
            for level in range(3)
        )

    def forward(
        self,
        image: Float[Tensor, "batch channel x y z"],
        features: Sequence[Float[Tensor, "batch _ _ _ _"]],
        *,
        num_blocks: int | None = None,
    ) -> list[Float[Tensor, "batch width i j k"]]:
        """Return decoded maps, fine to coarse; with `num_blocks` only those of the first (coarsest) blocks.

        `image` is not used.

        Raises:
            ValueError: The decoder has fewer blocks than `num_blocks`.
        """
        *skips, tokens = (level.permute(0, 2, 3, 4, 1) for level in features)
        count, decoded = blocks_to_run(num_blocks, len(self.layers)), []
        for stage, skip in list(zip(reversed(self.layers), reversed(skips), strict=True))[:count]:
            up = run(stage.upsample, tokens, checkpointed=self.checkpoint_activations)  # type: ignore[arg-type]
            first, *others = stage.blocks  # type: ignore[misc]
            tokens = run(first, up, skip, checkpointed=self.checkpoint_activations)
            for block in others:
                tokens = run(block, tokens, checkpointed=self.checkpoint_activations)
            decoded.append(tokens.permute(0, 4, 1, 2, 3))
        return decoded[::-1]


class NnFormer(Backbone):
    """Both halves of nnFormer and the transposed convolution that reconstructs the image, from plain keywords.

    The published network has two more such convolutions for coarser maps (2,306 numbers), which it evaluates and never
    uses; this network leaves them out.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        size_voxel: int | Sequence[int] = 64,
        feature_size: int = 48,
        num_heads: Sequence[int] = (6, 12, 24, 48),
        window_tokens: Sequence[int] = (4, 4, 8, 4),
        drop_path: float = 0.2,
        ape: str = "sincos",
        relative_index: str = "published",
        mask_mode: str = "zero",
        checkpoint_activations: bool = False,
    ) -> None:
        encoder = NnFormerEncoder(
            in_channels=in_channels,
            size_voxel=size_voxel,
            feature_size=feature_size,
            num_heads=num_heads,
            window_tokens=window_tokens,
            drop_path=drop_path,
            ape=ape,
            relative_index=relative_index,
            checkpoint_activations=checkpoint_activations,
        )
        decoder = NnFormerDecoder(
            in_channels=in_channels,
            encoder_channels=encoder.channels,
            encoder_strides=encoder.strides,
            size_voxel=size_voxel,
            num_heads=num_heads[:3],
            window_tokens=window_tokens[:3],
            drop_path=drop_path,
            relative_index=relative_index,
            checkpoint_activations=checkpoint_activations,
        )
        super().__init__(encoder, decoder, mask_mode=mask_mode)


def _convolve(layer: nn.Module, tokens: Tensor) -> Tensor:
    return layer(tokens.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def _grid_at(size_voxel: int | Sequence[int], level: int) -> Triple:
    return patch_grid(triple(size_voxel), STRIDES[level])


def _clipped(window: int, grid: Triple) -> Triple:
    return min(window, grid[0]), min(window, grid[1]), min(window, grid[2])


def _drop_rates(largest: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the rates of the blocks of each stage, growing evenly from 0 over all blocks."""
    rates = iter(path_rates(largest, sum(depths)))
    return [list(itertools.islice(rates, depth)) for depth in depths]
