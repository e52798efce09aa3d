"""The file `dataset.json` of the Medical Segmentation Decathlon and of nnU-Net: cases, channels, label values."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "dataset.json"
IGNORED = "ignore"
"""The name of the label whose voxels count neither in training nor in results, as in nnU-Net."""
ENTRY = 'an entry is {"image": FILE or [FILE, ...], "label": FILE}, or the file name of an image'


@dataclass(frozen=True)
class ListedCase:
    """An entry of a list of cases: the files of its image, one per channel or one for all, and its label map."""

    images: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class DatasetJson:
    """The content of a `dataset.json`; its parts are checked as they are asked for.

    Args:
        path: The file.
        content: The mapping that it holds.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, root: Path) -> "DatasetJson":
        """Return the `dataset.json` in a folder.

        Raises:
            ValueError: It cannot be read, or holds something else than a mapping.
        """
        path = root / FILE
        try:
            if path.exists() and not path.is_file():
                raise ValueError("a pipe or a folder, not a file")
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); is data.root the right folder?") from error
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            kind = "a list" if isinstance(content, list) else json.dumps(content)[:40]
            raise ValueError(f'{path} holds {kind}; expected is {{"training": [entries], ...}}, and {ENTRY}')
        return cls(path, content)

    @classmethod
    def find(cls, root: Path) -> "DatasetJson | None":
        """Return the `dataset.json` in a folder; None where there is none."""
        return cls.read(root) if (root / FILE).is_file() else None

    def num_folds_stated(self, keys: Iterable[str]) -> int:
        """Return how many entries of some lists name a fold of their own, as those of MONAI do."""
        lists = (self.content.get(key) or [] for key in keys)
        return sum(isinstance(entry, dict) and "fold" in entry for listed in lists for entry in listed)

    def cases(self, key: str) -> list[ListedCase]:
        """Return the entries of the list `key`; there may be no such list.

        Raises:
            ValueError: It is no list, or an entry is not understood.
        """
        listed = self.content.get(key) or []
        if not isinstance(listed, list):
            raise ValueError(f"{self.path}: {key} is {_short(listed)}; expected is a list, and {ENTRY}")
        return [self._case(entry, f"{key}, entry {number}") for number, entry in enumerate(listed, start=1)]

    def _case(self, entry: Any, where: str) -> ListedCase:
        given = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict):
            raise ValueError(f"{self.path}: {where} is {_short(entry)}; {ENTRY}")
        image, label = given.get("image"), given.get("label")
        images = [image] if isinstance(image, str) and image else image or []
        if not isinstance(images, list) or not all(isinstance(file, str) and file for file in images):
            raise ValueError(f"{self.path}: {where} has the image {_short(image)}; {ENTRY}")
        if label is not None and not isinstance(label, str):
            raise ValueError(f"{self.path}: {where} has the label {_short(label)}; a case has one label map: {ENTRY}")
        return ListedCase(tuple(images), label or None)

    def label_names(self) -> dict[int, str]:
        """Return the names of the label values, without the background and the ignored label.

        Raises:
            ValueError: The list states regions, or an ignored label that is none.
        """
        ignored = self.ignored_label()
        return {value: name for value, name in self._labels() if value not in (0, ignored)}

    def ignored_label(self) -> int | None:
        """Return the value of the label `ignore`; None where there is none.

        Raises:
            ValueError: The list states regions, or an ignored label that is none.
        """
        values = [value for value, name in self._labels() if name.strip().lower() == IGNORED]
        if len(values) > 1 or values == [0]:
            found = ", ".join(map(str, values))
            raise ValueError(f"{self.path}: labels: {IGNORED!r} is {found}; give it one value of its own, above 0")
        return values[0] if values else None

    def _labels(self) -> list[tuple[int, str]]:
        """Return value and name of each entry of `labels`, whichever of the two is the key; others are left out.

        Raises:
            ValueError: An entry is a region of several values.
        """
        labels, found = self.content.get("labels"), []
        for key, entry in labels.items() if isinstance(labels, dict) else ():
            entry = entry[0] if isinstance(entry, list) and len(entry) == 1 else entry
            if isinstance(entry, list):
                values = ", ".join(map(str, entry))
                raise ValueError(
                    f"{self.path}: labels: {key!r} is a region of the values {values}, and regions are not learnt; "
                    "give each label value a name of its own instead (and leave out regions_class_order)"
                )
            value, name = (key, entry) if key.isdecimal() else (entry, key)
            if str(value).isdecimal():
                found.append((int(value), str(name)))
        return found

    def channel_names(self) -> tuple[str, ...]:
        """Return what the channels are called (`channel_names`, or `modality`), in order; none where it is not stated.

        Raises:
            ValueError: Channels are stated that are not numbered from 0.
        """
        key = next((key for key in ("channel_names", "modality") if self.content.get(key)), None)
        stated = None if key is None else self.content[key]
        if isinstance(stated, dict):
            named = {str(number): str(name) for number, name in stated.items()}
            numbers = [str(number) for number in range(len(named))]
            if sorted(named) != sorted(numbers):
                raise ValueError(
                    f'{self.path}: {key} names the channels {", ".join(named)}; number them from 0: {{"0": "CT"}}'
                )
            return tuple(named[number] for number in numbers)
        if isinstance(stated, list):
            return tuple(map(str, stated))
        return () if stated is None else (str(stated),)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
