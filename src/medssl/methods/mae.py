"""MAE: masked autoencoding of crops by a U-Net or a vision transformer, and SimMIM."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.checks import choice, switch, triple
from medssl.data.views import View
from medssl.losses.reconstruction import ERRORS, patch_statistics, voxel_error
from medssl.methods.base import Method, Progress, StepOutput, Transfer
from medssl.models.masked_transformer import MaskedAutoencoder, SimMIM
from medssl.models.reconstructor import Reconstructor
from medssl.models.segmenter import channels_read, complete_recipe
from medssl.models.shape_trial import check_crop, check_multiple
from medssl.models.vit import MaskedDecoder, VisionTransformer
from medssl.models.volume_networks import VOLUME_NETWORKS, check_encoder, fitting
from medssl.ops.gather import rank_and_world, sum_over_ranks
from medssl.ops.masking import (
    FILLS,
    TokenMask,
    drawn_ratio,
    num_kept,
    random_mask,
    ratio_range,
    voxel_mask,
    without_hidden,
)
from medssl.ops.patches import patch_grid, patchify, unpatchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS, LOSS_ON = ("cnn", "vit", "simmim"), ("hidden", "everywhere")
SIZE = "views.groups.crop.size"


class MAE(Method):
    """Masked autoencoder: most blocks of a crop are hidden, and a network predicts their voxels from the others.

    The view group `crop` holds one or several crops of each volume, which count as samples. Each sample has a mask of
    its own at each step. Where the view knows which voxels lie inside the volume (`valid`), the others do not count.

    Args:
        encoder: Network that is trained for later use.
        decoder: `cnn`: network of decoded maps, None is the encoder's usual one. `vit`: a `MaskedDecoder`. `simmim`:
            None.
        form: `cnn`: hidden voxels are filled, and encoder, decoder and skips see the whole crop. `vit`: the transformer
            computes visible patches alone. `simmim`: it computes all patches, the hidden ones as mask tokens, and a
            linear layer predicts the voxels.
        mask_ratio: Share of the blocks that is hidden; [low, high] draws a share for each step, equal for all samples.
        block_voxel: Sides of a block, of which those of the crop are multiples; the patch for `vit` and `simmim`.
        fill: Value of hidden voxels in the form `cnn`: `zero`, for images whose mean is 0, or `mean` of the visible
            voxels of each sample and channel.
        loss_on: Voxels whose error is averaged, `hidden` or `everywhere`.
        error: `mse` for the squared error, `l1` for the absolute one.
        norm_pix: Whether the target is normed, block by block, to mean 0 and standard deviation 1.
        crop_voxel: Size of the crops, tried here on the networks; None leaves the check to the first batch.

    Source: arXiv:2111.06377; arXiv:2410.23132 for `cnn`; arXiv:2111.09886 for `simmim`.
    """

    networks = VOLUME_NETWORKS  # of the form `cnn`

    def __init__(
        self,
        *,
        encoder: nn.Module,
        decoder: nn.Module | None = None,
        form: str = "cnn",
        mask_ratio: float | Sequence[float] = 0.75,
        block_voxel: int | Sequence[int] = 16,
        fill: str = "zero",
        loss_on: str = "hidden",
        error: str = "mse",
        norm_pix: bool = False,
        crop_voxel: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.form, self.fill = choice("method.form", form, FORMS), choice("method.fill", fill, FILLS)
        self.loss_on, self.error = choice("method.loss_on", loss_on, LOSS_ON), choice("method.error", error, ERRORS)
        self.norm_pix, self.ratios = switch("method.norm_pix", norm_pix), ratio_range("method.mask_ratio", mask_ratio)
        self.block_voxel = triple("method.block_voxel", block_voxel)
        self.decays_all = form != "vit"  # the released recipes; in arXiv:2111.06377 biases and norms do not decay
        self.takes_reoriented = form == "cnn"
        if form != "cnn" and fill != "zero":
            raise ValueError(
                f"method.fill={fill} is for form=cnn; transformers read no hidden voxels, leave it at zero"
            )
        self.network = _network(form, encoder, decoder)
        if form != "cnn" and self.block_voxel != (patch := triple("method.encoder.patch_voxel", encoder.patch_voxel)):
            raise ValueError(
                f"method.form={form} hides whole patches: method.block_voxel={list(self.block_voxel)} must be "
                f"method.encoder.patch_voxel={list(patch)}"
            )
        if crop_voxel is not None:
            self._check_crop(triple(SIZE, crop_voxel))

    @staticmethod
    def complete_recipe(keywords: Mapping[str, Any], packages: Sequence[str] | None) -> dict[str, Any]:
        """Return the keywords; in the form `cnn` the encoder's recipe is that of a network with a dense prediction."""
        return complete_recipe(keywords, packages) if keywords.get("form", "cnn") == "cnn" else dict(keywords)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The encoder."""
        return self.network.encoder  # type: ignore[return-value]

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the error of the predicted voxels."""
        if "crop" not in batch:
            raise ValueError(f"MAE needs a view group called `crop`; the batch has {sorted(batch)}")
        view = batch["crop"]
        image = view.image.flatten(0, 1)  # crops of one volume are samples, (row, channel, x, y, z)
        mask = self._mask(image, progress)
        hidden = self._hidden(mask, image)
        prediction = self.predict(image, mask)
        counted = hidden if self.loss_on == "hidden" else torch.ones_like(hidden)
        num_counted = None
        if view.valid is not None:
            counted = counted & view.valid.flatten(0, 1)
            num_counted = sum_over_ranks(counted.sum()) / rank_and_world()[1]  # the mean over all ranks' voxels
        target = self._target(image)
        options: dict[str, Any] = {"error": self.error, "num_counted": num_counted}
        loss = voxel_error(prediction, target, counted, **options)  # arXiv:2111.06377: on hidden voxels alone
        logs = {"reconstruction": loss.detach()}
        logs["zero_prediction"] = voxel_error(torch.zeros_like(target), target, counted, **options)
        logs["mask_ratio"] = mask.masked.to(loss.dtype).mean()
        extras = {"hidden": hidden, "prediction": prediction.detach()} if progress.with_extras else {}
        return StepOutput(loss, logs, extras)

    def predict(self, image: Float[Tensor, "row channel x y z"], mask: TokenMask) -> Float[Tensor, "row channel x y z"]:
        """Return the prediction at full resolution; hidden voxels of the image have no influence on it."""
        if self.form == "cnn":
            return self.network(without_hidden(image, self._hidden(mask, image), fill=self.fill))
        return self.network(image, mask)

    def parts(self) -> dict[str, nn.Module]:
        """Return encoder, decoder and output layer, as far as the form has them."""
        return dict(self.network.named_children())

    def transfers(self) -> Transfer:
        """Return that segmenters start from the encoder, and from the decoder of a U-Net where the user wishes it."""
        if self.form != "cnn":
            return super().transfers()
        return Transfer({"encoder": "encoder", "decoder": "decoder"}, {"decoder_part": "none"})

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw input, masked input and reconstruction of the first crop, in three orthogonal slices."""
        from medssl.ops.panels import orthogonal_slices

        image, hidden = batch["crop"].image[0, :1], extras["hidden"][:1]
        prediction = extras["prediction"][:1].to(image)
        if self.norm_pix:
            mean, std = patch_statistics(patchify(image, self.block_voxel))
            prediction = self._volume(patchify(prediction, self.block_voxel) * std + mean, image)
        volumes = {
            "input": image,
            "masked": image.masked_fill(hidden, float("nan")),
            "reconstruction": torch.where(hidden, prediction, image),
        }
        title = f"{hidden.float().mean():.0%} hidden, step {progress.step}"
        return {"crop": orthogonal_slices({name: one[0, 0] for name, one in volumes.items()}, title=title)}

    def _mask(self, image: Tensor, progress: Progress) -> TokenMask:
        """Return the mask of each sample over the blocks; it is drawn in evaluation mode too."""
        everywhere = replace(progress, rank=0, micro=0)  # one ratio for all samples of a step
        ratio = drawn_ratio(self.ratios, everywhere.generator("mask_ratio"))
        num_cells = math.prod(patch_grid(image.shape[2:], self.block_voxel))
        generator = progress.generator("mask", image.device)
        return random_mask(torch.rand(len(image), num_cells, generator=generator, device=image.device), ratio=ratio)

    def _hidden(self, mask: TokenMask, image: Tensor) -> Bool[Tensor, "row 1 x y z"]:
        cells = mask.masked.unflatten(1, patch_grid(image.shape[2:], self.block_voxel))[:, None]
        return voxel_mask(cells, image.shape[2:])

    def _target(self, image: Float[Tensor, "row channel x y z"]) -> Float[Tensor, "row channel x y z"]:
        if not self.norm_pix:
            return image
        patches = patchify(image, self.block_voxel)
        mean, std = patch_statistics(patches)
        return self._volume((patches - mean) / std, image)

    def _volume(self, patches: Tensor, image: Tensor) -> Tensor:
        return unpatchify(patches, patch_grid(image.shape[2:], self.block_voxel), patch_voxel=self.block_voxel)

    def _check_crop(self, sides: tuple[int, int, int]) -> None:
        """Check that crops consist of whole blocks, that the ratio fits them, and that the networks take them.

        Raises:
            ValueError: They do not.
        """
        check_multiple(sides, self.block_voxel, setting=SIZE, of="method.block_voxel")
        for ratio in self.ratios:
            num_kept(math.prod(patch_grid(sides, self.block_voxel)), ratio)
        if isinstance(self.network, Reconstructor):  # in the other forms a block is a patch, the stride of all maps
            check_crop(self.network, self.encoder, sides, setting=SIZE)


def _network(form: str, encoder: nn.Module, decoder: nn.Module | None) -> nn.Module:
    """Return the network of a form.

    Raises:
        ValueError: Encoder or decoder do not fit it.
    """
    if form == "cnn":
        if isinstance(decoder, MaskedDecoder):
            raise ValueError("method.form=cnn takes no MaskedDecoder; take method.form=vit, or method.decoder=null")
        check_encoder(encoder, method="MAE")
        return Reconstructor(encoder, decoder, out_channels=channels_read(encoder))
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(
            f"method.form={form} trains a VisionTransformer, not {type(encoder).__name__}; take method=mae_vit; with "
            f"method.form=cnn, {fitting(VOLUME_NETWORKS)}"
        )
    if form == "vit":
        if not isinstance(decoder, MaskedDecoder):
            raise ValueError("method.form=vit needs a MaskedDecoder as method.decoder")
        return MaskedAutoencoder(encoder, decoder)
    if decoder is not None:
        raise ValueError("method.form=simmim has a linear layer in place of a decoder; give method.decoder=null")
    return SimMIM(encoder)
