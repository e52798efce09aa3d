"""Names of splits: rules, files of the registry, files of users; they can be checked before there is a store."""

from pathlib import Path

REGISTRY = Path(__file__).with_name("split_files")
RULES = ("auto", "source", "5fold")


def check_split(split: str | None) -> None:
    """Check, without a store, that there is a split of this name, or the file that it names.

    Raises:
        ValueError: There is neither.
    """
    if split is not None and split not in RULES and not split_file(split).is_file():
        raise ValueError(f"data.split={split} does not exist; give a file that lists the cases of each use")


def split_file(split: str) -> Path:
    """Return the file of a split: that of the registry, or the given one.

    Raises:
        ValueError: The name is not in the registry.
    """
    if split.endswith(".json"):
        return Path(split).expanduser()
    known = sorted(file.stem for file in REGISTRY.glob("*.json"))
    if split not in known:
        raise ValueError(
            f"data.split={split} is not known; there are {', '.join((*RULES, *known))}, or the path of a .json file"
        )
    return REGISTRY / f"{split}.json"
