"""Self-supervised learning on 3D medical images.

The public names below are imported on first use, so that `import medssl` and every `--help` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "load_encoder": "medssl.weights",
    "load_segmenter": "medssl.weights",
    "save_weights": "medssl.weights",
    "read_card": "medssl.weights",
    "load_features": "medssl.extraction.feature_file",
    "Method": "medssl.methods.base",
    "StepOutput": "medssl.methods.base",
    "Progress": "medssl.methods.base",
    "GLMAE": "medssl.methods.glmae",
    "Segmenter": "medssl.models.segmenter",
    "VisionTransformer": "medssl.models.vit",
    "Volume": "medssl.data.volume",
    "VolumeStore": "medssl.data.store",
    "Frame": "medssl.data.geometry",
    "View": "medssl.data.views",
    "ViewPlan": "medssl.data.views",
    "VolumeDataModule": "medssl.data.module",
    "prepare_store": "medssl.data.prepare",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from medssl.data.geometry import Frame as Frame
    from medssl.data.module import VolumeDataModule as VolumeDataModule
    from medssl.data.prepare import prepare_store as prepare_store
    from medssl.data.store import VolumeStore as VolumeStore
    from medssl.data.views import View as View
    from medssl.data.views import ViewPlan as ViewPlan
    from medssl.data.volume import Volume as Volume
    from medssl.extraction.feature_file import load_features as load_features
    from medssl.methods.base import Method as Method
    from medssl.methods.base import Progress as Progress
    from medssl.methods.base import StepOutput as StepOutput
    from medssl.methods.glmae import GLMAE as GLMAE
    from medssl.models.segmenter import Segmenter as Segmenter
    from medssl.models.vit import VisionTransformer as VisionTransformer
    from medssl.weights import load_encoder as load_encoder
    from medssl.weights import load_segmenter as load_segmenter
    from medssl.weights import read_card as read_card
    from medssl.weights import save_weights as save_weights


def __getattr__(name: str) -> object:
    """Return the public object `name`, imported now."""
    if name not in _HOME:
        raise AttributeError(f"module 'medssl' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
