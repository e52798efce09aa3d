"""An encoder and a decoder that together label every voxel."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.building import NETWORKS, build, build_network, named_class, takes
from medssl.models.conv_blocks import CONVOLUTIONS, UPSAMPLINGS, fit_axes
from medssl.models.reoriented import Reoriented
from medssl.ops.patches import axes_of

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
        self.head = OutputLayers(output_layer(width, num_classes, step=strides[0]) for width in supervised)
        self.takes_coordinate = bool(getattr(encoder, "takes_coordinate", False))
        self.takes_points = bool(getattr(encoder, "takes_points", False))
        self.multiple_voxel = tuple(math.lcm(*steps) for steps in zip(*levels(encoder)[1], strict=True))

    def forward(
        self,
        image: Float[Tensor, "batch channel *spatial"],
        coordinate: Float[Tensor, "batch 3 *spatial"] | None = None,
        *,
        points: Float[Tensor, "batch n axis"] | None = None,
        valid: Bool[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch class *spatial"]:
        """Return logits at full resolution.

        Where `takes_coordinate` is set, `coordinate` says where every voxel lies: -1 to 1 from face to face of the
        body box. Outside the box it is that of the nearest face. Where `takes_points` is set, `points` are keypoints in
        voxels of the image, of which the `valid` ones count; without them the encoder finds its own.

        Raises:
            ValueError: A side is no multiple of `multiple_voxel`, the image has another number of channels, or points
                are given to an encoder that takes none.
        """
        return self.head[0](self._decoded(image, coordinate, points, valid)[0])

    def outputs(
        self,
        image: Float[Tensor, "batch channel *spatial"],
        coordinate: Float[Tensor, "batch 3 *spatial"] | None = None,
        *,
        points: Float[Tensor, "batch n axis"] | None = None,
        valid: Bool[Tensor, "batch n"] | None = None,
    ) -> list[Float[Tensor, "batch class *coarse"]]:
        """Return logits of every supervised resolution, full resolution first; see `forward`."""
        supervised = self._decoded(image, coordinate, points, valid)[: len(self.head)]
        return [head(level) for head, level in zip(self.head, supervised, strict=True)]

    def parts(self) -> dict[str, nn.Module]:
        """Return the networks that a file holds, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder, "head": self.head}

    def _decoded(
        self, image: Tensor, coordinate: Tensor | None, points: Tensor | None, valid: Tensor | None
    ) -> list[Tensor]:
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
        if points is not None and not self.takes_points:
            raise ValueError(f"{type(self.encoder).__name__} takes no keypoints; leave points out")
        where = (coordinate,) if self.takes_coordinate else ()
        keypoints = {} if points is None else {"points": points, "valid": valid}
        return self.decoder(image, self.encoder(image, *where, **keypoints))


class OutputLayers(nn.ModuleList):
    """The layers to full resolution, one for each supervised resolution."""

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights, those of slices fitted to volumes, and biases of zero for layers that have none there."""
        fitted = fit_axes(tensors, self)
        for name, own in self.state_dict().items():
            if name.endswith(".bias") and name.replace(".bias", ".weight") in fitted:
                fitted.setdefault(name, torch.zeros_like(own))
        return fitted


def build_segmenter(
    encoder_recipe: Mapping[str, Any],
    decoder_recipe: Mapping[str, Any] | None,
    *,
    num_classes: int,
    in_channels: int | None = None,
    deep_supervision: int = 0,
    allow_modules: Sequence[str] = (),
) -> tuple[Segmenter, dict[str, Any]]:
    """Build a segmenter with fresh weights, and the completed recipes that build the same one again.

    The encoder is built as its `segmentation_recipe` says. Without a decoder recipe it gets its `usual_decoder`. An
    encoder that has a keyword `in_channels` is given that number.

    Raises:
        ValueError: A class lies outside the trusted packages, the networks do not fit together, or the encoder reads
            another number of channels than `in_channels`.
    """
    packages = (*NETWORKS, *allow_modules)
    recipes = complete_recipe({"encoder": encoder_recipe, "decoder": decoder_recipe}, packages, in_channels=in_channels)
    encoder = build_network(recipes["encoder"], allow_modules=allow_modules)
    read = channels_read(encoder)
    if in_channels not in (None, read):
        raise ValueError(
            f"{type(getattr(encoder, 'net', encoder)).__name__} reads {read} channels, the images have {in_channels}; "
            "give it a keyword `in_channels`, and an attribute of that name that says what it reads"
        )
    recipes["decoder"] = recipes["decoder"] or usual_decoder(encoder)
    decoder = build_decoder(recipes["decoder"], encoder, packages=packages)
    network = Segmenter(encoder, decoder, num_classes, deep_supervision=deep_supervision)
    return network, {**recipes, "num_classes": num_classes, "deep_supervision": deep_supervision}


def complete_recipe(
    keywords: Mapping[str, Any], packages: Sequence[str] | None, *, in_channels: int | None = None
) -> dict[str, Any]:
    """Return the keywords of a class with encoder and decoder, the encoder's recipe as a segmenter takes it.

    With `in_channels` the encoder is given that number, if its class has such a keyword.

    Raises:
        ValueError: A class cannot be imported or is not trusted.
    """
    if not isinstance(keywords.get("encoder"), Mapping):
        return dict(keywords)  # networks that are there already
    decoder = keywords.get("decoder")
    kind = None if decoder is None else named_class(decoder, packages, base=nn.Module)
    encoder = segmentation_recipe(keywords["encoder"], kind, packages=packages, in_channels=in_channels)
    return {**keywords, "encoder": encoder}


def segmentation_recipe(
    recipe: Mapping[str, Any],
    decoder: type[nn.Module] | None = None,
    *,
    packages: Sequence[str] | None,
    in_channels: int | None = None,
    where: str = "the recipe",
    **wishes: Any,
) -> dict[str, Any]:
    """Return the recipe of an encoder as a segmenter takes it.

    The encoder's class answers with `segmentation_recipe(recipe, decoder, **wishes)`. A class without this method is
    taken as it is.

    Args:
        recipe: Recipe of the encoder.
        decoder: Class of the decoder; None is the encoder's usual one.
        packages: Packages whose classes are trusted; None trusts all.
        in_channels: Channels of the images, for classes with such a keyword; None changes nothing.
        where: Name of the recipe in errors.
        wishes: Further keywords of the class's `segmentation_recipe`.

    Raises:
        ValueError: The class cannot be imported or is not trusted, or it does not know a wish.
    """
    kind = named_class(recipe, packages, base=nn.Module, where=where)
    if issubclass(kind, Reoriented):
        options: dict[str, Any] = {"packages": packages, "in_channels": in_channels, "where": where}
        return {**recipe, "net": segmentation_recipe(recipe.get("net") or {}, decoder, **options, **wishes)}
    completed = dict(recipe)
    if in_channels is not None and takes(kind, "in_channels"):
        completed["in_channels"] = in_channels
    answer = getattr(kind, "segmentation_recipe", None)
    if unknown := [name for name in wishes if answer is None or not takes(answer, name)]:
        raise ValueError(f"{where} knows no {', '.join(unknown)}; leave it out")
    return completed if answer is None else dict(answer(completed, decoder, **wishes))


def build_decoder(recipe: Mapping[str, Any], encoder: nn.Module, *, packages: Sequence[str] | None) -> nn.Module:
    """Build the decoder of a recipe for the maps of `encoder`.

    Raises:
        ValueError: The class is not trusted or does not fit the encoder, or the encoder does not describe its maps.
    """
    levels(encoder)
    if takes(named_class(recipe, packages, base=nn.Module), "in_channels"):
        recipe = {**recipe, "in_channels": channels_read(encoder)}
    return build(recipe, base=nn.Module, packages=packages, before={"encoder": encoder})


def channels_read(encoder: nn.Module) -> int:
    """Return the number of channels that an encoder reads: its attribute `in_channels`, or 1 without it."""
    read = getattr(encoder, "in_channels", None)
    return 1 if read is None else int(read)


def usual_decoder(encoder: nn.Module) -> dict[str, Any]:
    """Return the recipe of the decoder that an encoder gets if none is stated.

    It is the attribute `usual_decoder` of the encoder, if it has one. Otherwise maps of one stride get a `UNETRDecoder`
    with a sixteenth of their width at full resolution (16 to 48 channels, 48 for a ViT-B as in UNETR), and others a
    `UNetDecoder`.
    """
    channels, strides = levels(encoder)
    if (own := getattr(getattr(encoder, "net", encoder), "usual_decoder", None)) is not None:
        return dict(own)
    if len(set(strides)) == 1:
        return {"_target_": UNETR, "feature_size": min(48, max(16, channels[-1] // 16))}
    return {"_target_": UNET}


def build_usual_decoder(encoder: nn.Module) -> nn.Module:
    """Build the `usual_decoder` of an encoder, with fresh weights."""
    return build_decoder(usual_decoder(encoder), encoder, packages=None)


def output_layer(width: int, out_channels: int, *, step: Sequence[int]) -> nn.Module:
    """Build the layer to full resolution: a 1x1x1 convolution, or a transposed one of stride `step`."""
    if set(step) == {1}:
        return CONVOLUTIONS[len(step)](width, out_channels, 1)
    return UPSAMPLINGS[len(step)](width, out_channels, tuple(step), stride=tuple(step))


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
    return [int(width) for width in channels], [axes_of(stride) for stride in strides]


def names_of_blocks(decoder: nn.Module, num_blocks: int) -> set[str]:
    """Return the names in the decoder's state that belong to its first `num_blocks` blocks, from the coarsest.

    A block is the entries at one place of the decoder's lists, whose last entries are for the coarsest map. A module in
    no list serves the finest maps: it belongs to the last block or, if its `channels` say for how many maps it is (a
    stem), to the blocks of those maps.
    """
    num_maps = len(decoder.channels)  # type: ignore[arg-type]
    first = num_maps - num_blocks  # the finest map that is decoded
    names = set()
    for name in decoder.state_dict():
        child, _, rest = name.partition(".")
        module = getattr(decoder, child)
        if isinstance(module, nn.ModuleList):
            belongs = int(rest.partition(".")[0]) + num_maps - len(module) >= first
        else:
            belongs = first < len(getattr(module, "channels", [0]))
        if belongs:
            names.add(name)
    return names
