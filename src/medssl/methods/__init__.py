"""Self-supervised methods, one file for each, and the rules of positions and points that they share."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
