"""Segment scans with a trained network; results lie exactly where the scans lie.

Examples:
    python -m medssl.predict weights=runs/first/segmenter.safetensors input=scan.nii.gz
    python -m medssl.predict weights=runs/first/segmenter.safetensors input=scans output_dir=results
    python -m medssl.predict weights=[runs/a/segmenter.safetensors,runs/b/segmenter.safetensors] input=dicom_folder
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: DictConfig) -> None:
    """Predict all images; exit with code 1 if some of them failed."""
    from medssl.run.signals import stoppable
    from medssl.segmentation.settings import PredictSettings

    settings = PredictSettings.of(config)
    with stoppable(lambda: "finished results are kept, the same command continues"):
        from medssl.segmentation.predict import predict_all  # torch and all that takes seconds

        num_failed = predict_all(settings)
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    main("predict", run)
