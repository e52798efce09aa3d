"""A file of a tiny segmenter, an image for it, and the command that predicts one with the other."""

import nibabel
import numpy as np
import torch

from medssl.config import main
from medssl.models.segmenter import build_segmenter
from medssl.predict import run
from medssl.weights import save_weights

CLASSES = [{"value": 0, "name": "background"}, {"value": 5, "name": "liver"}, {"value": 117, "name": "ribs"}]


def save_segmenter(folder, name="segmenter", *, seed=0, classes=CLASSES, channels=1, **reading):
    """Write a tiny segmenter with random weights; what differs from the usual reading may be given."""
    torch.manual_seed(seed)
    encoder = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8], "strides": [1, 2]}
    network, recipe = build_segmenter(encoder, None, num_classes=len(classes), in_channels=channels)
    normalise = [{"_target_": "medssl.data.augment.ByModality", "window_hu": [-200.0, 300.0]}]
    card = {
        "kind": "segmenter",
        **recipe,
        "classes": classes,
        "reading": {
            "channels": None if channels == 1 else "all",
            "spacing_mm": [4.0, 4.0, 5.0],
            "crop_voxel": [16, 16, 16],
            "outside": "minimum",
            "normalise": normalise,
            **reading,
        },
    }
    path = folder / f"{name}.safetensors"
    save_weights(path, network.parts(), card)
    return path


def write_scan(folder, name="scan.nii.gz", *, seed=0, channels=1):
    """Write a grey-value image of 20 x 18 x 16 voxels in LPS order."""
    array = np.random.default_rng(seed).normal(0, 200, (20, 18, 16, channels)).astype(np.float32)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.squeeze(), np.diag([-3.0, -3.0, 4.0, 1.0])), path)
    return path


def predict(**keys):
    """Run the command and return its exit code."""
    try:
        main("predict", run, arguments=[f"{key.replace('__', '.')}={value}" for key, value in keys.items()])
    except SystemExit as stop:
        return stop.code
    return 0


def load(path):
    """Return voxels and image of a NIfTI file."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image
