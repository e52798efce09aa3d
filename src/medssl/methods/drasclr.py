"""DrasCLR: contrast of a crop and its neighbourhood with the same place in other subjects."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medssl.checks import choice, share
from medssl.data.views import View
from medssl.losses.consistency import direction_spread
from medssl.losses.instance import Negatives, discriminate, queue_logits
from medssl.methods.base import Method, Progress, StepOutput
from medssl.ops.ema import frozen_copy, update_ema
from medssl.ops.gather import gather_ranks
from medssl.ops.queue import LocationQueue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REDUCTIONS = ("sum", "mean")
KEY_NORMS = ("shuffle", "split", "plain")
SAME_COORDINATE = 1e-4
"""Coordinates that differ by no more than this are the same but for rounding."""


class Keys(NamedTuple):
    """The keys that a step adds to the queues."""

    key: Float[Tensor, "row dim"]
    location: Int64[Tensor, " row"]
    subject: Int64[Tensor, " row"]
    coordinate: Float[Tensor, "row 3"]
    valid: Bool[Tensor, " row"]


class DrasCLR(Method):
    """Contrast between subjects at one location of the body, of a crop and of its neighbourhood.

    The view group `anchor` holds two views, query and key, of one crop at a location. The optional group `neighbours`
    holds crops at nearby locations of the same subject. Negatives of a query are the keys of other subjects at its
    location, which a queue keeps. The second query is the sum of the neighbours' unit vectors. Crops at locations that
    a subject does not show are left out of both losses and of the queues.

    Args:
        encoder: Encoder with the representation of a crop at a location (`represent`), see `ConditionedEncoder`.
        head: Head from a representation to the space of the keys.
        queue: Queues of keys, one for each location.
        num_locations: Number of locations of the body.
        temperature: Temperature of both losses.
        weight_local: Weight of the crop's loss.
        weight_neighbours: Weight of the neighbourhood's loss.
        neighbour_reduce: `sum` or `mean` of the neighbours' vectors; neither is normalised again.
        warm_up_steps: Steps before the neighbourhood takes part.
        mask_self: Whether older keys of a query's own subject are excluded from its negatives.
        ema_momentum: Momentum of the key encoder, constant.
        key_norm: Batch norm of the keys: `shuffle` them over the ranks, `split` them into `num_splits` random parts,
            or `plain`, in the order of the batch.
        num_splits: Number of random parts, for `split`.

    Source: arXiv:2302.10390; repository batmanlab/DrasCLR, models/builder.py.
    """

    coordinates: Tensor

    decays_all = True  # the released recipe also decays biases, batch norm and routers

    def __init__(
        self,
        *,
        encoder: nn.Module,
        head: nn.Module,
        queue: LocationQueue,
        num_locations: int,
        temperature: float = 0.2,
        weight_local: float = 1.0,
        weight_neighbours: float = 1.0,
        neighbour_reduce: str = "sum",
        warm_up_steps: float = 0.0,
        mask_self: bool = True,
        ema_momentum: float = 0.999,
        key_norm: str = "shuffle",
        num_splits: int = 4,
    ) -> None:
        super().__init__()
        if not hasattr(encoder, "represent"):
            raise ValueError("DrasCLR needs an encoder with `represent`, such as models.conditioned.ConditionedEncoder")
        choice("neighbour_reduce", neighbour_reduce, REDUCTIONS)
        choice("key_norm", key_norm, KEY_NORMS)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        share("ema_momentum", ema_momentum)
        if num_splits < 1:
            raise ValueError(f"num_splits must be at least 1, got {num_splits}")
        self.encoder, self.head, self.queue = encoder, head, queue
        # in training mode, with batch statistics of their own passes: without these all keys look alike
        self.key_encoder, self.key_head = frozen_copy(encoder).train(), frozen_copy(head).train()
        # coordinates of the locations, filled in as they are visited: they travel with the checkpoint
        self.register_buffer("coordinates", torch.full((num_locations, 3), torch.nan))
        self.temperature, self.weight_local, self.weight_neighbours = temperature, weight_local, weight_neighbours
        self.neighbour_reduce, self.warm_up_steps, self.mask_self = neighbour_reduce, warm_up_steps, mask_self
        self.ema_momentum, self.key_norm, self.num_splits = ema_momentum, key_norm, num_splits
        self.pending: list[Keys] = []

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the weighted sum of the losses of the crops and of their neighbourhoods."""
        anchor, around = self._groups(batch, progress)
        location, coordinate, valid = (part[:, 0] for part in _locations(anchor))
        query, features = self._embed(anchor.image[:, 0], location, coordinate)
        vectors, counted = None, valid
        if around is not None:
            vectors, counted = self._neighbourhood(around)
            counted = counted & valid
        with torch.no_grad():
            key = self._keys(anchor.image[:, 1], location, coordinate, progress)
        with torch.autocast(query.device.type, enabled=False):
            negatives = self._negatives(location, anchor.case[:, 0])
            logits = queue_logits(query, key, negatives, temperature=self.temperature)  # arXiv:1911.05722, eq. 1
            local = discriminate(logits, counted=valid)
            loss = self.weight_local * local.loss
            logs = {"local": local.loss.detach(), "local_top1": local.top1}
            if vectors is not None:
                logits = queue_logits(vectors, key, negatives, temperature=self.temperature)
                near = discriminate(logits, counted=counted)
                loss = loss + self.weight_neighbours * near.loss
                logs |= {"neighbours": near.loss.detach(), "neighbours_top1": near.top1}
        if self.training:
            self.pending.append(Keys(key, location, anchor.case[:, 0], coordinate, valid))
        return StepOutput(loss, logs | self._health(features, key, location, negatives, progress))

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Queue the keys of all ranks, in order of the ranks, then move the key encoder."""
        for micro in self.pending:
            key, location, subject, coordinate, valid = (gather_ranks(part) for part in micro)
            self.coordinates[location] = coordinate.to(self.coordinates)
            shown = valid.nonzero()[:, 0]
            if len(shown):
                ring = self.queue.ring(location[shown])
                self.queue.enqueue(ring, key[shown], subject[shown], step=progress.step)
        self.pending.clear()
        for old, new in ((self.key_encoder, self.encoder), (self.key_head, self.head)):
            update_ema(old, new, momentum=self.ema_momentum, copy_buffers=False)  # arXiv:1911.05722, eq. 2

    def copies_of_encoder(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the key encoder with the encoder."""
        return [(self.key_encoder, self.encoder)]

    def parts(self) -> dict[str, nn.Module]:
        """Return encoder and head, and the key encoder as teacher."""
        return {"encoder": self.encoder, "head": self.head, "teacher_encoder": self.key_encoder}

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw query and key of the first subject, its neighbours, and the same location in the next subject."""
        from medssl.ops.panels import orthogonal_slices

        anchor, around = batch["anchor"], batch.get("neighbours")
        location, _, _ = _locations(anchor)
        panels = {"query": anchor.image[0, 0, 0], "key": anchor.image[0, 1, 0]}
        if around is not None:
            panels |= {f"neighbour {n + 1}": image[0] for n, image in enumerate(around.image[0])}
        if len(anchor.image) > 1:
            panels["another subject"] = anchor.image[1, 0, 0]
        title = f"location {int(location[0, 0])}, step {progress.step}"
        return {"location": orthogonal_slices(panels, title=title)}

    def _groups(self, batch: Mapping[str, View], progress: Progress) -> tuple[View, View | None]:
        found = {name: tuple(view.image.shape[1:]) for name, view in batch.items()}
        if "anchor" not in batch or found["anchor"][0] != 2:
            raise ValueError(f"DrasCLR needs a view group `anchor` with two views; the batch has {found}")
        if self.training and len(batch["anchor"].image) < 2:
            raise ValueError(
                "DrasCLR needs at least 2 samples in each process' micro-batch, for batch norm and to tell subjects "
                "apart; raise batch_size"
            )
        takes_part = self.weight_neighbours != 0 and progress.step >= self.warm_up_steps
        return batch["anchor"], batch.get("neighbours") if takes_part else None

    def _embed(
        self, image: Float[Tensor, "row channel x y z"], location: Int64[Tensor, " row"], coordinate: Tensor
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row width"]]:
        """Return unit vectors in float32, and the representations from which they are computed."""
        features = self.encoder.represent(image, *_routes(location, coordinate))  # type: ignore[operator]
        return _unit(self.head(features)), features.detach().float()

    def _neighbourhood(self, around: View) -> tuple[Float[Tensor, "b dim"], Bool[Tensor, " b"]]:
        """Return the reduced unit vectors of the neighbours, and whether a sample has any neighbour."""
        location, coordinate, valid = _locations(around)
        rows, _ = self._embed(around.image.flatten(0, 1), location.flatten(), coordinate.flatten(0, 1))
        shown = valid[..., None].to(rows)
        total = (rows.unflatten(0, shown.shape[:2]) * shown).sum(1)
        if self.neighbour_reduce == "mean":
            total = total / shown.sum(1).clamp(min=1)
        return total, valid.any(1)

    def _keys(
        self,
        image: Float[Tensor, "row channel x y z"],
        location: Int64[Tensor, " row"],
        coordinate: Float[Tensor, "row 3"],
        progress: Progress,
    ) -> Float[Tensor, "row dim"]:
        """Return unit vectors of the key encoder; `key_norm` decides which rows share batch statistics."""

        def encode(image: Tensor, location: Tensor, coordinate: Tensor) -> Tensor:
            return _unit(self.key_head(self.key_encoder.represent(image, *_routes(location, coordinate))))  # type: ignore[operator]

        rows = (image, location, coordinate)
        if self.key_norm == "plain" or not self.training:
            return encode(*rows)
        everyone = tuple(gather_ranks(part) for part in rows) if self.key_norm == "shuffle" else rows
        total, each = len(everyone[0]), len(image)
        if self.key_norm == "shuffle" and total == each:
            return encode(*rows)  # one process: the order within a batch changes no statistics
        common = replace(progress, rank=0) if self.key_norm == "shuffle" else progress
        order = torch.randperm(total, generator=common.generator("key order")).to(image.device)
        if self.key_norm == "split":
            parts = order.tensor_split(min(self.num_splits, max(1, total // 2)))
            keys = torch.cat([encode(*(part[chosen] for part in rows)) for chosen in parts])
            return keys[order.argsort()]
        mine = order[progress.rank * each : (progress.rank + 1) * each]
        keys = gather_ranks(encode(*(part[mine] for part in everyone)))[order.argsort()]
        return keys[progress.rank * each : (progress.rank + 1) * each]

    def _negatives(self, location: Int64[Tensor, " row"], subject: Int64[Tensor, " row"]) -> Negatives:
        rings, which = self.queue.ring(location).unique(return_inverse=True)
        keys, subjects = self.queue.fetch(rings, subject.device)
        which = which.to(subject.device)
        own = subjects[which] == subject[:, None]
        return Negatives(keys, which, own if self.mask_self else torch.zeros_like(own))

    @torch.no_grad()
    def _health(
        self,
        features: Float[Tensor, "row width"],
        key: Float[Tensor, "row dim"],
        location: Int64[Tensor, " row"],
        negatives: Negatives,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Return signs of a collapse, of stale queues, and of gates that do not separate locations."""
        logs = {
            "feature_std": direction_spread(features),
            "key_std": direction_spread(key),
            "queue_age": self.queue.age(self.queue.ring(location).unique(), step=progress.step).to(key),
            "excluded_share": negatives.excluded.float().mean(),
        }
        known = self.coordinates[self.coordinates.isfinite().all(1)]
        routers = [module for name, module in self.encoder.named_modules() if name.rpartition(".")[2] == "router"]
        if len(known) and routers:
            with torch.autocast(known.device.type, enabled=False):
                gates = torch.stack([router(known).sigmoid() for router in routers])  # (layer location expert)
            logs["gate_entropy"] = -(gates.xlogy(gates) + (1 - gates).xlogy(1 - gates)).mean()
            logs["gate_std"] = gates.std(1, correction=0).mean()
        return logs


def _locations(view: View) -> tuple[Int64[Tensor, "b v"], Float[Tensor, "b v 3"], Bool[Tensor, "b v"]]:
    """Return numbers and coordinates of the views' locations, and whether their subjects show them.

    Raises:
        ValueError: The views have no locations, or views of one location have different coordinates.
    """
    if view.location_index is None or view.coordinate is None or view.location_valid is None:
        raise ValueError("DrasCLR needs crops at locations; use placement GridCrop and sampler SameLocation")
    location, coordinate = view.location_index.flatten(), view.coordinate.flatten(0, 1)
    places, index = _routes(location, coordinate)
    differs = ((coordinate - places[index]).abs() > SAME_COORDINATE).any(1)
    if differs.any():
        row = int(differs.nonzero()[0])
        one, other = ([round(x, 4) for x in place[row].tolist()] for place in (places[index], coordinate))
        raise ValueError(
            f"location {int(location[row])} has the coordinates {one} and {other} in one batch, but a location has the "
            "same coordinate in all cases; number other coordinates as other locations"
        )
    return view.location_index, view.coordinate, view.location_valid


def _routes(location: Int64[Tensor, " row"], coordinate: Float[Tensor, "row 3"]) -> tuple[Tensor, Tensor]:
    """Return the coordinate of each location in the batch, and the number of each row's location among them."""
    places, index = location.unique(return_inverse=True)
    first = torch.zeros(len(places), dtype=torch.int64, device=location.device).scatter_(
        0, index, torch.arange(len(location), device=location.device)
    )
    return coordinate[first], index


def _unit(vectors: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
    return F.normalize(vectors.float(), dim=1)
