"""Small operations on tensors and networks that methods and training share."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
