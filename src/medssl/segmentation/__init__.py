"""Segmentation by a trained network: fine-tuning, evaluation and prediction."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
