"""Prediction of all images of a folder: one line per image; a broken image does not stop the others."""

import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float16
from tqdm import tqdm

from medssl.data.atomic import write_text
from medssl.data.formats import ReadError, size_text
from medssl.data.measurements import SOURCE, VOXELS, Measurements, measure
from medssl.data.padding import shown
from medssl.data.reading import LabelMapError
from medssl.inference.device import find_device
from medssl.inference.files import ImageFile, Input, find_inputs, read_image, slices_of, write_nifti, write_nrrd
from medssl.inference.record import fetch_from, record_from
from medssl.segmentation.ensemble import Ensemble
from medssl.segmentation.phantom_input import drawn_phantom
from medssl.segmentation.segment import Classes, NotFiniteError, segment
from medssl.segmentation.settings import PredictSettings

SHEARED = "_sheared.nrrd"
"""The ending of the second file of a sheared image."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def predict_all(settings: PredictSettings) -> int:
    """Predict what `input` names into `output_dir`, and return the number of images that failed.

    Raises:
        ValueError: There is nothing to predict, or the networks do not go together.
    """
    device = find_device(settings.device)
    ensemble = Ensemble.load(
        settings.weights, flips=settings.flips, device=device, allow_modules=settings.allow_modules
    )
    source = drawn_phantom(settings.input, settings.output_dir)
    inputs, scan = find_inputs(
        source, settings.output_dir, include_labels=settings.include_labels, num_channels=ensemble.num_channels
    )
    if not inputs and not scan.problems:
        raise ValueError(f"input={settings.input}: none of its files is an image to predict")
    check_outputs(inputs, settings)
    number = f"{len(inputs)} image{'s' * (len(inputs) != 1)}"
    print(f"{ensemble}, on {device.type}; {number} -> {settings.output_dir}", flush=True)
    for row in scan.skipped:
        print(f"{row['file']}: skipped, {row['reason']}", flush=True)
    for row in scan.problems:
        _complain(row["file"], row["reason"])
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    counts = {"predicted": 0, "skipped": len(scan.skipped), "failed": len(scan.problems)}
    for image in inputs:
        counts[predict_one(image, ensemble, settings)] += 1
    print(", ".join(f"{number} {what}" for what, number in counts.items() if number or what == "predicted"))
    return counts["failed"]


def outputs_of(name: str, settings: PredictSettings) -> list[Path]:
    """Return the files of an image: its segmentation and, if asked for, its probabilities and their classes."""
    endings = [".nii.gz", *(["_probabilities.nii.gz", "_probabilities.json"] if settings.probabilities else [])]
    return [settings.output_dir / f"{name}{ending}" for ending in endings]


def check_outputs(inputs: Sequence[Input], settings: PredictSettings) -> None:
    """Check that no two images would be written to one file, even on disks that ignore case.

    Raises:
        ValueError: Two images would be written to one file.
    """
    writer: dict[str, Input] = {}
    for image in inputs:
        for path in outputs_of(image.name, settings):
            other = writer.setdefault(path.name.lower(), image)
            if other is not image:
                raise ValueError(
                    f"{other.path} and {image.path} would both be written to {path}; rename one of them, or leave out "
                    "probabilities=true"
                )


def predict_one(image: Input, ensemble: Ensemble, settings: PredictSettings) -> str:
    """Predict one image, print a line about it, and return "predicted", "skipped" or "failed".

    Raises:
        OSError: The disk is full, so that the next image could not be written either.
    """
    outputs = outputs_of(image.name, settings)
    target = outputs[0]
    files = [path for path in (image.path, *image.more_channels) if path.is_file()]
    if target.exists() and any(target.samefile(file) for file in files):
        _complain(image.path, "the result would replace the image; give another output_dir")
        return "failed"
    if folder := next((path for path in outputs if path.is_dir()), None):
        _complain(
            image.path, f"its result cannot be written, {folder} is a folder; remove it or give another output_dir"
        )
        return "failed"
    wanted = outputs if settings.overwrite else [path for path in outputs if not path.exists()]
    if not wanted:
        print(f"{image.name}: skipped, {target} is there already (overwrite=true replaces it)", flush=True)
        return "skipped"
    try:
        line = _predict(image, wanted, ensemble, settings)
    except LabelMapError as error:
        print(f"{error.path}: skipped, {error.reason}", flush=True)
        return "skipped"
    except ReadError as error:
        _complain(error.path, error.reason)
    except NotFiniteError:
        reason = "the network's output is not finite, its training diverged; take other weights, or train it again with"
        _complain(image.path, f"{reason} a lower optimizer.lr")
    except OSError as error:
        if error.errno in DISK_FULL:
            room = "finished results are kept; make room, and start the same command again"
            raise OSError(f"{settings.output_dir}: the disk is full at {image.name}; {room}") from error
        where = f": {error.filename}" if error.filename else ""
        _complain(image.path, f"the file system refuses its result, {error.strerror or error}{where}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        way = "window_batch=1 needs less" if settings.window_batch > 1 else "a machine with more of it is needed"
        _complain(image.path, f"it does not fit into the memory of the {ensemble.device.type}; {way}")
    else:
        print(f"{image.name}: {line}", flush=True)
        return "predicted"
    return "failed"


def _predict(image: Input, wanted: Sequence[Path], ensemble: Ensemble, settings: PredictSettings) -> str:
    """Write the files `wanted` of an image, and return its line."""
    start = time.monotonic()
    target, *others = outputs_of(image.name, settings)
    file = _read(image, ensemble, settings)
    try:
        chosen = ensemble.channels if settings.channels is None else settings.channels
        measured = measure(file.volume, setting=settings.modality, source=ensemble.modality, chosen=chosen)
    except ValueError as error:
        raise ReadError(image.path, str(error)) from error
    classes = _segmented(file, image.name, ensemble, settings, measured, probable=bool({*others} & {*wanted}))
    values = ensemble.label_values()
    found = np.zeros(len(values), dtype=bool)

    def planes() -> Iterator[np.ndarray]:
        for plane in slices_of(file.in_file_order(classes)):
            found[plane] = True
            yield values[plane]

    written = str(target)
    if target in wanted:
        if file.is_sheared:  # written first, so that a result that is there has both files
            second = target.with_name(f"{image.name}{SHEARED}")
            write_nrrd(second, planes(), like=file, dtype=values.dtype)
            written += f" and {second.name} (for ITK, which reads no sheared NIfTI)"
        write_nifti(target, planes(), like=file, shape=file.shape, dtype=values.dtype)
    else:
        for plane in slices_of(classes):
            found[plane] = True
        written = f"{others[0]} ({target} was there already and is kept)"
    labels = f"{found[1:].sum()} of {len(values) - 1} labels found"
    return f"{size_text(file.shape)} voxels{_note(measured)}, {labels}, {time.monotonic() - start:.1f} s -> {written}"


def _note(measured: Measurements) -> str:
    """Return a note for the line of an image: its modality where the values alone say it, its padding, its doubts."""
    taken, looks = ("+".join(dict.fromkeys(words)).upper() for words in (measured.modality, measured.looks))
    notes = list(measured.doubts)
    if measured.modality_from == VOXELS:
        notes.insert(0, f"taken for {taken} by its values")
    elif measured.modality_from == SOURCE and taken != looks and "unknown" not in measured.looks:
        notes.insert(0, f"read as {taken} as in training though its values look like {looks}")
    if padding := shown(measured.padding):
        notes.append(f"padding {padding} left out")
    return "".join(f", {note}" for note in notes)


def _read(image: Input, ensemble: Ensemble, settings: PredictSettings) -> ImageFile:
    chosen = ensemble.channels if settings.channels is None else settings.channels
    file = read_image(
        image.path,
        channels=chosen,
        skip_label_maps=image.skip_label_maps,
        more_channels=image.more_channels,
        assume_spacing_mm=settings.assume_spacing_mm,
    )
    if file.volume.num_channels != ensemble.num_channels:
        held = f"the image has {file.volume.num_channels} channels, the network reads {ensemble.num_channels}"
        files = "give 4-D files that hold all of a case, or the folder of files CASE_0000, CASE_0001, ..."
        way = "data.channels=N picks one" if ensemble.num_channels == 1 else files
        raise ReadError(image.path, f"{held}; {way}")
    return file


def _segmented(
    file: ImageFile, name: str, ensemble: Ensemble, settings: PredictSettings, measured: Measurements, *, probable: bool
) -> Classes:
    """Return the class numbers of an image, with a progress bar; with `probable`, write its probabilities too."""
    with _Bar(name) as on_window, tempfile.TemporaryFile(dir=settings.output_dir) as scratch:
        probabilities = None
        if probable:
            x, y, z = file.volume.shape
            _reserve(scratch, 2 * x * y * z * len(ensemble.classes))
            slices_first = np.memmap(scratch, np.float16, "w+", shape=(z, len(ensemble.classes), x, y))
            probabilities = slices_first.transpose(1, 2, 3, 0)
        classes = segment(
            ensemble.members,
            fetch_from(measured.volume.array),
            record_from(measured, name, with_body=ensemble.takes_coordinate),
            num_classes=len(ensemble.classes),
            device=ensemble.device,
            overlap=settings.overlap,
            window_batch=settings.window_batch,
            on_window=on_window,
            probabilities=probabilities,
        )
        assert classes is not None
        if probabilities is not None:
            _write_probabilities(settings.output_dir / f"{name}_probabilities", probabilities, file, ensemble)
    return classes


def _write_probabilities(
    target: Path, probabilities: Float16[np.ndarray, "k x y z"], file: ImageFile, ensemble: Ensemble
) -> None:
    """Write a 4-D NIfTI file (float32, the shortest floats it has) and the class of each of its channels."""
    planes = (plane for one in probabilities for plane in slices_of(file.in_file_order(one)))
    shape = (*file.shape[:3], len(probabilities))
    write_nifti(target.with_name(f"{target.name}.nii.gz"), planes, like=file, shape=shape, dtype=np.dtype(np.float32))
    write_text(target.with_name(f"{target.name}.json"), json.dumps({"classes": list(ensemble.classes)}, indent=1))


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Reserve space on disk now: a mapped file that finds none later kills the process without a message."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise  # other errors: a file system that cannot reserve


class _Bar:
    """A bar over the windows of an image, on stderr; rarely refreshed where that is a file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._advance

    def _advance(self, done: int, total: int) -> None:
        if self.bar is None:
            every = 0.1 if sys.stderr.isatty() else 30
            self.bar = tqdm(total=total, desc=self.name, unit=" windows", leave=False, mininterval=every)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _complain(path: object, reason: str) -> None:
    print(f"error: {path}: {reason}", file=sys.stderr, flush=True)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
