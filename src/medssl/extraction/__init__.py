"""Extraction: features of subjects, locations and points by a trained encoder, and the matching of points."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
