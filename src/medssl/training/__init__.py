"""Training of a method: loop, optimiser, and the files of a run."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
