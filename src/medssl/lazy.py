"""Names and modules of a package that are imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules


def lazy(
    package: str, homes: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose modules are attributes before anyone imports them.

    Args:
        package: its name.
        homes: further attributes, and the module of each.
    """
    names = homes or {}

    def modules() -> set[str]:
        return {module.name for module in iter_modules(import_module(package).__path__)}

    def attribute(name: str) -> object:
        if name in names:
            return getattr(import_module(names[name]), name)
        if not name.startswith("_") and name in modules():
            return import_module(f"{package}.{name}")
        close = get_close_matches(name, {*names, *modules()}, n=1)
        suggestion = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{suggestion}")

    return attribute, lambda: sorted({*vars(import_module(package)), *names, *modules()})
