"""The recipe of a store: all that its content depends on. It names the store and is checked before any work."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medssl.data.cases import Source
from medssl.data.description import read_description
from medssl.data.modality import parsed_modalities
from medssl.data.volume import BODY_RECIPE

MIN_SIDE_VOXEL = 8
"""Images with a shorter side are rejected, if the configuration does not say otherwise."""


def store_recipe(
    source: Source,
    *,
    channels: str | int | None = None,
    spacing_mm: float | Sequence[float] | None = None,
    min_side_voxel: int = MIN_SIDE_VOXEL,
    modality: Sequence[str] | None = None,
    checksums: bool = False,
    assume_spacing_mm: float | Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return all that the content of a store depends on, as JSON values; an assumed spacing only if there is one."""
    spacing, assumed = three_spacings(spacing_mm), assumed_spacing(assume_spacing_mm)
    return ({} if assumed is None else {"assume_spacing_mm": list(assumed)}) | {
        "source": source.recipe(),
        "channels": channels,
        "spacing_mm": None if spacing is None else list(spacing),
        "min_side_voxel": min_side_voxel,
        "modality": None if modality is None else list(modality),
        "body": BODY_RECIPE,
        **({"checksums": True} if checksums else {}),
    }


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits that stand for a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def preparation(data: Any) -> dict[str, Any]:
    """Return what a configuration's `data` says of preparing an image; what it does not say is the default.

    A source with a `modality` of its own (`data=amos`, where it chooses the cases) states that of its cases.

    Raises:
        ValueError: `data.modality` holds a word that is no modality.
    """
    own = "modality" in (data.get("source") or {})
    try:
        modality = None if own else parsed_modalities(data.get("modality"))
    except ValueError as error:
        raise ValueError(f"data.modality: {error}") from None
    assumed = data.get("assume_spacing_mm")
    return ({} if assumed is None else {"assume_spacing_mm": assumed}) | {
        "channels": data.get("channels"),
        "spacing_mm": data.get("spacing_mm"),
        "min_side_voxel": data.get("min_side_voxel", MIN_SIDE_VOXEL),
        "modality": modality,
        "checksums": bool(data.get("checksums", False)),
    }


def locate_store(data: Any, store: str | Path | None) -> Path:
    """Return the folder of the store that a configuration's `data` and `store` mean.

    Raises:
        ValueError: No store is named for `data=store`, or the named store was prepared with another recipe.
    """
    if data.get("source") is None:
        root = store or data.get("root")
        if not root:
            raise ValueError("data=store needs the prepared store: give store=PATH")
        return Path(root).expanduser()
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(data, "root"):
        raise ValueError(f"data={data.name} needs data.root=PATH")
    recipe = store_recipe(instantiate(data.source, _convert_="all"), **preparation(data))
    if store is None:
        return Path("stores") / f"{data.name}-{recipe_hash(recipe)}"
    root = Path(store).expanduser()
    check_recipe(root, recipe)
    return root


def check_recipe(root: Path, recipe: dict[str, Any]) -> None:
    """Raise a ValueError where `root` holds other files, or cases that were finished with another recipe."""
    if not root.exists():
        return
    if not root.is_dir():
        raise ValueError(f"store={root} is a file; a store is a folder")
    description = root / "store.json"
    if not description.is_file():
        foreign = [f.name for f in root.iterdir() if not f.name.endswith(".partial")]
        if foreign:
            raise ValueError(f"store={root} holds other files ({foreign[0]}, ...) and no store.json; name a new folder")
        return
    found = read_description(root)
    old, new = _flat(found["recipe"]), _flat(json.loads(json.dumps(recipe)))
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changed and next(root.glob("*.zarr"), None) is not None:
        what = "; ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in changed)
        raise ValueError(f"store={root} was prepared with another recipe ({what}); name another store or delete it")


def three_spacings(
    spacing_mm: float | Sequence[float] | None, *, name: str = "data.spacing_mm"
) -> tuple[float, ...] | None:
    """Return the spacing along x, y, z that one or three numbers mean; None stays None."""
    if spacing_mm is None:
        return None
    values = [spacing_mm] * 3 if isinstance(spacing_mm, int | float) else list(spacing_mm)
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    if len(values) != 3 or len(numbers) != 3:
        raise ValueError(f"{name} takes one or three positive numbers, or null; got {spacing_mm}")
    return tuple(float(value) for value in numbers)


def assumed_spacing(spacing_mm: float | Sequence[float] | None) -> tuple[float, ...] | None:
    """Return the spacing along the axes of a file that one or three numbers mean; None stays None."""
    return three_spacings(spacing_mm, name="data.assume_spacing_mm")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
