"""Evaluation: scores of segmentations, and comparisons of the scores of several runs."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
