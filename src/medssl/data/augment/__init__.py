"""Augmentations: spatial ones move a view's frame on the host, intensity ones act on image batches on the device."""

from medssl.data.augment.base import Augmentation, IntensityAugmentation, Normalisation, SpatialAugmentation
from medssl.data.augment.filters import BiasField, Cutout, GaussianBlur, GaussianNoise, LowResolution
from medssl.data.augment.intensity import Brightness, Contrast, Gamma
from medssl.data.augment.normalise import ByModality, MinMax, Percentiles, Standardise, Window, ZScore
from medssl.data.augment.spatial import Affine, Elastic, Flip, Rotate90, Sometimes

__all__ = [
    "Affine",
    "Augmentation",
    "BiasField",
    "Brightness",
    "ByModality",
    "Contrast",
    "Cutout",
    "Elastic",
    "Flip",
    "Gamma",
    "GaussianBlur",
    "GaussianNoise",
    "IntensityAugmentation",
    "LowResolution",
    "MinMax",
    "Normalisation",
    "Percentiles",
    "Rotate90",
    "Sometimes",
    "SpatialAugmentation",
    "Standardise",
    "Window",
    "ZScore",
]
