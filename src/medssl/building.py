"""Objects from recipes: a recipe is a mapping with a class under `_target_` and its keywords beside it.

Networks are built this one way, whether a configuration or the card of a file describes them.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

from torch import nn

from medssl.moved import refuse_moved

NETWORKS = ("medssl.models", "monai.networks")
Built = TypeVar("Built")


def named_class(
    recipe: Mapping[str, Any],
    packages: Sequence[str] | None,
    *,
    base: type[Built],
    dataclasses: bool = False,
    where: str = "the recipe",
) -> type[Built]:
    """Return the class that a recipe names.

    Args:
        recipe: Mapping with the path of the class under `_target_`.
        packages: Packages whose classes may be named; None allows all, for recipes that the user wrote.
        base: Class that the named one is derived from.
        dataclasses: Whether a dataclass of the packages is accepted too.
        where: Name of the recipe in errors.

    Raises:
        ValueError: The class is not in one of the packages, cannot be imported, or is no subclass of `base`.
    """
    refuse_moved({"_target_": recipe.get("_target_")}, source=where)
    target = str(recipe.get("_target_"))
    package, _, name = target.rpartition(".")
    if packages is not None and not _inside(package, packages):
        raise ValueError(
            f"{where} names the class {target}, which is outside {', '.join(packages)}; if you trust where it comes "
            f"from, pass allow_modules=[{package!r}]"
        )
    try:
        named = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where} names the class {target}, which cannot be imported: {error}") from None
    settings = dataclasses and is_dataclass(named) and _inside(getattr(named, "__module__", ""), packages or [package])
    if not (base is object or settings or (isinstance(named, type) and issubclass(named, base))):
        kind = "torch.nn.Module" if base is nn.Module else f"{base.__module__}.{base.__qualname__}"
        raise ValueError(f"{where} names {target}, which is no {kind}")
    return named


def build(
    recipe: Mapping[str, Any],
    *,
    base: type[Built],
    packages: Sequence[str] | None = None,
    before: Mapping[str, Any] | None = None,
    where: str = "the recipe",
) -> Built:
    """Build the object that a recipe describes, recipes among its keywords first and in their order.

    A required keyword that a recipe leaves out is taken from the networks built before it among the keywords of the
    same class: `encoder_channels` is the attribute `channels` of `encoder`, and any other name is an attribute that one
    of them has. A class with a function `complete_recipe(keywords, packages)` gets its keywords from it, before any
    network among them is built.

    Args:
        recipe: Mapping of `_target_` and keywords.
        base: Class that the named one is derived from.
        packages: Packages whose classes are built. Keywords may be dataclasses of them, such as the settings of a
            detector. None builds all classes, for recipes that the user wrote.
        before: Networks that were built before this one, by name.
        where: Name of the recipe in errors.

    Raises:
        ValueError: `named_class` refuses a class, or a class refuses its keywords.
    """
    return _build(recipe, base=base, packages=packages, before=before or {}, where=where, inner=False)


def build_network(
    recipe: Mapping[str, Any], *, allow_modules: Sequence[str] = (), before: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """Build the network that a recipe describes out of `medssl.models`, `monai.networks` or an allowed package.

    Raises:
        ValueError: The class is not in a trusted or allowed package, is no network, or refuses its keywords.
    """
    return build(recipe, base=nn.Module, packages=(*NETWORKS, *allow_modules), before=before)


def takes(named: Callable[..., Any], keyword: str) -> bool:
    """Return whether a class or function has a keyword."""
    parameters = inspect.signature(named).parameters
    return keyword in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _build(
    recipe: Mapping[str, Any],
    *,
    base: type[Built],
    packages: Sequence[str] | None,
    before: Mapping[str, Any],
    where: str,
    inner: bool,
) -> Built:
    target = str(recipe.get("_target_"))
    named = named_class(recipe, packages, base=base, dataclasses=inner, where=where)
    keywords = {key: value for key, value in recipe.items() if key != "_target_"}
    if hydra := sorted(key for key in keywords if key.startswith("_")):
        raise ValueError(f"{where} has {', '.join(hydra)}; it takes `_target_` and the keywords of {target} alone")
    if (complete := getattr(named, "complete_recipe", None)) is not None:
        keywords = complete(keywords, packages)
    inside: Any = object if packages is None else base  # whoever writes a configuration may name any class in it
    built: dict[str, Any] = {}

    def made(value: Any, where: str) -> Any:
        if isinstance(value, Mapping) and "_target_" in value:
            return _build(value, base=inside, packages=packages, before=built, where=where, inner=True)
        if isinstance(value, Mapping):
            return {key: made(one, f"{where}.{key}") for key, one in value.items()}
        return [made(one, where) for one in value] if isinstance(value, list) else value

    for key, value in keywords.items():
        built[key] = made(value, f"{where}.{key}")
    built |= _followed(named, built.keys(), before)
    try:
        inspect.signature(named).bind(**built)
    except TypeError as error:
        raise ValueError(f"{target} does not take what {where} gives: {error}") from None
    try:
        return named(**built)
    except TypeError as error:
        if packages is None:
            raise  # a fault of the class, or a setting of another type
        raise ValueError(f"{target} does not take what {where} gives: {error}") from None


def _followed(named: type, given: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the required keywords that are not given and that networks built before have as attributes."""
    networks = {name: one for name, one in before.items() if isinstance(one, nn.Module)}
    found: dict[str, Any] = {}
    for parameter in inspect.signature(named).parameters.values():
        if parameter.name in given or parameter.default is not parameter.empty:
            continue
        for name, network in networks.items():
            for attribute in (parameter.name.removeprefix(f"{name}_"), parameter.name):
                if parameter.name not in found and hasattr(network, attribute):
                    found[parameter.name] = getattr(network, attribute)
    return found


def foreign_modules(recipe: Any) -> list[str]:
    """Return the packages of the classes in nested recipes that are built only if a user allows them, sorted."""
    found: set[str] = set()
    pending = [recipe]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            package = str(node.get("_target_", "")).rpartition(".")[0]
            found |= {package} if package and not _inside(package, NETWORKS) else set()
            pending += node.values()
        elif isinstance(node, list | tuple):
            pending += node
    return sorted(found)


def _inside(package: str, packages: Sequence[str]) -> bool:
    return any(package == root or package.startswith(f"{root}.") for root in packages)
