"""Checks of settings: each returns what it was given, or says what was got, what is allowed and what to do.

Names are those of the configuration (`weights.branch`), so that a user finds the setting. Neither torch nor lightning
is imported here, so that a wrong setting is reported at once.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from medssl.data.modality import parsed_modalities

Value = TypeVar("Value")
DEVICES = ("auto", "cpu", "cuda")


def choice(name: str, value: Value, allowed: Collection[Any]) -> Value:
    """Return `value`, which is one of `allowed`.

    Raises:
        ValueError: `value` is not one of `allowed`.
    """
    if isinstance(value, bool) != any(isinstance(one, bool) for one in allowed) or value not in allowed:
        words = ", ".join("null" if one is None else str(one) for one in allowed)
        raise ValueError(f"{name} is {value!r}, allowed are {words}")
    return value


def modalities(name: str, value: Any) -> tuple[str, ...] | None:
    """Return the modalities that a setting states, one of all channels or one of each; None where it states none.

    Raises:
        ValueError: `value` holds a word that is no modality.
    """
    try:
        return parsed_modalities(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def switch(name: str, value: Any) -> bool:
    """Return `value`, which is true or false.

    Raises:
        ValueError: `value` is neither, such as the text "no".
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {value!r}")
    return value


def whole(name: str, value: Any, *, least: int = 0, most: int | None = None, or_null: str = "") -> Any:
    """Return `value`, a whole number from `least` to `most`.

    Args:
        name: The name of the setting.
        value: The given value.
        least: The smallest number that is allowed.
        most: The largest number that is allowed; None for no bound.
        or_null: The meaning of null, such as "for never"; an empty text refuses null.

    Raises:
        ValueError: `value` is no such number.
    """
    if value is None and or_null:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bounds = f"from {least} up" if most is None else f"from {least} to {most}"
        null = f", or null {or_null}" if or_null else ""
        raise ValueError(f"{name} must be a whole number {bounds}{null}; got {value!r}")
    return value


def number(name: str, value: Any, *, above: float | None = None) -> float:
    """Return `value`, a finite number from 0 up, or `above` a bound.

    Raises:
        ValueError: `value` is no such number.
    """
    bounds = "from 0 up" if above is None else f"above {above:g}"
    if not is_number(value) or value < 0 or (above is not None and value <= above):
        raise ValueError(f"{name} must be a number {bounds}; got {value!r}")
    return value


def share(name: str, value: Any) -> float:
    """Return `value`, a number from 0 to 1.

    Raises:
        ValueError: `value` is no such number.
    """
    if number(name, value) > 1:
        raise ValueError(f"{name} is a share, from 0 to 1; got {value!r}")
    return value


def triple(name: str, values: Any, *, kind: type = int) -> tuple[Any, Any, Any]:
    """Return three numbers above 0 along x, y, z; one number stands for three.

    Args:
        name: The name of the setting.
        values: The given values, plain or a list of the configuration.
        kind: `int` for whole numbers, `float` for any.

    Raises:
        ValueError: `values` are not three such numbers.
    """
    given = [values] * 3 if is_number(values) else list(values) if _is_list(values) else []
    fits = [is_number(one) and one > 0 and (kind is float or isinstance(one, int)) for one in given]
    if len(given) != 3 or not all(fits):
        raise ValueError(f"{name}={values} must be three {'whole ' * (kind is int)}numbers above 0, [x,y,z]")
    x, y, z = (kind(one) for one in given)
    return x, y, z


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite number, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def existing(name: str, path: Any, *, what: str, folder: bool | None = False) -> Path:
    """Return the path that a setting gives, with `~` expanded; it exists.

    Args:
        name: The name of the setting.
        path: The given path.
        what: The kind of file, for the message: "weight file".
        folder: Whether it is a folder rather than a file; None if both are allowed.

    Raises:
        ValueError: Nothing lies there, or a file in place of a folder, or the reverse.
    """
    found = Path(str(path)).expanduser()
    if not (found.exists() if folder is None else found.is_dir() if folder else found.is_file()):
        kind = "" if folder is None or not found.exists() else f"; that is a {'file' if folder else 'folder'}"
        raise ValueError(f"{name}: there is no {what} {found}{kind}")
    return found


def existing_setting(config: Any, name: str, *, what: str, folder: bool | None = False) -> Path | None:
    """Return the path that the configuration has at a dotted name, checked by `existing`; None where it is null.

    Raises:
        ValueError: The path does not exist.
    """
    node = config
    for key in name.split("."):
        node = None if node is None else node.get(key)
    return None if node is None else existing(name.removesuffix(".path"), node, what=what, folder=folder)


def result_folder(path: Any, *, outputs: Sequence[str] = (), overwrite: bool = True, name: str = "output_dir") -> Path:
    """Return the folder that results go to; it need not exist yet.

    Args:
        path: The given path.
        outputs: Names of the files that will be written there.
        overwrite: Whether such files may be replaced.
        name: The name of the setting.

    Raises:
        ValueError: The path is a file, or the folder holds one of `outputs` that must not be replaced.
    """
    folder = Path(str(path)).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name}={folder} is a file; name a folder")
    if there := [folder / output for output in outputs if (folder / output).exists() and not overwrite]:
        raise ValueError(f"{there[0]} already exists; replace it by overwrite=true, or give another {name}")
    return folder


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)
