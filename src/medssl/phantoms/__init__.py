"""Procedural torso CTs, so that everything can be tried without data; all of it is synthetic."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
