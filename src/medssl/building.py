"""Objects from recipes: a recipe is a mapping with a class under `_target_` and its keywords beside it."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

from torch import nn

from medssl.moved import refuse_moved

NETWORKS = ("medssl.models", "monai.networks")
Built = TypeVar("Built")


def trusted_class(
    recipe: Mapping[str, Any], packages: Sequence[str], *, base: type[Built], dataclasses: bool = False
) -> type[Built]:
    """Return the class that a recipe names; it is a subclass of `base`.

    With `dataclasses` a dataclass that is defined in one of the packages is accepted too.

    Raises:
        ValueError: The class is not in one of the packages, cannot be imported, or is no subclass of `base`.
    """
    refuse_moved({"_target_": recipe.get("_target_")}, source="the recipe")
    target = str(recipe.get("_target_"))
    package, _, name = target.rpartition(".")
    if not _inside(package, packages):
        raise ValueError(
            f"the recipe names the class {target}, which is outside {', '.join(packages)}; if you trust where it comes "
            f"from, pass allow_modules=[{package!r}]"
        )
    try:
        named = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the recipe names the class {target}, which cannot be imported: {error}") from None
    settings = dataclasses and is_dataclass(named) and _inside(getattr(named, "__module__", ""), packages)
    if not (isinstance(named, type) and (issubclass(named, base) or settings)):
        kind = "torch.nn.Module" if base is nn.Module else f"{base.__module__}.{base.__qualname__}"
        raise ValueError(f"the recipe names {target}, which is no {kind}")
    return named


def build_trusted(
    recipe: Mapping[str, Any], packages: Sequence[str], base: type[Built], *, dataclasses: bool = False
) -> Built:
    """Build the object that a recipe describes, recipes among its keywords first; only classes of `packages` are built.

    Recipes among the keywords may name dataclasses instead, such as the settings of a detector.

    Raises:
        ValueError: `trusted_class` refuses a class, or a class refuses its keywords.
    """
    keywords = {
        key: build_trusted(value, packages, base, dataclasses=True)
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for key, value in recipe.items()
        if key != "_target_"
    }
    named = trusted_class(recipe, packages, base=base, dataclasses=dataclasses)
    try:
        return named(**keywords)
    except TypeError as error:
        raise ValueError(f"{recipe['_target_']} does not take what the recipe gives: {error}") from None


def build_network(recipe: Mapping[str, Any], *, allow_modules: Sequence[str] = ()) -> nn.Module:
    """Build the network that a recipe describes out of `medssl.models`, `monai.networks` or an allowed package.

    Raises:
        ValueError: The class is not in a trusted or allowed package, is no network, or refuses its keywords.
    """
    return build_trusted(recipe, (*NETWORKS, *allow_modules), nn.Module)


def _inside(package: str, packages: Sequence[str]) -> bool:
    return any(package == root or package.startswith(f"{root}.") for root in packages)
