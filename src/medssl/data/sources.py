"""Sources of cases: folders, data-set lists, tables. A scan reads names and headers, not images."""

import csv
import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medssl.data.cases import Case, Scan, case_names, file_name
from medssl.data.channel_files import by_case, in_order
from medssl.data.dataset_json import FILE, DatasetJson
from medssl.data.formats import IMAGE_SUFFIXES, has_image_suffix, stem
from medssl.data.image_tree import images_below, note_unlisted
from medssl.data.modality import listed_modalities, parsed_modalities
from medssl.data.text import read_text

SPLITS = {
    "": "",
    "train": "train",
    "training": "train",
    "val": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
LISTS = ("training", "validation", "test", "testing")
"""Keys of a dataset.json under which cases are listed; `testing` is that of MONAI's lists."""
NNUNET_IMAGES = {"imagesTr": "train", "imagesTs": "test"}
NNUNET_LABELS = {"labelsTr": "train", "labelsTs": "test"}
CSV_COLUMNS = ("case", "image", "label", "group", "split", "modality")
LABEL_ENDINGS = ("_seg", "_label", "_organs", "_vertebrae")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Any tree of image files and folders of DICOM slices; label maps in it are skipped.

    Label maps are files in folders `labels*`, files that end in `_seg`, `_label`, `_organs`, `_vertebrae`, and volumes
    of few whole values, which show when the file is read. The top folder of a file is its group.
    """

    root: str | Path
    include_labels: bool = False

    def recipe(self) -> dict[str, Any]:
        """Return the root folder and the choice of labels."""
        return {"kind": "folder", "root": str(resolved_root(self.root)), "include_labels": self.include_labels}

    def scan(self) -> Scan:
        """Walk the tree once; a file without an image suffix is opened only to see whether it is DICOM."""
        root = existing_root(self.root)
        if not root.is_dir():
            raise ValueError(f"data.root={self.root} is a file; data=folder takes a folder of images")
        scan, found = Scan(), []
        for path in images_below(root, scan):
            relative = path.relative_to(root)
            folder = next((p for p in relative.parts[:-1] if p.lower().startswith("labels")), None)
            if not self.include_labels and folder is not None:
                scan.skip(path, f"lies in {folder}/: a label map")
            elif not self.include_labels and stem(path).lower().endswith(LABEL_ENDINGS):
                scan.skip(path, f"the name ends in _{stem(path).rsplit('_', 1)[1]}: a label map")
            else:
                found.append(relative)
        if not found and not scan.skipped:
            kinds = f"files that end in {' '.join(IMAGE_SUFFIXES)}, and folders of DICOM slices"
            raise SourceMissingError(f"no image below {root}; looked for {kinds}")
        for name, relative in zip(case_names(found, root.name), found, strict=True):
            group = relative.parts[0] if len(relative.parts) > 1 else ""
            scan.cases.append(Case(name, root / relative, group=group, skip_label_maps=not self.include_labels))
        return scan


@dataclass(frozen=True, kw_only=True)
class Decathlon:
    """The layout of the Medical Segmentation Decathlon: `dataset.json` lists `training`, `validation`, `test`."""

    root: str | Path

    def recipe(self) -> dict[str, Any]:
        """Return the root folder."""
        return {"kind": "decathlon", "root": str(resolved_root(self.root))}

    def label_names(self) -> dict[int, str]:
        """Return the names that `labels` of the list gives."""
        return DatasetJson.read(existing_root(self.root)).label_names()

    def ignored_label(self) -> int | None:
        """Return the value of the label `ignore` of the list, which is no class."""
        return DatasetJson.read(existing_root(self.root)).ignored_label()

    def scan(self) -> Scan:
        """Return the listed images, with labels where the list has them.

        Raises:
            ValueError: The list cannot be read, an entry is not understood, or its labels are regions.
        """
        root, scan = existing_root(self.root), Scan()
        listed = DatasetJson.read(root)
        listed.label_names()  # what cannot be learnt is refused before an hour of preparing
        entries = [(key, entry) for key in LISTS for entry in listed.cases(key)]
        if not entries:
            raise ValueError(f"{listed.path} lists no image; it needs the key training, validation, test or testing")
        group, modality = str(listed.content.get("name", root.name)), listed_modalities(listed.channel_names())
        for key, entry in entries:
            if not entry.images:
                what = "a label" if entry.label else "an entry"
                scan.reject(root / (entry.label or FILE), "", f"{key}: {what} without an image")
                continue
            first, *more = (root / file for file in entry.images)
            name, label = file_name(stem(first)), root / entry.label if entry.label else None
            scan.cases.append(Case(name, first, label, group, SPLITS[key], modality, tuple(more)))
        if number := listed.num_folds_stated(LISTS):
            scan.skip(listed.path, f"the key fold of {number} entries is not read: data.split chooses the parts")
        note_unlisted(root, scan)
        return scan


@dataclass(frozen=True, kw_only=True)
class NnUnet:
    """The raw layout of nnU-Net: imagesTr/CASE_0000.*, labelsTr/CASE.*, imagesTs/; one file per channel."""

    root: str | Path

    def recipe(self) -> dict[str, Any]:
        """Return the root folder."""
        return {"kind": "nnunet", "root": str(resolved_root(self.root))}

    def label_names(self) -> dict[int, str]:
        """Return the names of `labels` in dataset.json, where there is one."""
        listed = DatasetJson.find(existing_root(self.root))
        return {} if listed is None else listed.label_names()

    def ignored_label(self) -> int | None:
        """Return the value of the label `ignore` in dataset.json, which is no class; None where there is none."""
        listed = DatasetJson.find(existing_root(self.root))
        return None if listed is None else listed.ignored_label()

    def scan(self) -> Scan:
        """Return cases of imagesTr (train) and imagesTs (test); a lone label or a missing channel is a problem.

        How many channels a case has stands in dataset.json; where that is missing, in the files of all cases.

        Raises:
            ValueError: There is no such folder, or dataset.json cannot be used, such as for labels that are regions.
        """
        root, scan = existing_root(self.root), Scan()
        listed = DatasetJson.find(root)
        stated = () if listed is None else listed.channel_names()
        if listed is not None:
            listed.label_names()  # what cannot be learnt is refused before an hour of preparing
        labels = {split: self._labels(root / folder, scan) for folder, split in NNUNET_LABELS.items()}
        found = {split: by_case(image_files(root / folder), scan) for folder, split in NNUNET_IMAGES.items()}
        if not any(found.values()) and not scan.problems:
            raise SourceMissingError(
                f"data.root={root} has no imagesTr/CASE_0000.nii.gz; give the folder of one data set of nnUNet_raw, "
                "such as Dataset003_Liver"
            )
        modality = listed_modalities(stated)
        channels = set(range(len(stated))) or {n for cases in found.values() for files in cases.values() for n in files}
        for split, cases in found.items():
            for name, files in cases.items():
                twin = split == "test" and name in found["train"]
                case = file_name(f"{name}-test" if twin else name)
                ordered = in_order(files, scan, case=case, channels=channels, stated=f"{FILE} states")
                if ordered:
                    first, *more = ordered
                    label = labels[split].get(name)
                    scan.cases.append(Case(case, first, label, root.name, split, modality, tuple(more)))
            for name in sorted(labels[split].keys() - cases.keys()):
                scan.reject(labels[split][name], file_name(name), "a label without an image")
        note_unlisted(root, scan)
        return scan

    @staticmethod
    def _labels(folder: Path, scan: Scan) -> dict[str, Path]:
        """Return the label map of each case in a folder; a second one is a problem."""
        found: dict[str, Path] = {}
        for file in image_files(folder):
            if (first := found.setdefault(stem(file), file)) is not file:
                scan.reject(file, file_name(stem(file)), f"{first.name} is a label map of the same case; drop one")
        return found


@dataclass(frozen=True, kw_only=True)
class Csv:
    """A table with column `image` and, optionally, `label case group split modality`; paths count from its folder."""

    root: str | Path

    def recipe(self) -> dict[str, Any]:
        """Return the path of the table."""
        return {"kind": "csv", "root": str(self._table())}

    def _table(self) -> Path:
        path = resolved_root(self.root)
        if not path.exists():
            return path
        tables = [path] if path.is_file() else sorted(path.glob("*.csv"))
        if len(tables) != 1:
            raise ValueError(f"data.root={path} holds {len(tables)} .csv files; name the one that lists the images")
        return tables[0]

    def scan(self) -> Scan:
        """Return one case per row."""
        existing_root(self.root)
        table = self._table()
        rows = read_table(table)
        columns = [c.strip() for c in next(iter(rows.values()), {}) if c]
        for column in columns:
            if column not in CSV_COLUMNS and (close := difflib.get_close_matches(column, CSV_COLUMNS, 1, 0.8)):
                raise ValueError(f"{table}: column {column!r} is not known; is {close[0]!r} meant?")
        if "image" not in columns:
            found = ", ".join(columns) or "none"
            raise ValueError(f"{table} needs the column image and a row; it has the columns: {found}")
        scan = Scan()
        for number, row in rows.items():
            entry = {(k or "").strip(): (v or "").strip() for k, v in row.items() if isinstance(v, str)}
            self._add(scan, entry, number, table)
        without = [i for i, case in enumerate(scan.cases) if not case.case]
        relative = [Path(os.path.relpath(scan.cases[i].image, table.parent)) for i in without]
        names = case_names([Path(*(p for p in r.parts if p not in ("/", ".."))) for r in relative], table.stem)
        for i, name in zip(without, names, strict=True):
            scan.cases[i] = replace(scan.cases[i], case=name)
        self._note_unlisted(scan, table)
        return scan

    def _note_unlisted(self, scan: Scan, table: Path) -> None:
        """Note image files that the table does not name: below `root`, or else around its images below its folder."""
        folders = [os.path.normpath(case.image.parent) for case in scan.cases]
        if resolved_root(self.root).is_dir():
            note_unlisted(table.parent, scan)
        elif folders and (around := Path(os.path.commonpath(folders))).is_relative_to(table.parent) and around.is_dir():
            note_unlisted(around, scan)

    @staticmethod
    def _add(scan: Scan, entry: dict[str, str], number: int, table: Path) -> None:
        case, image, label, group, split, modality = (entry.get(k, "") for k in CSV_COLUMNS)
        split = split.lower()
        where = _beside(table, image or label)
        if not image:
            scan.reject(where, case, f"line {number}: {'a label' if label else 'an entry'} without an image")
        elif split not in SPLITS:
            scan.reject(where, case, f"line {number}: split {split!r} is not known (train, validation, test)")
        else:
            try:
                stated = parsed_modalities(modality)
            except ValueError as error:
                scan.reject(where, case, f"line {number}: modality {error}")
                return
            path = _beside(table, label) if label else None
            known = "+".join(stated) if stated else None
            scan.cases.append(Case(file_name(case), where, path, group, SPLITS[split], known))


class SourceMissingError(ValueError):
    """The images are missing; a store that was made from them can still be used."""


def resolved_root(root: str | Path) -> Path:
    """Return the folder that `data.root` means, as a full path."""
    return Path(root).expanduser().resolve()


def existing_root(root: str | Path) -> Path:
    """Return the folder that `data.root` means.

    Raises:
        SourceMissingError: There is no such folder.
    """
    path = resolved_root(root)
    if not path.exists():
        raise SourceMissingError(f"data.root={root} does not exist")
    return path


def _beside(table: Path, file: str) -> Path:
    return table.parent / (Path(file).expanduser() if file.startswith("~/") else file)


def read_table(table: Path) -> dict[int, dict[str, str]]:
    """Return the rows of a file with a header, by the number of their last line.

    The cell separator is the most frequent of comma, semicolon, tab.
    """
    try:
        lines = read_text(table).splitlines()
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        reader = csv.DictReader(lines, delimiter=delimiter)
        rows = {}
        for row in reader:
            rows[reader.line_num] = row
        return rows
    except csv.Error as error:
        raise ValueError(f"{table} is no table ({error})") from error


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder, sorted, without hidden ones; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if has_image_suffix(f) and not f.name.startswith("."))
