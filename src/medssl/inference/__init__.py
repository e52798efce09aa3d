"""Inference: how images are read, drawn for a network, and written on their own grid."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
