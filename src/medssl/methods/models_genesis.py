"""Models Genesis: a network gives back the crop that was shuffled, mapped to other intensities and painted over."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medssl.checks import share, whole
from medssl.data.views import View
from medssl.methods.base import Method, Progress, StepOutput, Transfer
from medssl.models.reconstructor import Reconstructor
from medssl.models.segmenter import channels_read
from medssl.models.shape_trial import check_crop
from medssl.models.volume_networks import VOLUME_NETWORKS, check_encoder
from medssl.ops.deformations import (
    MOST_PAINTED,
    Deformation,
    Windows,
    check_sides,
    deform,
    inpainted_windows,
    kept_windows,
    shuffle_windows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = "views.groups.crop.size"
ROUNDING = 1e-3
"""How far intensities may lie outside [0, 1]."""


class ModelsGenesis(Method):
    """Reconstruction of deformed crops by an encoder and a decoder with skips.

    The view group `crop` holds one view of each sample, with intensities in [0, 1]. It is deformed by three steps, each
    with a probability: voxels are permuted within small windows, intensities are mapped by a random curve, and noise is
    painted into windows or around them. The target is the crop before its deformation.

    Args:
        network: Encoder, decoder and output layer for volumes.
        crop_voxel: Size of the crops, checked here; None leaves the check to the first batch.
        probability_shuffle: Probability that a crop is shuffled.
        num_windows: Windows of a shuffle, whatever the size of the crop.
        window_divisor: The longest side of such a window is that of the crop over this number.
        probability_intensity: Probability that intensities are mapped.
        probability_paint: Probability that a crop is painted.
        inpaint_share: Share of in-painting among the painted crops; the others are out-painted.

    Source: arXiv:1908.06912; the draws follow the released code as our method card describes them.
    """

    networks = VOLUME_NETWORKS

    def __init__(
        self,
        *,
        network: Reconstructor,
        crop_voxel: Sequence[int] | None = None,
        probability_shuffle: float = 0.5,
        num_windows: int = 10_000,
        window_divisor: int = 10,
        probability_intensity: float = 0.9,
        probability_paint: float = 0.9,
        inpaint_share: float = 0.2,
    ) -> None:
        super().__init__()
        check_encoder(network.encoder, method="Models Genesis")
        self.network = network
        self.num_windows = whole("method.num_windows", num_windows, least=1)
        self.window_divisor = whole("method.window_divisor", window_divisor, least=1, most=16)
        self.probability_shuffle = share("method.probability_shuffle", probability_shuffle)
        self.probability_intensity = share("method.probability_intensity", probability_intensity)
        self.probability_paint = share("method.probability_paint", probability_paint)
        self.inpaint_share = share("method.inpaint_share", inpaint_share)
        read, predicted = channels_read(network.encoder), network.head.out_channels
        if read != predicted:
            raise ValueError(
                f"method.network.out_channels={predicted}: crops have {read} channels, and all of them are predicted; "
                f"give {read}"
            )
        if crop_voxel is not None:
            check_crop(network, network.encoder, check_sides(crop_voxel, setting=SIZE), setting=SIZE)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The encoder of the network."""
        return self.network.encoder

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the mean squared error over all voxels.

        The logs hold beside it the error of two predictions that need no network: the deformed crop, and the mean of
        each crop.
        """
        image = _crop(batch)
        stages = deform(image, self.draw(image, progress))
        prediction = self.network(stages.painted)
        with torch.autocast(image.device.type, enabled=False):
            loss = F.mse_loss(prediction.to(image.dtype), image)
            logs = {
                "reconstruction": loss.detach(),
                "error_of_input": F.mse_loss(stages.painted, image),
                "error_of_mean": image.var((1, 2, 3, 4), correction=0).mean(),
            }
        extras = {}
        if progress.with_extras:
            extras = {name: stage[:1] for name, stage in stages._asdict().items()}
            extras["prediction"] = prediction[:1].detach().to(image.dtype)
        return StepOutput(loss, logs, extras)

    def draw(self, image: Float[Tensor, "batch channel x y z"], progress: Progress) -> Deformation:
        """Return the deformation of each crop of a micro-batch."""
        num_crops, size, device = len(image), image.shape[2:], image.device

        def noise(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            generator = progress.generator(f"genesis/{name}", device)
            return torch.rand(*shape, generator=generator, device=device, dtype=dtype)

        acts = noise("acts", num_crops, 5)
        drawn = shuffle_windows(noise("shuffle", num_crops, self.num_windows, 2, 3), size, divisor=self.window_divisor)
        shuffled = drawn.without(acts[:, :1] >= self.probability_shuffle)
        inside = acts[:, 3] < self.inpaint_share
        windows, chance = noise("paint", num_crops, MOST_PAINTED, 2, 3), noise("painted", num_crops, MOST_PAINTED)
        inner, outer = (place(windows, chance, size) for place in (inpainted_windows, kept_windows))
        painted = Windows(*(torch.where(inside.view(-1, 1, 1), a, b) for a, b in zip(inner, outer, strict=True)))
        idle = acts[:, 2] >= self.probability_paint  # nothing inside of no window is painted
        return Deformation(
            shuffled=shuffled,
            keys=noise("keys", int(shuffled.volume().sum()), dtype=torch.float64),
            controls=noise("curve", num_crops, 4),
            increasing=acts[:, 4] < 0.5,
            mapped=acts[:, 1] < self.probability_intensity,
            painted=painted.without(idle[:, None]),
            inside=inside | idle,
            noise=noise("fill", *image.shape).to(image.dtype),
        )

    def parts(self) -> dict[str, nn.Module]:
        """Return encoder, decoder and output layer."""
        return {"encoder": self.network.encoder, "decoder": self.network.decoder, "head": self.network.head}

    def transfers(self) -> Transfer:
        """Return that segmenters start from the encoder and, where the user asks for it, from the decoder too."""
        places = {"encoder": "network.encoder", "decoder": "network.decoder"}
        return Transfer(places, {"decoder_part": "none"})  # as the benchmark compares methods

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw the first crop, the same after each step of its deformation, and what the network makes of the last."""
        from medssl.ops.panels import orthogonal_slices

        panels = {"crop": _crop(batch)[0, 0]}
        panels |= {title: extras[title][0, 0] for title in ("shuffled", "mapped", "painted", "prediction")}
        return {"reconstruction": orthogonal_slices(panels, title=f"deformed and restored, step {progress.step}")}


def _crop(batch: Mapping[str, View]) -> Float[Tensor, "batch channel x y z"]:
    """Return the crops.

    Raises:
        ValueError: The batch has no group `crop` of single views, or intensities are not in [0, 1].
    """
    if "crop" not in batch or batch["crop"].image.shape[1] != 1:
        found = {name: view.image.shape[1] for name, view in batch.items()}
        raise ValueError(f"Models Genesis needs a view group `crop` with one view; the batch has {found}")
    image = batch["crop"].image[:, 0]
    low, high = (bound.item() for bound in image.aminmax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f"Models Genesis maps and paints intensities in [0, 1]; the crops have {low:.3g} to {high:.3g}. Normalise "
            "by medssl.data.augment.ByModality with out: [0, 1]"
        )
    return image
