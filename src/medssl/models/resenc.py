"""The residual convolutional encoder of nnU-Net (ResEnc)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from medssl.models.stem import fit_stem
from medssl.models.unet import SLOPE, ConvNormAct, PerStage, check_coarsest, cumulative, run, stage_geometry
from medssl.ops.patches import Triple


class ResidualBlock(nn.Module):
    """Two convolutions added to their input, which is averaged and projected where size or width change."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_channels, out_channels, kernel=kernel, stride=stride)
        self.conv2 = ConvNormAct(out_channels, out_channels, kernel=kernel, act=False)
        pool = nn.Identity() if stride == (1, 1, 1) else nn.AvgPool3d(stride, stride)
        same = in_channels == out_channels
        project = nn.Identity() if same else ConvNormAct(in_channels, out_channels, kernel=(1, 1, 1), act=False)
        self.skip = nn.Sequential(pool, project)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, x: Float[Tensor, "batch channel x y z"]) -> Float[Tensor, "batch width i j k"]:
        """Return the rectified sum."""
        return self.act(self.conv2(self.conv1(x)).add_(self.skip(x)))


class ResidualEncoder(nn.Module):
    """A stem convolution, then stages of residual blocks as in nnU-Net's ResEnc, the first of each stage strided.

    Args:
        in_channels: Channels of the image.
        widths: Channels of the stages.
        strides: Step of each stage, one integer or one for each axis; null is 1, then 2. The attribute `strides` holds
            the product of the steps up to each stage, in voxels.
        blocks: Residual blocks in each stage.
        kernels: One odd side for all stages, or one (or three) for each stage.
        checkpoint_activations: Recompute activations in the backward pass.

    Source: arXiv:2404.09556.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64, 128, 256, 320),
        strides: PerStage | None = None,
        blocks: Sequence[int] = (1, 3, 4, 6, 6),
        kernels: PerStage = 3,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths) or min(blocks) < 1:
            raise ValueError(f"blocks must give a number above 0 for each of the {len(widths)} stages, got {blocks}")
        steps, sides = stage_geometry(strides, kernels, len(widths))
        self.in_channels, self.channels = in_channels, tuple(widths)
        self.strides = cumulative(steps)
        self.checkpoint_activations = checkpoint_activations
        self.stem = ConvNormAct(in_channels, widths[0], kernel=sides[0])
        incoming = (widths[0], *widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(before, width, kernel=kernel, stride=step),
                *(ResidualBlock(width, width, kernel=kernel) for _ in range(count - 1)),
            )
            for before, width, step, kernel, count in zip(incoming, widths, steps, sides, blocks, strict=True)
        )

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], coordinate: Tensor | None = None
    ) -> list[Float[Tensor, "batch width i j k"]]:
        """Return one map for each stage, fine to coarse; `coordinate` is accepted and not used.

        Raises:
            ValueError: The coarsest map would have a single voxel, which instance norm turns to zero.
        """
        check_coarsest(image, self.strides[-1])
        maps = [self.stem(image)]
        for stage in self.stages:
            maps.append(run(stage, maps[-1], checkpointed=self.checkpoint_activations))
        return maps[1:]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with the stem fitted to this network's input channels."""
        return fit_stem(tensors, "stem.conv.weight", self.in_channels)
