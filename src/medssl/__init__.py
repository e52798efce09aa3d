"""Self-supervised learning on 3D medical images.

The public names below, and the modules of all rooms, are imported on first use, so that `import medssl` and every
`--help` stay free of torch. docs/your-own-loop.md lists the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.lazy import lazy

__version__ = "0.1.0"

_HOME = {
    "build_method": "medssl.methods.build",
    "Method": "medssl.methods.base",
    "Progress": "medssl.methods.base",
    "StepOutput": "medssl.methods.base",
    "GLMAE": "medssl.methods.glmae",
    "MAE": "medssl.methods.mae",
    "Alice": "medssl.methods.alice",
    "DrasCLR": "medssl.methods.drasclr",
    "KAF": "medssl.methods.kaf",
    "MACL": "medssl.methods.macl",
    "SamEmbed": "medssl.methods.sam_embed",
    "ModelsGenesis": "medssl.methods.models_genesis",
    "SimCLR": "medssl.methods.simclr",
    "VoCo": "medssl.methods.voco",
    "halved_mse": "medssl.losses.alignment",
    "inter_volume_loss": "medssl.losses.alignment",
    "intra_volume_loss": "medssl.losses.alignment",
    "coarse_contrast": "medssl.losses.anatomy",
    "fine_contrast": "medssl.losses.anatomy",
    "centred_softmax": "medssl.losses.consistency",
    "cosine_distance_of_views": "medssl.losses.consistency",
    "cross_entropy_of_views": "medssl.losses.consistency",
    "sinkhorn": "medssl.losses.consistency",
    "dense_contrast": "medssl.losses.dense_contrast",
    "equivariance_loss": "medssl.losses.dense_contrast",
    "segment_contrast": "medssl.losses.dense_contrast",
    "discriminate": "medssl.losses.instance",
    "queue_logits": "medssl.losses.instance",
    "log_transport": "medssl.losses.optimal_transport",
    "matching_loss": "medssl.losses.optimal_transport",
    "contrast_of_positives": "medssl.losses.position_contrast",
    "base_similarity": "medssl.losses.volume_contrast",
    "box_overlap": "medssl.losses.volume_contrast",
    "overlap_losses": "medssl.losses.volume_contrast",
    "predicted_overlap": "medssl.losses.volume_contrast",
    "PositionRule": "medssl.methods.positions",
    "masked_mse": "medssl.losses.reconstruction",
    "voxel_error": "medssl.losses.reconstruction",
    "AttentionUNetDecoder": "medssl.models.attention_unet",
    "ConditionedEncoder": "medssl.models.conditioned",
    "PooledProjector": "medssl.models.pooled",
    "MLPHead": "medssl.models.heads",
    "ProjectionHead": "medssl.models.heads",
    "KAFDecoder": "medssl.models.kaf_unet",
    "KAFEncoder": "medssl.models.kaf_unet",
    "MACLUNetDecoder": "medssl.models.macl_unet",
    "MACLUNetEncoder": "medssl.models.macl_unet",
    "NnFormerDecoder": "medssl.models.nnformer",
    "NnFormerEncoder": "medssl.models.nnformer",
    "ResidualEncoder": "medssl.models.resenc",
    "SamResNet": "medssl.models.sam_resnet",
    "Segmenter": "medssl.models.segmenter",
    "build_segmenter": "medssl.models.segmenter",
    "SwinEncoder": "medssl.models.swin",
    "UNetDecoder": "medssl.models.unet",
    "UNetEncoder": "medssl.models.unet",
    "UNETRDecoder": "medssl.models.unetr",
    "Reconstructor": "medssl.models.reconstructor",
    "MaskedDecoder": "medssl.models.vit",
    "VisionTransformer": "medssl.models.vit",
    "Affine": "medssl.data.augment",
    "BiasField": "medssl.data.augment",
    "Brightness": "medssl.data.augment",
    "ByModality": "medssl.data.augment",
    "Contrast": "medssl.data.augment",
    "Cutout": "medssl.data.augment",
    "Elastic": "medssl.data.augment",
    "Flip": "medssl.data.augment",
    "Gamma": "medssl.data.augment",
    "GaussianBlur": "medssl.data.augment",
    "GaussianNoise": "medssl.data.augment",
    "IntensityAugmentation": "medssl.data.augment",
    "LowResolution": "medssl.data.augment",
    "MinMax": "medssl.data.augment",
    "Normalisation": "medssl.data.augment",
    "Percentiles": "medssl.data.augment",
    "Rotate90": "medssl.data.augment",
    "Sometimes": "medssl.data.augment",
    "SpatialAugmentation": "medssl.data.augment",
    "Standardise": "medssl.data.augment",
    "Window": "medssl.data.augment",
    "ZScore": "medssl.data.augment",
    "Cells": "medssl.data.cells",
    "Inside": "medssl.data.cells",
    "Shifted": "medssl.data.cells",
    "Frame": "medssl.data.geometry",
    "Matched": "medssl.data.matching",
    "VolumeDataModule": "medssl.data.module",
    "Containing": "medssl.data.placements",
    "GridCrop": "medssl.data.placements",
    "Nearby": "medssl.data.placements",
    "RandomCrop": "medssl.data.placements",
    "Same": "medssl.data.placements",
    "prepare_store": "medssl.data.prepare",
    "Anchored": "medssl.data.sampling",
    "Pairs": "medssl.data.sampling",
    "SameLocation": "medssl.data.sampling",
    "Shuffled": "medssl.data.sampling",
    "VolumeStore": "medssl.data.store",
    "View": "medssl.data.views",
    "ViewPlan": "medssl.data.views",
    "Volume": "medssl.data.volume",
    "load_features": "medssl.extraction.feature_file",
    "load_encoder": "medssl.weights",
    "load_parts": "medssl.weights",
    "load_segmenter": "medssl.weights",
    "read_card": "medssl.weights",
    "save_weights": "medssl.weights",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from medssl.data.augment import Affine as Affine
    from medssl.data.augment import BiasField as BiasField
    from medssl.data.augment import Brightness as Brightness
    from medssl.data.augment import ByModality as ByModality
    from medssl.data.augment import Contrast as Contrast
    from medssl.data.augment import Cutout as Cutout
    from medssl.data.augment import Elastic as Elastic
    from medssl.data.augment import Flip as Flip
    from medssl.data.augment import Gamma as Gamma
    from medssl.data.augment import GaussianBlur as GaussianBlur
    from medssl.data.augment import GaussianNoise as GaussianNoise
    from medssl.data.augment import IntensityAugmentation as IntensityAugmentation
    from medssl.data.augment import LowResolution as LowResolution
    from medssl.data.augment import MinMax as MinMax
    from medssl.data.augment import Normalisation as Normalisation
    from medssl.data.augment import Percentiles as Percentiles
    from medssl.data.augment import Rotate90 as Rotate90
    from medssl.data.augment import Sometimes as Sometimes
    from medssl.data.augment import SpatialAugmentation as SpatialAugmentation
    from medssl.data.augment import Standardise as Standardise
    from medssl.data.augment import Window as Window
    from medssl.data.augment import ZScore as ZScore
    from medssl.data.cells import Cells as Cells
    from medssl.data.cells import Inside as Inside
    from medssl.data.cells import Shifted as Shifted
    from medssl.data.geometry import Frame as Frame
    from medssl.data.matching import Matched as Matched
    from medssl.data.module import VolumeDataModule as VolumeDataModule
    from medssl.data.placements import Containing as Containing
    from medssl.data.placements import GridCrop as GridCrop
    from medssl.data.placements import Nearby as Nearby
    from medssl.data.placements import RandomCrop as RandomCrop
    from medssl.data.placements import Same as Same
    from medssl.data.prepare import prepare_store as prepare_store
    from medssl.data.sampling import Anchored as Anchored
    from medssl.data.sampling import Pairs as Pairs
    from medssl.data.sampling import SameLocation as SameLocation
    from medssl.data.sampling import Shuffled as Shuffled
    from medssl.data.store import VolumeStore as VolumeStore
    from medssl.data.views import View as View
    from medssl.data.views import ViewPlan as ViewPlan
    from medssl.data.volume import Volume as Volume
    from medssl.extraction.feature_file import load_features as load_features
    from medssl.losses.alignment import halved_mse as halved_mse
    from medssl.losses.alignment import inter_volume_loss as inter_volume_loss
    from medssl.losses.alignment import intra_volume_loss as intra_volume_loss
    from medssl.losses.anatomy import coarse_contrast as coarse_contrast
    from medssl.losses.anatomy import fine_contrast as fine_contrast
    from medssl.losses.consistency import centred_softmax as centred_softmax
    from medssl.losses.consistency import cosine_distance_of_views as cosine_distance_of_views
    from medssl.losses.consistency import cross_entropy_of_views as cross_entropy_of_views
    from medssl.losses.consistency import sinkhorn as sinkhorn
    from medssl.losses.dense_contrast import dense_contrast as dense_contrast
    from medssl.losses.dense_contrast import equivariance_loss as equivariance_loss
    from medssl.losses.dense_contrast import segment_contrast as segment_contrast
    from medssl.losses.instance import discriminate as discriminate
    from medssl.losses.instance import queue_logits as queue_logits
    from medssl.losses.optimal_transport import log_transport as log_transport
    from medssl.losses.optimal_transport import matching_loss as matching_loss
    from medssl.losses.position_contrast import contrast_of_positives as contrast_of_positives
    from medssl.losses.reconstruction import masked_mse as masked_mse
    from medssl.losses.reconstruction import voxel_error as voxel_error
    from medssl.losses.volume_contrast import base_similarity as base_similarity
    from medssl.losses.volume_contrast import box_overlap as box_overlap
    from medssl.losses.volume_contrast import overlap_losses as overlap_losses
    from medssl.losses.volume_contrast import predicted_overlap as predicted_overlap
    from medssl.methods.alice import Alice as Alice
    from medssl.methods.base import Method as Method
    from medssl.methods.base import Progress as Progress
    from medssl.methods.base import StepOutput as StepOutput
    from medssl.methods.build import build_method as build_method
    from medssl.methods.drasclr import DrasCLR as DrasCLR
    from medssl.methods.glmae import GLMAE as GLMAE
    from medssl.methods.kaf import KAF as KAF
    from medssl.methods.macl import MACL as MACL
    from medssl.methods.mae import MAE as MAE
    from medssl.methods.models_genesis import ModelsGenesis as ModelsGenesis
    from medssl.methods.positions import PositionRule as PositionRule
    from medssl.methods.sam_embed import SamEmbed as SamEmbed
    from medssl.methods.simclr import SimCLR as SimCLR
    from medssl.methods.voco import VoCo as VoCo
    from medssl.models.attention_unet import AttentionUNetDecoder as AttentionUNetDecoder
    from medssl.models.conditioned import ConditionedEncoder as ConditionedEncoder
    from medssl.models.heads import MLPHead as MLPHead
    from medssl.models.heads import ProjectionHead as ProjectionHead
    from medssl.models.kaf_unet import KAFDecoder as KAFDecoder
    from medssl.models.kaf_unet import KAFEncoder as KAFEncoder
    from medssl.models.macl_unet import MACLUNetDecoder as MACLUNetDecoder
    from medssl.models.macl_unet import MACLUNetEncoder as MACLUNetEncoder
    from medssl.models.nnformer import NnFormerDecoder as NnFormerDecoder
    from medssl.models.nnformer import NnFormerEncoder as NnFormerEncoder
    from medssl.models.pooled import PooledProjector as PooledProjector
    from medssl.models.reconstructor import Reconstructor as Reconstructor
    from medssl.models.resenc import ResidualEncoder as ResidualEncoder
    from medssl.models.sam_resnet import SamResNet as SamResNet
    from medssl.models.segmenter import Segmenter as Segmenter
    from medssl.models.segmenter import build_segmenter as build_segmenter
    from medssl.models.swin import SwinEncoder as SwinEncoder
    from medssl.models.unet import UNetDecoder as UNetDecoder
    from medssl.models.unet import UNetEncoder as UNetEncoder
    from medssl.models.unetr import UNETRDecoder as UNETRDecoder
    from medssl.models.vit import MaskedDecoder as MaskedDecoder
    from medssl.models.vit import VisionTransformer as VisionTransformer
    from medssl.weights import load_encoder as load_encoder
    from medssl.weights import load_parts as load_parts
    from medssl.weights import load_segmenter as load_segmenter
    from medssl.weights import read_card as read_card
    from medssl.weights import save_weights as save_weights

__getattr__, __dir__ = lazy(__name__, _HOME)
