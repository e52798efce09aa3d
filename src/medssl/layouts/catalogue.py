"""The layouts that are known by name, and those that a user names by module."""

import argparse
import importlib
from typing import Any

from medssl.layouts import alice, drasclr, glmae, kaf, macl, sam
from medssl.layouts.base import Layout

SAFE_GLOBALS: list[Any] = [argparse.Namespace]
LAYOUTS = {
    layout.name: layout for layout in (glmae.LAYOUT, sam.LAYOUT, alice.LAYOUT, drasclr.LAYOUT, kaf.LAYOUT, macl.LAYOUT)
}


def get(name: str) -> Layout:
    """Return the layout called `name`: one of `LAYOUTS`, or a `Layout` of the user's own, named as `module.NAME`.

    Raises:
        ValueError: There is no layout of that name.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        known = f"known are {', '.join(LAYOUTS)}"
        raise ValueError(f"layout is {name!r}, {known}; one of your own is named as MODULE.NAME")
    try:
        layout = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"layout is {name!r}, which cannot be imported: {error}") from None
    if not isinstance(layout, Layout):
        raise ValueError(f"layout is {name!r}, which is a {type(layout).__name__}, not a medssl.layouts.base.Layout")
    return layout
