"""The evaluator of a run: predicts whole labelled cases, quickly while the network trains, in full at its end."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import nn
from tqdm import tqdm

from medssl.data.store import VolumeStore
from medssl.evaluation.scores import CaseScores, dice_by_class, score_case
from medssl.inference.reading import Reading
from medssl.ops.gather import gather_objects, rank_and_world
from medssl.segmentation.pictures import CasePicture, picture_case
from medssl.segmentation.segment import Averaged, segment_stored


@dataclass
class Evaluation:
    """The results of a pass over some cases, the same on every rank; `contents` are hashes of image and classes."""

    dice: dict[str, np.ndarray] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    scores: dict[str, CaseScores] = field(default_factory=dict)
    pictures: list[CasePicture] = field(default_factory=list)

    def mean_dice(self) -> float:
        """Return the mean over cases of the mean over the classes that are present; 0 if there is none."""
        means = [float(np.nanmean(dice)) for dice in self.dice.values() if not np.isnan(dice).all()]
        return float(np.mean(means)) if means else 0.0


@dataclass(frozen=True)
class Evaluator:
    """Predicts cases of a store window by window and scores them on their own grid; ranks share the cases.

    Args:
        store: The store of the cases.
        reading: How images are drawn for the network.
        label_values: The label value of each class.
        ignored_label: The label value of voxels that are not scored; None for none.
        overlap: Share that neighbouring windows have in common.
        window_batch: Windows predicted at once.
        tolerance_mm: Tolerance of the normalised surface Dice.
    """

    store: VolumeStore
    reading: Reading
    label_values: Sequence[int]
    overlap: float
    window_batch: int
    tolerance_mm: float
    ignored_label: int | None = None

    def run(
        self,
        network: nn.Module,
        cases: Sequence[int],
        *,
        device: torch.device,
        full: bool,
        title: str,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Return the Dice of each case and class and, with `full`, surface distances too; None if it was stopped."""
        rank, world = rank_and_world()
        own, stopped = Evaluation(), False
        was_training = network.training
        network.eval()
        for case in self._with_bar(cases[rank::world], title, shown=rank == 0):
            prediction = segment_stored(
                Averaged([network]),
                self.store,
                case,
                self.reading,
                num_classes=len(self.label_values),
                device=device,
                overlap=self.overlap,
                window_batch=self.window_batch,
                should_stop=should_stop,
            )
            if prediction is None:
                stopped = True
                break
            self._score(own, case, prediction, full=full)
        network.train(was_training)
        parts = gather_objects((own, stopped))
        if any(part_stopped for _, part_stopped in parts):
            return None
        found = Evaluation()
        for part, _ in parts:
            found.dice |= part.dice
            found.contents |= part.contents
            found.scores |= part.scores
            found.pictures += part.pictures
        found.pictures = _worst_and_best(found.pictures)
        return found

    def truth(self, case: int) -> tuple[Integer[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"] | None]:
        """Return the classes of a case on its own grid, and which voxels are not scored, background among the classes.

        The second is None where the data have no ignored label.
        """
        record = self.store.record(case)
        label = self.store.read_label(case, (0, 0, 0), record.shape).result()[0]
        values = np.array(self.label_values)
        classes = np.empty(label.shape, np.uint8 if len(values) <= 256 else np.int16)
        for plane, out in zip(label, classes, strict=True):  # plane by plane: no wide copy of the volume
            place = np.searchsorted(values, plane).clip(max=len(values) - 1)
            out[:] = np.where(values[place] == plane, place, 0)
        return classes, None if self.ignored_label is None else label == self.ignored_label

    def _score(self, own: Evaluation, case: int, prediction: np.ndarray, *, full: bool) -> None:
        record, (truth, ignored) = self.store.record(case), self.truth(case)
        num_classes = len(self.label_values)
        if full:
            scores = score_case(
                prediction,
                truth,
                num_classes=num_classes,
                spacing_mm=record.spacing_mm,
                tolerance_mm=self.tolerance_mm,
                ignored=ignored,
            )
            own.scores[record.case] = scores
            scored = truth.tobytes() if ignored is None else truth.tobytes() + np.packbits(ignored).tobytes()
            classes = hashlib.sha256(scored).hexdigest()
            own.contents[record.case] = hashlib.sha256(f"{record.voxel_hash}/{classes}".encode()).hexdigest()
            own.dice[record.case] = scores.dice
        else:
            own.dice[record.case] = dice_by_class(prediction, truth, num_classes=num_classes, ignored=ignored)
        dice = own.dice[record.case]
        mean = 0.0 if np.isnan(dice).all() else float(np.nanmean(dice))
        own.pictures = _worst_and_best([*own.pictures, picture_case(self.store, case, prediction, truth, dice=mean)])

    @staticmethod
    def _with_bar(cases: Sequence[int], title: str, *, shown: bool) -> Iterable[int]:
        interval = 0.1 if sys.stderr.isatty() else 30
        return tqdm(cases, desc=title, unit="case", disable=not shown, leave=False, mininterval=interval)


def _worst_and_best(pictures: Sequence[CasePicture]) -> list[CasePicture]:
    ordered = sorted(pictures, key=lambda picture: (picture.dice, picture.case))
    return ordered if len(ordered) < 3 else [ordered[0], ordered[-1]]
