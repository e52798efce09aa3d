"""SAM: self-supervised anatomical embeddings, which find the same place of the body in another scan."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from medssl.data.views import View
from medssl.losses.anatomy import (
    CoarseDraws,
    CoarseMining,
    ContrastTerms,
    FineDraws,
    FineMining,
    Rows,
    coarse_contrast,
    common_voxels,
    fine_contrast,
    mine_fine,
    nearest,
)
from medssl.methods.base import Method, Progress, StepOutput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_DRAWN = 4
"""Number of points in one figure."""


class Voxels(NamedTuple):
    """The embeddings of a batch of pairs, as lists of voxels: fine, coarse, and coarse ones at the fine voxels."""

    fine: Float32[Tensor, "volume 2 voxel dim"]
    context: Float32[Tensor, "volume 2 voxel dim"]
    fine_mm: Float32[Tensor, "volume 2 voxel 3"]
    valid: Bool[Tensor, "volume 2 voxel"]
    coarse: Float32[Tensor, "volume 2 cell dim"]
    coarse_mm: Float32[Tensor, "volume 2 cell 3"]
    grid: tuple[int, ...]


class SamEmbed(Method):
    """Self-supervised Anatomical eMbedding.

    The view group `pair` holds two views of a volume, each of its own scale, which mostly share a point. Their
    positions in millimetres say which voxels are the same place. The fine map learns to distinguish these from all
    other voxels of both views, the coarse map also from those of other volumes.

    Args:
        encoder: Network with a fine and a coarse map of unit vectors.
        fine: Rules by which the fine loss chooses voxels.
        coarse: Rules by which the coarse loss chooses voxels.

    Source: arXiv:2012.02383.
    """

    match_error_mm: Tensor

    decays_all = True  # the published recipe also decays biases and batch norm

    def __init__(
        self, *, encoder: nn.Module, fine: FineMining | None = None, coarse: CoarseMining | None = None
    ) -> None:
        super().__init__()
        if len(getattr(encoder, "channels", ())) != 2:
            raise ValueError(
                "SamEmbed needs an encoder that gives two maps, fine and coarse; use medssl.models.sam_resnet.SamResNet"
            )
        self.encoder, self.fine, self.coarse = encoder, fine or FineMining(), coarse or CoarseMining()
        self.register_buffer("match_error_mm", torch.zeros(()))  # of the last batch with overlapping views

    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the sum of the fine and the coarse loss, each a mean over volumes.

        `match_error_mm` in the logs is the distance between a query and the voxel of the other view that is most
        similar to it: the median over the queries, then the mean over the volumes with overlapping views.
        """
        view = _pair(batch)
        maps = self.encoder(view.image.flatten(0, 1))
        with torch.autocast(view.image.device.type, enabled=False):
            voxels = as_voxels(maps, view)
            terms, errors = [], []
            for number in range(len(voxels.fine)):
                rows = self._mine(voxels, number, progress)  # sec. III-B
                terms.append(fine_contrast(voxels.fine[number], rows, temperature=self.fine.temperature))  # eq. 1
                if rows.matched is not None:
                    place = voxels.fine_mm[number].flatten(0, 1)
                    errors.append((place[rows.query] - place[rows.matched]).norm(dim=1).median())
            fine = ContrastTerms(*(torch.stack(values).mean() for values in zip(*terms, strict=True)))
            draws = self._coarse_draws(voxels, progress)
            coarse = coarse_contrast(voxels.coarse, voxels.coarse_mm, mining=self.coarse, draws=draws)
        error_mm = torch.stack(errors).mean() if errors else self.match_error_mm.clone()
        if self.training:
            self.match_error_mm.copy_(error_mm)
        logs = {
            "fine": fine.loss.detach(),
            "coarse": coarse.loss.detach(),
            "positive_similarity": fine.positive,
            "hardest_negative_similarity": fine.hardest,
            "match_error_mm": error_mm,
        }
        extras = {}
        if progress.with_extras:
            shown = {name: getattr(voxels, name).detach() for name in ("fine", "context", "fine_mm", "valid")}
            extras = {**shown, "grid": torch.tensor(voxels.grid)}
        return StepOutput(fine.loss + coarse.loss, logs, extras)

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Draw points of the first view of a volume, where they are found in its second view, and where they are."""
        from medssl.ops.panels import PointMatch, point_matches

        view, grid = _pair(batch), tuple(extras["grid"].tolist())
        fine, context = extras["fine"], extras["context"]
        common = [common_voxels(*case) for case in zip(extras["fine_mm"], extras["valid"], strict=True)]
        number = next((n for n, shared in enumerate(common) if shared.any(dim=1).all()), None)
        if number is None:
            return {}
        candidates = common[number][0].nonzero()[:, 0]
        generator = progress.generator("figure")
        queries = candidates[torch.randperm(len(candidates), generator=generator)[:NUM_DRAWN].to(candidates.device)]
        first_mm, second_mm = extras["fine_mm"][number]
        _, truths = nearest(first_mm[queries], second_mm)
        images, matches = view.image[number, :, 0], []
        for query, truth in zip(queries, truths, strict=True):
            similarity = fine[number, 1] @ fine[number, 0, query]
            similarity = (similarity + context[number, 1] @ context[number, 0, query]) / 2
            found = similarity.argmax()
            at, there, real = (_image_voxel(int(n), grid, images.shape[1:]) for n in (query, found, truth))
            error_mm = (second_mm[found] - first_mm[query]).norm().item()
            matches.append(PointMatch(similarity.reshape(grid), at, there, real, error_mm))
        title = f"matches between two views of one volume, step {progress.step}"
        return {"matches": point_matches(images[0], images[1], matches, title=title)}

    def _mine(self, voxels: Voxels, number: int, progress: Progress) -> Rows:
        device, num_voxels = voxels.fine.device, voxels.fine.shape[2]
        generator = progress.generator(f"fine/{number}", device)
        shapes = ((2, num_voxels), (2, num_voxels), (2 * self.fine.num_queries, self.fine.num_hard))
        draws = FineDraws(*(torch.rand(shape, generator=generator, device=device) for shape in shapes))
        pair = (voxels.fine[number], voxels.context[number], voxels.fine_mm[number], voxels.valid[number])
        return mine_fine(*pair, mining=self.fine, draws=draws)

    def _coarse_draws(self, voxels: Voxels, progress: Progress) -> CoarseDraws:
        num_volumes, _, num_cells, _ = voxels.coarse.shape
        generator = progress.generator("coarse", voxels.coarse.device)
        shapes = (num_volumes, 2 * num_cells, self.coarse.num_hard), (num_volumes, 2, (num_volumes - 1) * 2 * num_cells)
        return CoarseDraws(*(torch.rand(shape, generator=generator, device=voxels.coarse.device) for shape in shapes))


def as_voxels(maps: list[Float[Tensor, "row dim _ _ _"]], view: View) -> Voxels:
    """Return the maps of all views as lists of voxels with positions, and the coarse vectors at the fine voxels.

    Positions are interpolated to each map's grid. Coarse vectors at fine voxels are normalised again and take no
    gradient.
    """
    fine, coarse = (level.float() for level in maps)
    size, image_mm = fine.shape[2:], view.grid_mm().flatten(0, 1)
    assert view.valid is not None
    context = F.interpolate(coarse.detach(), size=size, mode="trilinear", align_corners=False)

    def listed(field: Tensor) -> Tensor:  # (row channel i j k) -> (volume 2 voxel channel)
        return field.flatten(2).mT.unflatten(0, (-1, 2))

    def positions(level: Tensor) -> Tensor:
        return listed(F.interpolate(image_mm, size=level.shape[2:], mode="trilinear", align_corners=False))

    return Voxels(
        fine=listed(fine),
        context=listed(F.normalize(context, dim=1)),
        fine_mm=positions(fine),
        valid=listed(F.interpolate(view.valid.flatten(0, 1).float(), size=size, mode="nearest") > 0.5)[..., 0],
        coarse=listed(coarse),
        coarse_mm=positions(coarse),
        grid=tuple(size),
    )


def _pair(batch: Mapping[str, View]) -> View:
    if "pair" not in batch:
        raise ValueError(f"SamEmbed needs a view group called `pair`; the batch has {sorted(batch)}")
    view = batch["pair"]
    if view.image.shape[1] != 2 or view.valid is None:
        raise ValueError(
            f"SamEmbed needs two views a volume and where they are valid (count: 2, valid: true); `pair` has "
            f"{view.image.shape[1]} views{'' if view.valid is not None else ' and no mask'}"
        )
    return view


def _image_voxel(number: int, grid: tuple[int, ...], size: torch.Size) -> tuple[float, ...]:
    """Return the image voxel in the middle of a voxel of the fine map."""
    place = torch.unravel_index(torch.tensor(number), grid)
    return tuple((float(u) + 0.5) * side / n - 0.5 for u, n, side in zip(place, grid, size, strict=True))
