"""Self-supervised methods, one file each."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
