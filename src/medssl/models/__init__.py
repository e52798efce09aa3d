"""Encoders, decoders and heads, one family in each file."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
