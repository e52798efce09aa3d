"""KAF: contrast of images and of their keypoints by position, and matching of the keypoints of two views."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medssl.building import named_class
from medssl.checks import choice
from medssl.data.views import View
from medssl.losses.consistency import direction_spread
from medssl.losses.optimal_transport import REDUCTIONS, log_transport, matching_accuracy, matching_loss
from medssl.losses.position_contrast import contrast_of_positives, equal_labels
from medssl.methods.base import Method, Progress, StepOutput
from medssl.methods.kaf_points import PointPair, PointRule, flat
from medssl.methods.positions import AXES, PositionRule, Positions
from medssl.methods.watch import WATCHED_STEPS, Watch
from medssl.models.kaf_heads import KAFHeads
from medssl.models.kaf_unet import KAFEncoder
from medssl.models.keypoint_matcher import KeypointMatcher
from medssl.models.shape_trial import check_multiple
from medssl.models.volume_networks import fitting
from medssl.ops.gather import gather_ranks, gather_with_gradient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("axial", "linf", "overlap")
POSITIVES = ("position", "views", "partition")
NUM_PARTITIONS = 4
FEWEST_VIEWS = 4
"""Smallest number of views on a device for a batch norm."""


class KAF(Method):
    """Global contrast of an image and of its keypoints by position in the body, and local matching of keypoints.

    The view groups `first` and `second` hold one view each, of neighbouring places in one volume. Views of any volumes
    whose places are near each other are positives, for the embedding of the coarsest map and for that of the mean of
    the keypoints. A matcher then finds the partners of the keypoints of both views, with a dustbin for unmatched ones.

    A network of two axes takes views of one voxel along z: slices, whose place is (i + 1) / N for slice i of N.

    Args:
        encoder: U-Net encoder with keypoints.
        heads: Embeddings of image and keypoints, and the fusion of tokens.
        matcher: Network that scores pairs of keypoints.
        points: Rule by which keypoints are chosen and put in correspondence.
        crop_voxel: Size of the views, checked here; None leaves the check to the first batch.
        weight_image: Weight of the contrast of images.
        weight_keypoints: Weight of the contrast of keypoints.
        weight_matching: Weight of the matching loss.
        weight_local: Weight of the contrast of single keypoints, see `contrast_of_points`; it needs `heads.local`.
        positives: Which views are positives: those near by `position` in the body, the two `views` of a volume, or
            those in an equal `partition` of the body's height.
        metric: Positions are compared along x, y and z (`linf`), along z (`axial`), or by the `overlap` of crops, see
            `PositionRule`.
        threshold: Positions of positives are nearer than this, where 0 to 1 are the places that a crop can have;
            overlapping crops share more than this of their union.
        negative_threshold: Threshold from which the same positions are negatives, see `PositionRule`.
        position_per_view: Whether each view has its own place; otherwise both have that of the first.
        temperature: Temperature of both contrasts.
        base_temperature: The contrasts are scaled by `temperature / base_temperature`.
        transport_iterations: Iterations of Sinkhorn's algorithm.
        reduction: Reduction of the matching loss, see `matching_loss`.

    Source: arXiv:2310.01680; repository zshyang/kaf, pretrain1.py.
    """

    networks = ("kaf",)
    encoder: KAFEncoder
    takes_reoriented = False
    decays_all = True  # the released recipe also decays biases and norms

    def __init__(
        self,
        *,
        encoder: KAFEncoder,
        heads: KAFHeads,
        matcher: KeypointMatcher,
        points: PointRule | None = None,
        crop_voxel: Sequence[int] | None = None,
        weight_image: float = 1.0,
        weight_keypoints: float = 1.0,
        weight_matching: float = 0.01,
        weight_local: float = 0.0,
        positives: str = "position",
        metric: str = "linf",
        threshold: float = 0.35,
        negative_threshold: float | None = None,
        position_per_view: bool = True,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        transport_iterations: int = 50,
        reduction: str = "weighted_mean",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("positives", positives, POSITIVES),
            ("metric", metric, METRICS),
            ("reduction", reduction, REDUCTIONS),
        ):
            choice(name, value, allowed)
        if min(temperature, base_temperature) <= 0 or transport_iterations < 1:
            raise ValueError("temperature, base_temperature and transport_iterations must be positive")
        if negative_threshold is not None and positives != "position":
            raise ValueError(
                f"negative_threshold={negative_threshold} needs positives=position; positives is {positives!r}"
            )
        if matcher.spatial_dims != encoder.spatial_dims:
            raise ValueError(
                f"method.matcher.spatial_dims={matcher.spatial_dims} must be that of the encoder, "
                f"{encoder.spatial_dims}"
            )
        if crop_voxel is not None:
            _check_crop(list(crop_voxel), encoder)
        self.encoder, self.heads, self.matcher = encoder, heads, matcher
        if (weight_local > 0) != (heads.local is not None):
            raise ValueError(
                f"method.weight_local={weight_local} and method.heads.local={heads.local is not None} do not fit: "
                "single keypoints are embedded just where they are contrasted"
            )
        self.points, self.spatial_dims = points or PointRule(), encoder.spatial_dims
        if self.spatial_dims == 2 and self.points.match == "shared":
            raise ValueError(
                "method.points.match=shared: slices hardly show a point of a table; find points in the slices with "
                "method.points.match=carried views.groups.first.points=null"
            )
        self.weights = {"image": weight_image, "keypoints": weight_keypoints, "matching": weight_matching}
        self.weights |= {"local": weight_local} if weight_local else {}
        self.positives, self.position_per_view = positives, position_per_view
        self.frame = "volume" if self.spatial_dims == 2 else "reachable"
        self.positions = PositionRule(
            axes=AXES[2:] if metric == "axial" else AXES,
            frame="body" if metric == "overlap" else self.frame,
            threshold=threshold,
            norm="overlap" if metric == "overlap" else "linf",
            cross_group="compare",
            negative_threshold=negative_threshold,
        )
        self.temperature, self.base_temperature = temperature, base_temperature
        self.transport_iterations, self.reduction = transport_iterations, reduction
        self.wants_views = any(isinstance(module, _BatchNorm) for module in encoder.stages.modules())
        self.watch = Watch(partial(_steps_without, threshold=threshold))

    @classmethod
    def check_recipe(cls, encoder: Mapping[str, Any]) -> None:
        """Check that the encoder has tokens of keypoints.

        Raises:
            ValueError: It is another network than KAF's.
        """
        kind = named_class(encoder, None, base=nn.Module, where="model.encoder")
        if not issubclass(kind, KAFEncoder):
            raise ValueError(f"{kind.__name__} has no tokens of keypoints, which KAF trains; {fitting(cls.networks)}")

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the weighted sum of both contrasts and of the matching loss."""
        views = _views(batch)
        points = self.points(*views, progress, is_random=self.training, spatial_dims=self.spatial_dims)
        embedded = [
            self.heads(self.encoder.encode(flat(view.image[:, 0], self.spatial_dims), *chosen))
            for view, chosen in zip(views, _by_view(points), strict=True)
        ]
        with torch.autocast(points.first.device.type, enabled=False):
            positive, compared = self._masks(views)
            image = self._gathered([views_of.image for views_of in embedded])
            keypoints = self._gathered([views_of.keypoints for views_of in embedded])
            shown = torch.cat([gather_ranks(views_of.has_keypoints) for views_of in embedded])
            terms = {"image": self._contrast(image, positive, compared)}  # eq. 1
            terms["keypoints"] = self._contrast(keypoints[shown], positive[shown][:, shown], compared[shown][:, shown])
            plan = self._plan([views_of.tokens for views_of in embedded], points, views[0])
            first, second = (views_of.points for views_of in embedded)
            if first is not None and second is not None:
                terms["local"] = contrast_of_points(
                    first.float(),
                    second.float(),
                    points,
                    temperature=self.temperature,
                    base_temperature=self.base_temperature,
                )
            # eq. 2, with weights of the released code unless the reduction is `sum`
            terms["matching"] = matching_loss(plan, points.pairs, reduction=self.reduction)  # type: ignore[arg-type]
        loss = sum((self.weights[name] * term for name, term in terms.items()), start=image.new_zeros(()))  # eq. 3
        itself = torch.eye(len(positive), dtype=torch.bool, device=positive.device)
        num_positives = (positive & ~itself).sum(1).float().mean()
        if self.training:
            self._check_views(len(views[0].image), progress)
            self.watch([num_positives], progress)
        logs = {name: term.detach() for name, term in terms.items()}
        logs |= {
            "matching_accuracy": matching_accuracy(plan, points.pairs),
            "partners_found": matching_accuracy(plan, points.pairs[(points.pairs >= 0).all(1)]),
            "matched_share": points.matched_share(),
            "points": (points.first_valid.sum(1) + points.second_valid.sum(1)).float().mean() / 2,
            "num_positives": num_positives,
            "feature_std": direction_spread(image.detach()),
        }
        extras = {**points._asdict(), "plan": plan.detach()} if progress.with_extras else {}
        return StepOutput(loss, logs, extras)

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw the keypoints of the first pair of views with the partners that the matcher finds and the true ones."""
        from medssl.ops.panels import MatchedPoints, matched_points

        views, plan = _views(batch), extras["plan"][0]
        points = PointPair(*(extras[name] for name in PointPair._fields))
        true = points.pairs[(points.pairs[:, 0] == 0) & (points.pairs >= 0).all(1), 1:]
        partner, dustbin = plan[:-1].argmax(1).tolist(), plan.shape[1] - 1
        shown = MatchedPoints(
            _upright(points.first[0].cpu()),
            _upright(points.second[0].cpu()),
            points.first_valid[0].cpu(),
            points.second_valid[0].cpu(),
            found={(i, partner[i]) for i in points.first_valid[0].nonzero()[:, 0].tolist() if partner[i] != dustbin},
            true={(i, j) for i, j in true.tolist()},
        )
        title = f"keypoints and their matches, step {progress.step}"
        images = [view.image[0, 0, 0] for view in views]
        if self.spatial_dims == 2:
            images = [image.transpose(1, 2) for image in images]
        return {"matches": matched_points(images[0], images[1], shown, title=title)}

    def _plan(self, tokens: list[Tensor], points: PointPair, view: View) -> Float[Tensor, "b rows columns"]:
        scores = self.matcher(
            *tokens,
            points=(points.first, points.second),
            valid=(points.first_valid, points.second_valid),
            size_voxel=tuple(view.image.shape[3 : 3 + self.spatial_dims]),
        )
        return log_transport(
            scores.float(),
            self.matcher.dustbin.float(),
            num_iterations=self.transport_iterations,
            row_valid=points.first_valid,
            column_valid=points.second_valid,
        )

    def _contrast(
        self, vectors: Float[Tensor, "row dim"], positive: Bool[Tensor, "row row"], compared: Bool[Tensor, "row row"]
    ) -> Float[Tensor, ""]:
        return contrast_of_positives(
            vectors,
            positive,
            compared=compared,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
        )

    def _gathered(self, vectors: list[Tensor]) -> Float[Tensor, "row dim"]:
        """Return the rows of the first views of all ranks, then of the second ones."""
        return torch.cat([gather_with_gradient(part.float()) for part in vectors])

    @torch.no_grad()
    def _masks(self, views: tuple[View, View]) -> tuple[Bool[Tensor, "row row"], Bool[Tensor, "row row"]]:
        """Return which views of the whole batch are positives of each other, and which are compared at all."""
        if self.positives == "views":
            number = len(gather_ranks(views[0].case))
            positive = equal_labels(torch.arange(number, device=views[0].case.device).repeat(2))
            return positive, torch.ones_like(positive)
        located = views if self.position_per_view else (views[0], views[0])
        if self.positives == "partition":
            height = torch.cat([gather_ranks(Positions.of_view(view).along(self.frame)[:, 2]) for view in located])
            positive = equal_labels((height * NUM_PARTITIONS).long().clamp(0, NUM_PARTITIONS - 1))
            return positive, torch.ones_like(positive)
        return self.positions(*located, gather=True)

    def _check_views(self, num_views: int, progress: Progress) -> None:
        """Warn once if few views share a batch norm."""
        if self.wants_views and num_views < FEWEST_VIEWS:
            self.wants_views = False
            why = f"{num_views} crops of a device share a batch norm, which needs {FEWEST_VIEWS}; raise batch_size, or "
            progress.warn(why + "take model.encoder.norm=instance model.encoder.token_norm=layer")


def _steps_without(num_positives: Float[Tensor, "step one"], *, threshold: float) -> str | None:
    """Return the warning if no view had a positive in some steps, else None."""
    without = int((num_positives == 0).sum())
    if not without:
        return None
    why = f"in {without} of {WATCHED_STEPS} steps no view had a positive, and the contrasts were 0; change "
    return f"{why}method.threshold={threshold}, or take method.positives=views"


def contrast_of_points(
    first: Float[Tensor, "b n dim"],
    second: Float[Tensor, "b m dim"],
    points: PointPair,
    *,
    temperature: float,
    base_temperature: float,
) -> Float[Tensor, ""]:
    """Return the contrast of the keypoints of both views of a sample with their partners as positives.

    Mean over samples; a sample without matched keypoints counts as zero.

    Source: repository zshyang/kaf, pretrain1.py, whose mask takes the last keypoint as the partner of all that have
    none. The paper does not have this term.
    """
    valid = torch.cat([points.first_valid, points.second_valid], dim=1)
    positive = valid.new_zeros(*valid.shape, valid.shape[1])
    sample, i, j = points.pairs[(points.pairs >= 0).all(1)].unbind(1)
    positive[sample, i, first.shape[1] + j] = positive[sample, first.shape[1] + j, i] = True
    terms = [
        contrast_of_positives(
            vectors, mask, compared=known[:, None] & known, temperature=temperature, base_temperature=base_temperature
        )
        for vectors, mask, known in zip(torch.cat([first, second], dim=1), positive, valid, strict=True)
    ]
    return torch.stack(terms).mean()


def _views(batch: Mapping[str, View]) -> tuple[View, View]:
    found = {name: tuple(view.image.shape[1:]) for name, view in batch.items()}
    if not {"first", "second"} <= found.keys() or found["first"] != found["second"] or found["first"][0] != 1:
        raise ValueError(f"KAF needs view groups `first` and `second` with one view of one size; the batch has {found}")
    return batch["first"], batch["second"]


def _check_crop(crop_voxel: list[int], encoder: KAFEncoder) -> None:
    """Check that the network takes views of this size.

    Raises:
        ValueError: A side is no multiple of the coarsest stride, or a network of slices is given volumes.
    """
    sides = crop_voxel[: encoder.spatial_dims]
    if encoder.spatial_dims == 2 and crop_voxel[2:] != [1]:
        raise ValueError(
            f"views.groups.first.size={crop_voxel}: a 2D network takes slices, [x, y, 1]; give "
            f"views.groups.first.size=[{sides[0]},{sides[1]},1]"
        )
    steps = (*encoder.strides[-1], 1)[:3]
    check_multiple(crop_voxel, steps, setting="views.groups.first.size", of="the network's coarsest stride")


def _upright(points: Float[Tensor, "n axis"]) -> Float[Tensor, "n 3"]:
    """Return points for a picture of x and z; those of slices with y in the place of z."""
    if points.shape[1] == 3:
        return points
    return torch.stack([points[:, 0], torch.zeros_like(points[:, 0]), points[:, 1]], dim=1)


def _by_view(points: PointPair) -> list[tuple[Tensor, Tensor]]:
    return [(points.first, points.first_valid), (points.second, points.second_valid)]
