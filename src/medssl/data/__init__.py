"""The way from files to views: reading, the store, placements, drawing."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
