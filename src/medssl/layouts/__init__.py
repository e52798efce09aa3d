"""Published checkpoints: one file a layout says how its tensors are named, built and fed."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
