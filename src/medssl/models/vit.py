"""The plain 3D vision transformer and the decoder of a masked autoencoder."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medssl.checks import choice
from medssl.models.stem import fit_stem
from medssl.models.transformer_blocks import Block, path_rates
from medssl.models.unet import halvings
from medssl.ops.patches import Triple, patch_grid, patchify, triple

POSITIONS = ("interpolate_from_global", "native")


def sincos_positions(
    grid: Sequence[int], dim: int, *, device: torch.device | str | None = None
) -> Float[Tensor, "token dim"]:
    """Return fixed sine-cosine rows in float64, one for each patch: a third of the channels for each axis, in order.

    The block of an axis holds the sines of all frequencies, then the cosines.

    Raises:
        ValueError: `dim` is not a multiple of 6.
    """
    if dim % 6:
        raise ValueError(f"a sine-cosine table for three axes needs a width divisible by 6, got {dim}")
    half = dim // 6
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in axes]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def resize_positions(
    table: Float[Tensor, "1 row dim"], old_grid: Sequence[int], new_grid: Sequence[int]
) -> Float[Tensor, "1 new_row dim"]:
    """Return the position table of another grid, trilinear between cell centres; a row for CLS stays as it is.

    Raises:
        ValueError: The table has neither one row for each patch of `old_grid` nor one more at the start for CLS.
    """
    old, new = triple(old_grid), triple(new_grid)
    first = table.shape[1] - math.prod(old)
    if first not in (0, 1):
        raise ValueError(f"a position table of {table.shape[1]} rows does not belong to the grid {old} plus a CLS row")
    if old == new:
        return table
    rows = table[:, first:].transpose(1, 2).unflatten(2, old)
    rows = F.interpolate(rows, size=new, mode="trilinear", align_corners=False)
    return torch.cat([table[:, :first], rows.flatten(2).transpose(1, 2)], dim=1)


def skip_depths(depth: int, num_maps: int) -> list[int]:
    """Return the numbers of finished blocks of a transformer after which it gives a map.

    These are after the first block of each later part of equal length, and after all blocks. For 12 blocks and four
    maps they are 4, 7, 10 and 12, those of UNETR (arXiv:2103.10504).
    """
    return [depth * part // num_maps + 1 for part in range(1, num_maps)] + [depth]


class PositionedTransformer(nn.Module):
    """Base of encoder and decoder: blocks, final norm and a frozen position table for a home grid.

    `position` says where the rows for another grid come from: `interpolate_from_global` resizes the table of the home
    grid, `native` computes sine-cosine rows from that grid's own integer coordinates. `class_token` puts a row of zeros
    for CLS before those of the patches.
    """

    def __init__(
        self,
        *,
        grid: Triple,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        position: str,
        dropout: float,
        checkpoint_activations: bool,
        class_token: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        choice("position", position, POSITIONS)
        self.grid, self.dim, self.position = grid, dim, position
        self.checkpoint_activations, self.num_class_rows = checkpoint_activations, int(class_token)
        rows = torch.cat([torch.zeros(self.num_class_rows, dim), sincos_positions(grid, dim).float()])
        self.pos_embed = nn.Parameter(rows[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, layer_scale=layer_scale, drop_path=rate)
            for rate in path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, grid: Triple) -> Float[Tensor, "row dim"]:
        """Return position rows for `grid`, that of CLS first."""
        if grid != self.grid and self.position == "native":
            rows = sincos_positions(grid, self.dim, device=self.pos_embed.device).to(self.pos_embed)
            return torch.cat([self.pos_embed[0, : self.num_class_rows], rows])
        return resize_positions(self.pos_embed, self.grid, grid)[0]

    def run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run one block, recomputed in the backward pass where `checkpoint_activations` is set."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with the position table at the home grid; a table of another size must come from a cube.

        Raises:
            ValueError: The number of rows is no cube, after the row for CLS where there is one.
        """
        table = tensors.get("pos_embed")
        if table is None or table.shape == self.pos_embed.shape or table.shape[2] != self.dim:
            return tensors
        num_patches = table.shape[1] - self.num_class_rows
        side = round(num_patches ** (1 / 3))
        if side**3 != num_patches:
            raise ValueError(
                f"the position table in the file has {table.shape[1]} rows, which is no cubic grid"
                f"{' plus CLS' if self.num_class_rows else ''}; build the network for the grid that the file was "
                "trained with"
            )
        return {**tensors, "pos_embed": resize_positions(table, (side,) * 3, self.grid)}

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


class PatchEmbedding(nn.Module):
    """Layer from patch vectors to tokens; its weight is that of a convolution whose kernel and stride are one patch."""

    def __init__(self, *, in_channels: int, dim: int, patch_voxel: Triple) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_voxel, stride=patch_voxel)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, patches: Float[Tensor, "batch token voxel"]) -> Float[Tensor, "batch token dim"]:
        """Run one matrix product over the given patches, so that masked ones cost nothing."""
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1), self.proj.bias)


class VisionTransformer(PositionedTransformer):
    """ViT for volumes, with a CLS token or without. Default: ViT-B with 16-voxel patches, home size 160, CLS.

    An input may have any size whose sides are multiples of the patch. As an encoder it returns four feature maps: the
    token grids after a quarter, half and three quarters of the blocks and, normed, after the last. `feature_depths`
    names other numbers of finished blocks. `channels` and `strides` (voxels, per axis) describe the maps. The network
    uses the axes as given, without a meaning of x, y or z.

    With `mask_token` it has a learned vector that stands for hidden patches, see `tokens`. `layer_scale` is the first
    value of learned factors on all residual branches, and `drop_path` the rate at which those of the last block are
    dropped in training; it grows evenly from 0 in the first block.

    Source: arXiv:2010.11929; state-dict keys as in published masked-autoencoder weights; arXiv:2111.09886 for the mask
    token.
    """

    may_be_fresh = ("mask_token",)
    """Tensors that a file need not hold: only pre-training reads them."""

    def __init__(
        self,
        *,
        size_voxel: int | Sequence[int] = 160,
        patch_voxel: int | Sequence[int] = 16,
        in_channels: int = 1,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        position: str = "interpolate_from_global",
        dropout: float = 0.0,
        feature_depths: Sequence[int] | None = None,
        class_token: bool = True,
        mask_token: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        patch = triple(patch_voxel)
        super().__init__(
            grid=patch_grid(triple(size_voxel), patch),
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            position=position,
            dropout=dropout,
            checkpoint_activations=checkpoint_activations,
            class_token=class_token,
            layer_scale=layer_scale,
            drop_path=drop_path,
        )
        self.patch_voxel, self.in_channels = patch, in_channels
        self.feature_depths = tuple(feature_depths or (max(1, round(depth * k / 4)) for k in (1, 2, 3, 4)))
        if not all(1 <= done <= depth for done in self.feature_depths) or self.feature_depths[-1] != depth:
            raise ValueError(f"feature_depths {self.feature_depths} must lie in 1..{depth} and end with {depth}")
        self.channels = (dim,) * len(self.feature_depths)
        self.strides = (patch,) * len(self.feature_depths)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self._initialise()
        self.patch_embed = PatchEmbedding(in_channels=in_channels, dim=dim, patch_voxel=patch)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if mask_token else None

    @classmethod
    def segmentation_recipe(cls, recipe: Mapping[str, Any], decoder: type | None) -> dict[str, Any]:
        """Return the recipe as a segmenter takes it: without CLS token, unless it names `class_token`, or mask token.

        A decoder that `takes_patch_grid` (UNETR's, the usual one) gets the maps that it has steps for, see
        `skip_depths`, unless the recipe names `feature_depths`.
        """
        stated = {name: one.default for name, one in inspect.signature(cls).parameters.items()} | dict(recipe)
        completed = {"class_token": False, **recipe} | ({"mask_token": False} if "mask_token" in recipe else {})
        takes_patch_grid = decoder is None or getattr(decoder, "takes_patch_grid", False)
        if takes_patch_grid and stated["feature_depths"] is None:
            num_steps = len(halvings(triple(stated["patch_voxel"])))
            completed["feature_depths"] = skip_depths(stated["depth"], num_steps)
        return completed

    def grid_of(self, image: Float[Tensor, "batch channel x y z"]) -> Triple:
        """Return the number of patches along each axis of `image`."""
        return patch_grid(image.shape[2:], self.patch_voxel)

    def tokens(
        self,
        image: Float[Tensor, "batch channel x y z"],
        keep: Int[Tensor, "batch kept"] | None = None,
        *,
        masked: Bool[Tensor, "batch patch"] | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """Return normed output tokens, CLS (if any) first, then all patches or the kept ones in the order of `keep`.

        A patch that is not kept is neither embedded nor attended to. A `masked` patch is attended to as the mask token
        at its position, whatever its voxels.

        Raises:
            ValueError: Patches are masked, and the network has no mask token.
        """
        tokens = self._embed(image, keep, masked)
        for block in self.blocks:
            tokens = self.run_block(block, tokens)
        return self.norm(tokens)

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], coordinate: Tensor | None = None
    ) -> list[Float[Tensor, "batch dim i j k"]]:
        """Return feature maps, shallow to deep, all on the patch grid; `coordinate` is accepted and not used."""
        tokens, states = self._embed(image), {}
        for done, block in enumerate(self.blocks, start=1):
            tokens = states[done] = self.run_block(block, tokens)
        chosen = [states[done] for done in self.feature_depths[:-1]] + [self.norm(tokens)]
        patches = slice(self.num_class_rows, None)
        return [state[:, patches].transpose(1, 2).unflatten(2, self.grid_of(image)) for state in chosen]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights fitted as in the base class, and the patch weight to this network's input channels.

        A network without a CLS token leaves out that of the file and its row of the position table, and one without a
        mask token that of the file.
        """
        if self.mask_token is None and "mask_token" in tensors:
            tensors = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
        if self.cls_token is None and {"cls_token", "pos_embed"} <= tensors.keys():
            tensors = {**tensors, "pos_embed": tensors["pos_embed"][:, 1:]}
            del tensors["cls_token"]
        return fit_stem(super().adapt(tensors), "patch_embed.proj.weight", self.in_channels)

    def _embed(self, image: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        if image.shape[1] != self.in_channels:
            raise ValueError(f"the encoder reads {self.in_channels} channels, the image has {image.shape[1]}")
        patches, positions = patchify(image, self.patch_voxel), self.positions(self.grid_of(image))
        rows = positions[self.num_class_rows :]
        if keep is not None:
            patches, rows = patches.take_along_dim(keep[..., None], dim=1), rows[keep]
        tokens = self.patch_embed(patches)
        if masked is not None:
            if self.mask_token is None:
                raise ValueError("patches are masked, and the encoder has no mask token; build it with mask_token=true")
            tokens = torch.where(masked[..., None], self.mask_token.to(tokens), tokens)
        tokens = tokens + rows
        if self.cls_token is None:
            return tokens
        first = (self.cls_token + positions[0]).expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], dim=1)


class MaskedDecoder(PositionedTransformer):
    """Decoder that predicts the voxels of every patch from the visible tokens of a `VisionTransformer`.

    Visible tokens return to their places and mask tokens fill the others. The CLS token is decoded with them and then
    removed.

    Source: arXiv:2111.06377.
    """

    def __init__(
        self,
        *,
        encoder_dim: int = 768,
        size_voxel: int | Sequence[int] = 160,
        patch_voxel: int | Sequence[int] = 16,
        out_channels: int = 1,
        dim: int = 576,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        position: str = "interpolate_from_global",
        dropout: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        patch = triple(patch_voxel)
        super().__init__(
            grid=patch_grid(triple(size_voxel), patch),
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            position=position,
            dropout=dropout,
            checkpoint_activations=checkpoint_activations,
        )
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pred = nn.Linear(dim, math.prod(patch) * out_channels)
        self._initialise()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, tokens: Float[Tensor, "batch token dim"], keep: Int[Tensor, "batch kept"], *, grid: Sequence[int]
    ) -> Float[Tensor, "batch patch voxel"]:
        """Return patch vectors of the whole `grid` in `patchify` order from CLS and the tokens at `keep`."""
        full_grid = triple(grid)
        embedded = self.embed(tokens)
        canvas = self.mask_token.to(embedded.dtype).expand(len(tokens), math.prod(full_grid), -1)
        places = keep[..., None].expand(-1, -1, self.dim)
        hidden = torch.cat([embedded[:, :1], canvas.scatter(1, places, embedded[:, 1:])], dim=1)
        hidden = hidden + self.positions(full_grid)
        for block in self.blocks:
            hidden = self.run_block(block, hidden)
        return self.pred(self.norm(hidden))[:, 1:]
