"""Public data sets with labels, read in their published folder layout: BTCV and AMOS."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.data.cases import Case, Scan
from medssl.data.formats import stem
from medssl.data.image_tree import note_unlisted
from medssl.data.sources import SourceMissingError, existing_root, image_files, resolved_root

BTCV_ORGANS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
AMOS_ORGANS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder",
    "prostate or uterus",
)  # fmt: skip
LAST_CT = 500
"""The largest case number of a CT in AMOS; cases above it are MR."""
LEFT_OUT = "of the modality that data.modality leaves out"
NUM_NAMED = 6


@dataclass(frozen=True, kw_only=True)
class Btcv:
    """Beyond the Cranial Vault (Synapse): 30 abdominal CTs with 13 organs, and 20 without labels.

    It reads `Training/img/img0001.nii.gz` with `Training/label/label0001.nii.gz`, where the root may be Training or a
    folder above it, and `imagesTr` with `labelsTr`. The images of `Testing/img` and `imagesTs` are test cases.
    """

    root: str | Path

    def recipe(self) -> dict[str, Any]:
        """Return the root folder."""
        return {"kind": "btcv", "root": str(resolved_root(self.root))}

    def label_names(self) -> dict[int, str]:
        """Return the names of the 13 organs."""
        return dict(enumerate(BTCV_ORGANS, start=1))

    def scan(self) -> Scan:
        """Return one case per image, named like the file (`img0001`)."""
        root, scan = existing_root(self.root), Scan()
        for images, labels, split in self._folders(root):
            for number, image, label in _pairs(scan, images, labels, prefixes=("img", "label"), split=split):
                scan.cases.append(Case(f"img{number:04d}", image, label, "btcv", split, "ct"))
        if not scan.cases:
            raise _layout_error(scan, root, "BTCV", BTCV_LAYOUT)
        note_unlisted(root, scan)
        return scan

    @staticmethod
    def _folders(root: Path) -> Iterator[tuple[Path, Path, str]]:
        """Return the folders of images and of labels, and their split."""
        above = root, root / "RawData", root / "Abdomen" / "RawData"
        for training in [root] if (root / "img").is_dir() else [folder / "Training" for folder in above]:
            yield training / "img", training / "label", "train"
            yield training.parent / "Testing" / "img", training.parent / "Testing" / "label", "test"
        yield root / "imagesTr", root / "labelsTr", "train"
        yield root / "imagesTs", root / "labelsTs", "test"


@dataclass(frozen=True, kw_only=True)
class Amos:
    """AMOS 2022: abdominal CT (numbers up to 500) and MR (above) with 15 organs, in its official split.

    Args:
        root: Folder that holds imagesTr, labelsTr, imagesVa, labelsVa and imagesTs, or the folder above (`amos22`).
        modality: Which images become cases: "ct", "mr" or "both".
    """

    root: str | Path
    modality: str = "both"

    def recipe(self) -> dict[str, Any]:
        """Return the root folder and the modality."""
        return {"kind": "amos", "root": str(resolved_root(self.root)), "modality": self.modality}

    def label_names(self) -> dict[int, str]:
        """Return the names of the 15 organs."""
        return dict(enumerate(AMOS_ORGANS, start=1))

    def scan(self) -> Scan:
        """Return one case per image, named like the file (`amos_0001`); its modality is its group."""
        if self.modality not in ("ct", "mr", "both"):
            raise ValueError(f"data.modality must be ct, mr or both, got {self.modality!r}")
        root, scan = existing_root(self.root), Scan()
        numbers = {"ct": range(LAST_CT + 1), "mr": range(LAST_CT + 1, 10_000), "both": range(10_000)}[self.modality]
        for base in (root, root / "amos22"):
            for ending, split in (("Tr", "train"), ("Va", "validation"), ("Ts", "test")):
                folders = base / f"images{ending}", base / f"labels{ending}"
                for number, image, label in _pairs(scan, *folders, prefixes=("amos_",), split=split, numbers=numbers):
                    kind = "ct" if number <= LAST_CT else "mr"
                    scan.cases.append(Case(f"amos_{number:04d}", image, label, kind, split, kind))
        if not scan.cases:
            wanted = "" if self.modality == "both" else f" of data.modality={self.modality}"
            raise _layout_error(scan, root, f"AMOS images{wanted}", AMOS_LAYOUT)
        note_unlisted(root, scan)
        return scan


def _pairs(
    scan: Scan,
    images: Path,
    labels: Path,
    *,
    prefixes: tuple[str, ...],
    split: str,
    numbers: range = range(10_000),
) -> Iterator[tuple[int, Path, Path | None]]:
    """Return number, image and label of each case in two folders; only test cases may lack their label.

    A file with another name is a problem. So is an image or label without its counterpart.

    Args:
        scan: The scan that notes the problems.
        images: Folder of files named by the first prefix and four digits.
        labels: Folder of files named by any of the prefixes and the same digits.
        prefixes: Prefixes of the file names.
        split: Split of the cases.
        numbers: Case numbers that are read.
    """
    image_of = _by_number(scan, images, prefixes[:1], numbers)
    label_of = _by_number(scan, labels, prefixes, numbers)
    for number, image in image_of.items():
        if number in label_of or split == "test":
            yield number, image, label_of.get(number)
        else:
            scan.reject(image, stem(image), f"there is no label for it in {labels}")
    for number in sorted(label_of.keys() - image_of.keys()):
        scan.reject(label_of[number], stem(label_of[number]), "a label without an image")


def _by_number(scan: Scan, folder: Path, prefixes: tuple[str, ...], numbers: range) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for file in image_files(folder):
        match = re.fullmatch(rf"(?:{'|'.join(prefixes)})(\d{{4}})", stem(file))
        if match is None:
            scan.reject(file, "", f"the name is not of the kind {prefixes[-1]}0001.nii.gz")
        elif (number := int(match[1])) in found:
            scan.reject(file, "", f"{found[number].name} lies beside it; drop one of the two")
        elif number in numbers:
            found[number] = file
        else:
            scan.skip(file, LEFT_OUT)
    return found


BTCV_LAYOUT = (
    "Training/img/img0001.nii.gz with Training/label/label0001.nii.gz, in data.root or in its folder RawData, "
    "or imagesTr/img0001.nii.gz with labelsTr/label0001.nii.gz"
)
AMOS_LAYOUT = (
    "imagesTr/amos_0001.nii.gz with labelsTr/amos_0001.nii.gz, and the same in imagesVa, labelsVa and imagesTs "
    f"(numbers up to {LAST_CT} are CT, the others MR)"
)


def _layout_error(scan: Scan, root: Path, what: str, layout: str) -> SourceMissingError:
    """Return an error that names what lies at the root and what was expected there."""
    entries = sorted(root.iterdir()) if root.is_dir() else []
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries[:NUM_NAMED]]
    more = ", ..." if len(entries) > NUM_NAMED else ""
    found = ", ".join(names) + more or ("an empty folder" if root.is_dir() else "a file")
    reason = f" ({scan.problems[0]['file']}: {scan.problems[0]['reason']})" if scan.problems else ""
    return SourceMissingError(f"data.root={root} holds no {what}: found {found}{reason}; expected is {layout}")
