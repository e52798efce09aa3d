"""The embedding network of SAM: an inflated ResNet-18 that gives every voxel a fine and a coarse vector."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medssl.models.stem import fit_stem
from medssl.ops.patches import Triple

FLAT, CUBE = (1, 3, 3), (3, 3, 3)
STAGES: tuple[tuple[int, Triple, Triple], ...] = (
    (1, FLAT, (1, 2, 2)),
    (2, FLAT, (1, 2, 2)),
    (4, CUBE, (1, 2, 2)),
    (8, CUBE, (2, 2, 2)),
)
"""Width (times the base width), kernel and stride of the four stages, along z, y, x."""


class ConvNorm(nn.Module):
    """Convolution and batch norm (`conv.*`, `bn.*`), with or without a ReLU behind them."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: Triple, stride: Triple = (1, 1, 1), act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, same_padding(kernel), bias=False)
        self.bn = nn.BatchNorm3d(out_channels)
        self.act = act

    def forward(self, x: Float[Tensor, "batch channel z y x"]) -> Float[Tensor, "batch width k j i"]:
        """Return the filtered and normalised input, rectified where `act` is set."""
        x = self.bn(self.conv(x))
        return F.relu(x, inplace=True) if self.act else x


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is a 1x1x1 convolution where size or width change."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, kernel=kernel, stride=stride)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel=kernel, act=False)
        same = in_channels == out_channels and stride == (1, 1, 1)
        self.downsample = (
            None if same else ConvNorm(in_channels, out_channels, kernel=(1, 1, 1), stride=stride, act=False)
        )

    def forward(self, x: Float[Tensor, "batch channel z y x"]) -> Float[Tensor, "batch width k j i"]:
        """Return the rectified sum."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(self.conv1(x)) + shortcut, inplace=True)


class SamBackbone(nn.Module):
    """Stem and four stages of two blocks; along z only stage 1 (by pooling) and stage 4 (by stride) halve."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, in_channels: int, base_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, base_channels, kernel=(3, 7, 7))
        before = base_channels
        for number, (factor, kernel, stride) in enumerate(STAGES, start=1):
            width = factor * base_channels
            first = BasicBlock(before, width, kernel=kernel, stride=stride)
            second = BasicBlock(width, width, kernel=kernel, stride=(1, 1, 1))
            self.add_module(f"layer{number}", nn.Sequential(first, second))
            before = width

    def forward(self, image: Float[Tensor, "batch channel z y x"]) -> list[Float[Tensor, "batch width k j i"]]:
        """Return the maps of the four stages."""
        maps = [F.max_pool3d(self.layer1(self.conv1(image)), (2, 1, 1))]
        for stage in (self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps


class Lateral(nn.Module):
    """A convolution with bias under the name `conv`."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: Triple) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, padding=same_padding(kernel))

    def forward(self, x: Float[Tensor, "batch channel z y x"]) -> Float[Tensor, "batch width z y x"]:
        """Return the filtered input."""
        return self.conv(x)


class Pyramid(nn.Module):
    """1x1x1 convolutions to one width, summed from coarse to fine, and a 3x3x3 convolution on the finest map."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Lateral(width, dim, kernel=(1, 1, 1)) for width in widths)
        self.fpn_convs = nn.ModuleList([Lateral(dim, dim, kernel=CUBE)])

    def forward(self, maps: Sequence[Float[Tensor, "batch _ _ _ _"]]) -> Float[Tensor, "batch dim z y x"]:
        """Return one map at the size of the first."""
        levels = [lateral(level) for lateral, level in zip(self.lateral_convs, maps, strict=True)]
        total = levels.pop()
        while levels:
            finer = levels.pop()
            total = finer + F.interpolate(total, size=finer.shape[2:], mode="nearest")
        return self.fpn_convs[0](total)


class SamResNet(nn.Module):
    """Network of self-supervised anatomical embedding: unit vectors for every second voxel, and coarse ones.

    The coarse vectors have a wider context. The network's frame is (z, y, x) with indices growing to superior,
    posterior and left, at 2 mm; `Reoriented` with axes `SPL` gives it our views. Names of tensors are those of
    published files. Batch norm runs over all images of a batch.

    Args:
        base_channels: Channels of the stem; the stages have 1, 2, 4 and 8 times as many.
        emb_dim: Channels of both maps.
        in_channels: Channels of the image.

    Source: arXiv:2012.02383.
    """

    def __init__(self, *, base_channels: int = 64, emb_dim: int = 128, in_channels: int = 1) -> None:
        super().__init__()
        self.in_channels, self.channels = in_channels, (emb_dim, emb_dim)
        self.strides = ((2, 2, 2), (4, 16, 16))
        widths = [factor * base_channels for factor, _, _ in STAGES]
        self.backbone = SamBackbone(in_channels, base_channels)
        self.neck = Pyramid(widths[:3], emb_dim)
        self.read_out_head = Pyramid(widths[3:], emb_dim)
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for pyramid in (self.neck, self.read_out_head):
            for module in pyramid.modules():
                if isinstance(module, nn.Conv3d) and module.bias is not None:
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def forward(
        self, image: Float[Tensor, "batch channel z y x"], coordinate: Tensor | None = None
    ) -> list[Float[Tensor, "batch dim k j i"]]:
        """Return the fine map (half the size) and the coarse one, in float32, of length 1 over channels.

        `coordinate` is accepted and not used.

        Raises:
            ValueError: The image is a single slice.
        """
        if image.shape[2] < 2:
            raise ValueError(f"the embedding network halves z: it needs two slices or more, got {image.shape[2]}")
        *fine, coarse = self.backbone(image)
        return [F.normalize(x.float(), dim=1) for x in (self.neck(fine), self.read_out_head([coarse]))]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with the stem fitted to this network's input channels."""
        return fit_stem(tensors, "backbone.conv1.conv.weight", self.in_channels)


def same_padding(kernel: Triple) -> Triple:
    """Return the padding that keeps the size at stride 1."""
    a, b, c = kernel
    return a // 2, b // 2, c // 2
