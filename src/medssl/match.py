"""Show where a point of one scan lies in another, by an anatomical embedding (method=sam_embed, or published SAM).

Examples:
    python -m medssl.match weights=runs/sam/encoder.safetensors query=a.nii.gz reference=b.nii.gz point_mm=[12,-40,85]
    python -m medssl.match weights=SAM.pth weights.layout=sam query=a.nii.gz reference=b.nii.gz grid=true output=ab.png
"""

from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: "DictConfig") -> None:
    """Match the points, print them, and draw both scans with crosses."""
    from medssl.extraction.settings import MatchSettings

    settings = MatchSettings.of(config)
    from medssl.extraction.match import match_scans  # torch and all that takes seconds

    match_scans(settings)


if __name__ == "__main__":
    main("match", run)
