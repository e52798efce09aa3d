"""A run of a command: its start, its folder, its signals, its ranks and its store."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
