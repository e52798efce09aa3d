"""Phantoms: procedural torso CTs, fully synthetic, so that everything can be tried without real images."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
