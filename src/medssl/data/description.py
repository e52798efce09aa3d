"""The description of a store, `store.json`: its format and its recipe."""

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

from medssl.data.atomic import write_text
from medssl.data.checksums import DamagedError, read_sealed, sealed

FORMAT = 2
"""The format of stores that this version reads and writes; docs/data.md lists what the others are."""


def write_description(root: Path, recipe: dict[str, Any]) -> None:
    """Write format and recipe of a store, all or nothing."""
    values = sealed({"format": FORMAT, "recipe": recipe})
    write_text(root / "store.json", json.dumps(values, indent=1, sort_keys=True))


def read_description(root: Path) -> dict[str, Any]:
    """Return format and recipe of a store.

    Raises:
        ValueError: The store has another format, or its description is damaged.
        FileNotFoundError: There is no description.
    """
    path = root / "store.json"
    try:
        found = read_sealed(path, remedy="delete the store and prepare it again")
    except DamagedError:
        if (first := _of_format_one(path)) is None:
            raise
        found = first
    check_format(root, found)
    return found


def _of_format_one(path: Path) -> dict[str, Any] | None:
    """Return the description of a store of format 1, which has no checksum; None where the file is something else."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.get("format") == 1:
            return found
    return None


def check_format(root: Path, description: dict[str, Any]) -> None:
    """Check that a store has the format of this version.

    Raises:
        ValueError: It has another one.
    """
    found = description.get("format")
    if found != FORMAT:
        raise ValueError(
            f"store={root} has format {found}, this version reads and writes {FORMAT}; prepare its images again into "
            f"another folder: {command_for(description.get('recipe'), f'{root}-{FORMAT}')}"
        )


def command_for(recipe: Any, store: str) -> str:
    """Return the command that prepares a recipe into `store`; it has `...` for what the recipe does not say."""
    recipe = recipe if isinstance(recipe, dict) else {}
    source = recipe.get("source") if isinstance(recipe.get("source"), dict) else {}
    words = [f"data={source.get('kind', '...')}"]
    words += [f"data.root={source['root']}"] if "root" in source else []
    for key, usual in (("modality", None), ("include_labels", False)):
        if source.get(key, usual) not in (usual, "both"):
            words.append(f"data.{key}={_word(source[key])}")
    for key in ("channels", "spacing_mm", "min_side_voxel"):
        if key in recipe and recipe[key] is not None:
            words.append(f"data.{key}={_word(recipe[key])}")
    return shlex.join(["python", "-m", "medssl.prepare", *words, f"store={store}"])


def _word(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).strip('"')
