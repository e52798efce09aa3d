"""Probes: how well frozen features predict a target, with intervals."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
