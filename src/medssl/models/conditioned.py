"""The location-conditioned encoder of DrasCLR: thirteen convolutions whose kernels depend on the place in the body."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.stem import fit_stem
from medssl.ops.expert_convolution import IMPLEMENTATIONS, convolve, convolve_voxelwise, gate

INITS = ("official", "per_expert")
LARGEST_COORDINATE = 1.5
LAYERS = (
    *(("", 1, 1, 1), ("", 2, 2, 2)),
    *(("downsample1.", 1, 1, 2), ("downsample1.", 2, 1, 2), ("downsample1.", 3, 2, 4)),
    *(("downsample2.", 1, 1, 4), ("downsample2.", 2, 1, 4), ("downsample2.", 3, 2, 8)),
    *(("downsample3.", 1, 1, 8), ("downsample3.", 2, 1, 8), ("downsample3.", 3, 2, 16)),
    *(("", 3, 1, 16), ("", 4, 2, 32)),
)
"""Block, number in the block, stride, and voxels of the image between two voxels of the layer."""
MAP_AFTER = (0, 1, 4, 7, 11, 12)
"""Layers whose output is one of the maps."""


class ConditionedPlaces(NamedTuple):
    """ConditionedPlaces of the samples of a batch: the rows of `coordinate`, or every voxel of it."""

    coordinate: Tensor  # (place 3), or (batch 3 x y z)
    counts: tuple[int, ...] = ()  # samples of each place, in the order of the samples
    order: Tensor | None = None  # brings the samples of the caller into this order

    @property
    def is_map(self) -> bool:
        """Whether every voxel has a place."""
        return self.coordinate.ndim == 5


class ConditionalConv(nn.Module):
    """A 3x3x3 convolution with experts' kernels (`weight`), one bias, and a router from a coordinate to gates.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the convolution.
        step: Voxels of the image between two of the output.
        num_experts: Number of kernels.
        init: `official` draws kernels and bias from +-1 / sqrt(27 in_channels out_channels), as released: with an axis
            of experts in front, the output channels were counted as inputs. `per_expert` draws them from
            +-1 / sqrt(27 in_channels), as a plain convolution does.

    Source: arXiv:2302.10390; repository batmanlab/DrasCLR, models/condconv3d.py.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, step: int, num_experts: int, init: str
    ) -> None:
        super().__init__()
        self.stride, self.step = stride, step
        self.weight = nn.Parameter(torch.empty(num_experts, out_channels, in_channels, 3, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.router = nn.Linear(3, num_experts)
        bound = (27 * in_channels * (out_channels if init == "official" else 1)) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Float[Tensor, "batch channel x y z"], places: ConditionedPlaces, *, gates: Tensor | None, impl: str
    ) -> Float[Tensor, "batch width i j k"]:
        """Filter each sample with the kernel of its place (`gates`), or without gates with that of each voxel."""
        if gates is None:
            step = self.step
            return convolve_voxelwise(
                x,
                self.weight,
                bias=self.bias,
                router_weight=self.router.weight,
                router_bias=self.router.bias,
                coordinate=places.coordinate[:, :, ::step, ::step, ::step],  # strided kernels keep voxels 0, step, ...
                stride=self.stride,
            )
        return convolve(
            x, self.weight, bias=self.bias, gates=gates, counts=places.counts, stride=self.stride, impl=impl
        )


class ConditionedEncoder(nn.Module):
    """Thirteen location-conditioned convolutions, each with batch norm and ELU; five halvings.

    A location is a coordinate of three numbers in [-1, 1] with one meaning for all subjects. Names of tensors are those
    of published files except for the routers. The maps come after conv1, conv2, downsample1, downsample2, conv3 and
    conv4. It was released for patches of 32 voxels of 1 mm, which end in a single voxel.

    Args:
        in_channels: Channels of the image.
        widths: Channels after conv1, conv2, the three downsampling blocks and conv3.
        rep_dim: Channels after conv4, which are those of the representation.
        num_experts: Kernels of each convolution; with 1 the location only scales it.
        init: Initialisation, `official` or `per_expert`, see `ConditionalConv`.
        impl: Implementation: `plain` (a convolution for each place), `grouped` (one convolution, with a group for each
            sample), `mixture` (all experts, then their sum), `loop` (a convolution for each sample) or `auto`, the
            fastest for each layer. All give the same result. A map of locations has an implementation of its own.
        num_maps: 6, or 5 for a network without conv4. With 5 it has no representation and serves dense prediction,
            where sides must be multiples of 16 only.

    Source: arXiv:2302.10390; repository batmanlab/DrasCLR, models/cnn3d.py.
    """

    takes_coordinate = True

    def __init__(
        self,
        *,
        in_channels: int = 1,
        widths: Sequence[int] = (8, 8, 16, 32, 64, 128),
        rep_dim: int = 128,
        num_experts: int = 8,
        init: str = "official",
        impl: str = "auto",
        num_maps: int = 6,
    ) -> None:
        super().__init__()
        if len(widths) != 6 or min(widths) < 1:
            raise ValueError(f"widths must be six positive numbers, got {list(widths)}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        choice("init", init, INITS)
        choice("impl", impl, ("auto", *IMPLEMENTATIONS))
        if num_maps not in (5, 6):
            raise ValueError(f"num_maps is {num_maps}; it is 6, or 5 without the last convolution")
        self.in_channels, self.impl = in_channels, impl
        self.channels = (*widths[:4], widths[5], rep_dim)[:num_maps]
        self.layers = LAYERS[: MAP_AFTER[num_maps - 1] + 1]
        self.strides = tuple((LAYERS[last][3],) * 3 for last in MAP_AFTER[:num_maps])
        first, second, *blocks, before_last = widths
        outputs = [first, second, *(width for width in blocks for _ in range(3)), before_last, rep_dim]
        inputs = [in_channels, *outputs[:-1]]
        for number in (1, 2, 3):
            self.add_module(f"downsample{number}", nn.Module())
        n = len(self.layers)
        for (block, number, stride, step), before, width in zip(self.layers, inputs[:n], outputs[:n], strict=True):
            conv = ConditionalConv(before, width, stride=stride, step=step, num_experts=num_experts, init=init)
            owner = self.get_submodule(block.removesuffix("."))
            owner.add_module(f"conv{number}", conv)
            owner.add_module(f"bn{number}", nn.BatchNorm3d(width))

    @classmethod
    def segmentation_recipe(cls, recipe: Mapping[str, Any], decoder: type | None) -> dict[str, Any]:
        """Return the recipe as a segmenter takes it: without conv4, unless it names `num_maps`."""
        return {"num_maps": 5, **recipe}

    def forward(
        self,
        image: Float[Tensor, "batch channel x y z"],
        coordinate: Tensor | None = None,
        index: Int[Tensor, " batch"] | None = None,
    ) -> list[Float[Tensor, "batch width i j k"]]:
        """Return the maps, fine to coarse.

        Args:
            image: Image of any size; the maps have a stride of 1, 2, 4, ... voxels.
            coordinate: Coordinate of each place (u 3), or of every voxel of the image (b 3 x y z); every layer takes
                those of the voxels that its own are centred on. None is the middle, coordinate 0, everywhere.
            index: Each sample's place, a row of `coordinate`. Without it there is a place for each sample, or one.

        Raises:
            ValueError: The shapes do not fit together, or a coordinate is no number or far outside [-1, 1].
        """
        places = self._places(image, coordinate, index)
        maps = self._maps(image, places)
        return maps if places.order is None else [level[places.order.argsort()] for level in maps]

    def represent(
        self,
        image: Float[Tensor, "batch channel x y z"],
        coordinate: Tensor | None = None,
        index: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Return the last map, averaged over its voxels (one voxel for images of up to 32 voxels).

        The arguments are those of `forward`.

        Raises:
            ValueError: The network has no conv4, or `forward` would refuse the arguments.
        """
        if len(self.channels) < 6:
            raise ValueError("this encoder was built without conv4 (num_maps=5) and has no representation; use 6 maps")
        places = self._places(image, coordinate, index)
        pooled = self._maps(image, places)[-1].mean((2, 3, 4))
        return pooled if places.order is None else pooled[places.order.argsort()]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with the first convolution fitted to this network's channels, and conv4 if it has one."""
        fitted = dict(tensors)
        weight = fitted.get("conv1.weight")
        if weight is not None and weight.ndim == 6:
            flat = fit_stem({"weight": weight.flatten(0, 1)}, "weight", self.in_channels)["weight"]
            fitted["conv1.weight"] = flat.unflatten(0, weight.shape[:2])
        last = () if len(self.channels) == 6 else ("conv4.", "bn4.")
        return {key: tensor for key, tensor in fitted.items() if not key.startswith(last)}

    def _places(self, image: Tensor, coordinate: Tensor | None, index: Tensor | None) -> ConditionedPlaces:
        """Check the places of a batch and return those that have samples."""
        batch = len(image)
        if image.shape[1] != self.in_channels:
            raise ValueError(f"the encoder reads {self.in_channels} channels, the image has {image.shape[1]}")
        if coordinate is None:
            return ConditionedPlaces(image.new_zeros(1, 3, dtype=torch.float32), (batch,))
        if not bool((coordinate.abs() <= LARGEST_COORDINATE).all()):
            raise ValueError(
                f"coordinates must lie in [-1, 1], at most {LARGEST_COORDINATE} beside the body; got "
                f"{coordinate.min().item():g} to {coordinate.max().item():g}. Voxel indices and millimetres "
                "close or open every gate: give the coordinates of a table of locations"
            )
        if coordinate.ndim == 5:
            if coordinate.shape != (batch, 3, *image.shape[2:]) or index is not None:
                raise ValueError(
                    f"a map of locations needs the shape {(batch, 3, *image.shape[2:])} and no index; got "
                    f"{tuple(coordinate.shape)} {'and' if index is not None else 'without'} an index"
                )
            return ConditionedPlaces(coordinate)
        if coordinate.ndim != 2 or coordinate.shape[1] != 3 or (index is None and len(coordinate) not in (1, batch)):
            raise ValueError(
                f"locations of {batch} samples are (u 3) with an index, ({batch} 3), (1 3) or a map (b 3 x y z); got "
                f"{tuple(coordinate.shape)} {'with' if index is not None else 'without'} an index"
            )
        if len(coordinate) == 1:
            return ConditionedPlaces(coordinate, (batch,))
        if index is None:
            return ConditionedPlaces(coordinate, (1,) * batch)
        rows = index.tolist()
        used = sorted(set(rows))
        if len(rows) != batch or used[0] < 0 or used[-1] >= len(coordinate):
            raise ValueError(
                f"index must name one of {len(coordinate)} locations for each of {batch} samples; got {rows}"
            )
        counts = tuple(rows.count(row) for row in used)
        return ConditionedPlaces(coordinate[used], counts, None if rows == sorted(rows) else index.argsort(stable=True))

    def _maps(self, image: Tensor, places: ConditionedPlaces) -> list[Tensor]:
        """Return the maps in the order of the places."""
        x = image if places.order is None else image[places.order]
        layers = [
            (self.get_submodule(f"{block}conv{number}"), self.get_submodule(f"{block}bn{number}"))
            for block, number, _, _ in self.layers
        ]
        gates, maps = self._gates([conv for conv, _ in layers], places), []
        for number, ((conv, norm), gates_here) in enumerate(zip(layers, gates, strict=True)):
            x = F.elu(norm(conv(x, places, gates=gates_here, impl=self.impl)), inplace=True)
            if number in MAP_AFTER:
                maps.append(x)
        return maps

    def _gates(self, convs: Sequence[nn.Module], places: ConditionedPlaces) -> Sequence[Tensor | None]:
        """Return gates of the places for each layer, all routers at once; None where every voxel has its own."""
        if places.is_map:
            return [None] * len(convs)
        routers: list[nn.Linear] = [conv.router for conv in convs]  # type: ignore[misc]
        weight, bias = (torch.cat([getattr(router, name) for router in routers]) for name in ("weight", "bias"))
        return gate(places.coordinate, weight, bias).chunk(len(convs), dim=1)
