"""Tables that are derived from the cases of a store, one file per case: keypoints, locations, heights, pairs, ..."""

from medssl.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
