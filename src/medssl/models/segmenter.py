"""An encoder and a decoder that together label every voxel."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from medssl.building import NETWORKS, build_trusted, trusted_class
from medssl.models.conditioned import ConditionedEncoder
from medssl.models.conv_blocks import CONVOLUTIONS, UPSAMPLINGS
from medssl.models.reoriented import Reoriented
from medssl.models.unet import halvings
from medssl.models.vit import VisionTransformer
from medssl.ops.patches import triple

UNET, UNETR = "medssl.models.unet.UNetDecoder", "medssl.models.unetr.UNETRDecoder"


class Segmenter(nn.Module):
    """Encoder, decoder and one output layer for each supervised resolution.

    Args:
        encoder: Network of maps described by its `channels` and `strides`.
        decoder: Network of decoded maps described by its `channels` and `strides`, fine to coarse. Where the first is
            coarser than the image (nnFormer), the output layers are transposed convolutions of that stride.
        num_classes: Number of classes, background included.
        deep_supervision: Number of coarser resolutions at which `outputs` also gives logits.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, num_classes: int, *, deep_supervision: int = 0) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a segmenter needs the background and at least one class")
        widths, strides = levels(decoder)
        if not 0 <= deep_supervision < len(widths):
            raise ValueError(f"deep_supervision is {deep_supervision}, this decoder allows 0 to {len(widths) - 1}")
        self.encoder, self.decoder, self.num_classes = encoder, decoder, num_classes
        supervised = widths[: 1 + deep_supervision]
        self.head = nn.ModuleList(output_layer(width, num_classes, step=strides[0]) for width in supervised)
        self.takes_coordinate = bool(getattr(encoder, "takes_coordinate", False))
        self.multiple_voxel = tuple(math.lcm(*steps) for steps in zip(*levels(encoder)[1], strict=True))

    def forward(
        self,
        image: Float[Tensor, "batch channel *spatial"],
        coordinate: Float[Tensor, "batch 3 *spatial"] | None = None,
    ) -> Float[Tensor, "batch class *spatial"]:
        """Return logits at full resolution.

        Where `takes_coordinate` is set, `coordinate` says where every voxel lies: -1 to 1 from face to face of the
        body box. Outside the box it is that of the nearest face.

        Raises:
            ValueError: A side is no multiple of `multiple_voxel`, or the image has another number of channels.
        """
        return self.head[0](self._decoded(image, coordinate)[0])

    def outputs(
        self,
        image: Float[Tensor, "batch channel *spatial"],
        coordinate: Float[Tensor, "batch 3 *spatial"] | None = None,
    ) -> list[Float[Tensor, "batch class *coarse"]]:
        """Return logits of every supervised resolution, full resolution first."""
        supervised = self._decoded(image, coordinate)[: len(self.head)]
        return [head(level) for head, level in zip(self.head, supervised, strict=True)]

    def parts(self) -> dict[str, nn.Module]:
        """Return the networks that a file holds, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder, "head": self.head}

    def _decoded(self, image: Tensor, coordinate: Tensor | None) -> list[Tensor]:
        size = tuple(image.shape[2:])
        if any(side % step for side, step in zip(size, self.multiple_voxel, strict=True)):
            fitting = tuple(-(-side // step) * step for side, step in zip(size, self.multiple_voxel, strict=True))
            raise ValueError(
                f"an image of {size} voxels does not fit this network: sides must be multiples of "
                f"{self.multiple_voxel}; use crops of such a size, for instance {fitting}"
            )
        expected = getattr(self.encoder, "in_channels", None)
        if expected not in (None, image.shape[1]):
            raise ValueError(f"the network reads {expected} channels, the image has {image.shape[1]}")
        return self.decoder(image, self.encoder(image, coordinate) if self.takes_coordinate else self.encoder(image))


def build_segmenter(
    encoder_recipe: Mapping[str, Any],
    decoder_recipe: Mapping[str, Any] | None,
    *,
    num_classes: int,
    in_channels: int,
    deep_supervision: int = 0,
    allow_modules: Sequence[str] = (),
) -> tuple[Segmenter, dict[str, Any]]:
    """Build a segmenter with fresh weights, and the completed recipes that build the same one again.

    Without a decoder recipe, an encoder whose maps share one stride gets a `UNETRDecoder` with a sixteenth of its width
    at full resolution (16 to 48 channels, 48 for a ViT-B as in UNETR). Any other encoder gets its `usual_decoder` (a
    recipe) or a `UNetDecoder`. A `VisionTransformer` is built without CLS token unless its recipe names `class_token`.
    For a `UNETRDecoder` it has as many maps as that has steps (see `skip_depths`), unless its recipe names
    `feature_depths`. A `ConditionedEncoder` ends at a sixteenth of the resolution unless its recipe names `num_maps`.

    Raises:
        ValueError: A class lies outside the trusted packages, or the networks do not fit together.
    """
    encoder, decoder, recipes = build_networks(
        encoder_recipe, decoder_recipe, in_channels=in_channels, allow_modules=allow_modules
    )
    network = Segmenter(encoder, decoder, num_classes, deep_supervision=deep_supervision)
    return network, {**recipes, "num_classes": num_classes, "deep_supervision": deep_supervision}


def build_networks(
    encoder_recipe: Mapping[str, Any],
    decoder_recipe: Mapping[str, Any] | None,
    *,
    in_channels: int,
    allow_modules: Sequence[str] = (),
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Build encoder and decoder by the rules of `build_segmenter`, and their completed recipes under these names.

    Raises:
        ValueError: A class lies outside the trusted packages, or the networks do not fit together.
    """
    packages = (*NETWORKS, *allow_modules)
    encoder_recipe, decoder_recipe = dict(encoder_recipe), dict(decoder_recipe) if decoder_recipe else None
    wrapped = issubclass(trusted_class(encoder_recipe, packages, base=nn.Module), Reoriented)
    net = {**(encoder_recipe.get("net") or {} if wrapped else encoder_recipe), "in_channels": in_channels}
    kind = trusted_class(net, packages, base=nn.Module)
    if issubclass(kind, VisionTransformer):
        from medssl.models.unetr import UNETRDecoder  # brings MONAI, seconds that other networks need not wait

        decoder_recipe = decoder_recipe or _unetr_recipe(_option(net, kind, "dim"))
        net.setdefault("class_token", False)
        for_unetr = issubclass(trusted_class(decoder_recipe, packages, base=nn.Module), UNETRDecoder)
        if for_unetr and net.get("feature_depths") is None:
            num_steps = len(halvings(triple(_option(net, kind, "patch_voxel"))))
            net["feature_depths"] = skip_depths(_option(net, kind, "depth"), num_steps)
    if issubclass(kind, ConditionedEncoder):
        net.setdefault("num_maps", 5)
    encoder_recipe = {**encoder_recipe, "net": net} if wrapped else net
    encoder = build_trusted(encoder_recipe, packages, nn.Module)
    channels, strides = levels(encoder)
    if decoder_recipe is None:
        usual = getattr(getattr(encoder, "net", encoder), "usual_decoder", {"_target_": UNET})
        decoder_recipe = _unetr_recipe(channels[-1]) if len(set(strides)) == 1 else usual
    fitted = {"in_channels": in_channels, "encoder_channels": channels, "encoder_strides": strides}
    decoder = build_trusted({**decoder_recipe, **fitted}, packages, nn.Module)
    return encoder, decoder, {"encoder": encoder_recipe, "decoder": decoder_recipe}


def output_layer(width: int, out_channels: int, *, step: Sequence[int]) -> nn.Module:
    """Build the layer to full resolution: a 1x1x1 convolution, or a transposed one of stride `step`."""
    if set(step) == {1}:
        return CONVOLUTIONS[len(step)](width, out_channels, 1)
    return UPSAMPLINGS[len(step)](width, out_channels, tuple(step), stride=tuple(step))


def skip_depths(depth: int, num_maps: int) -> list[int]:
    """Return the numbers of finished blocks of a transformer after which it gives a map.

    These are after the first block of each later part of equal length, and after all blocks. For 12 blocks and four
    maps they are 4, 7, 10 and 12, those of UNETR (arXiv:2103.10504).
    """
    return [depth * part // num_maps + 1 for part in range(1, num_maps)] + [depth]


def levels(network: nn.Module) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return channels and strides (voxels, two or three axes) of a network's maps.

    Raises:
        ValueError: The network lacks the attributes `channels` and `strides`, or they differ in length.
    """
    channels, strides = getattr(network, "channels", None), getattr(network, "strides", None)
    if not channels or not strides or len(channels) != len(strides):
        raise ValueError(
            f"{type(network).__name__} cannot be part of a segmenter: it needs the attributes `channels` and `strides` "
            "with one entry for each of its maps"
        )
    steps = [tuple(map(int, s)) if isinstance(s, Sequence) and len(s) == 2 else triple(s) for s in strides]
    return [int(width) for width in channels], steps


def _unetr_recipe(width: int) -> dict[str, Any]:
    return {"_target_": UNETR, "feature_size": min(48, max(16, width // 16))}


def _option(recipe: Mapping[str, Any], kind: type, name: str) -> Any:
    return recipe.get(name, inspect.signature(kind).parameters[name].default)
