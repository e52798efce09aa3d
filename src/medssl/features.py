"""Write one feature per location and a pooled one per subject, by any encoder.

Examples:
    python -m medssl.features weights=runs/drasclr/encoder.safetensors output_dir=features/drasclr
    python -m medssl.features weights=encoder.safetensors data=folder data.root=scans grid=[4,4,4] output_dir=features/a
    python -m medssl.features weights=encoder.safetensors data=store store=STORE locations=locations dense=true
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from medssl.data.store import VolumeStore


def run(config: DictConfig) -> None:
    """Make the features; exit with code 1 if some subjects have none."""
    from medssl.extraction.settings import FeatureSettings
    from medssl.run.signals import stoppable
    from medssl.run.store import check_source

    settings = FeatureSettings.of(config)
    check_source(config)
    with stoppable(lambda: "finished features are kept, the same command continues"):
        from medssl.extraction.features import Extraction, extract_all  # torch and all that takes seconds

        extraction = Extraction.of(settings)  # before the store: a mistake must not cost an hour of preparing
        num_failed = extract_all(extraction, prepared_store(config))
    if num_failed:
        sys.exit(1)


def prepared_store(config: DictConfig) -> VolumeStore:
    """Return the store that the configuration names, up to date with its source."""
    from pathlib import Path

    from medssl.data.recipes import locate_store
    from medssl.data.store import VolumeStore
    from medssl.run.store import update_store

    root = Path(locate_store(config.data, config.store))
    if config.data.get("source") is not None:
        update_store(config, root)
    return VolumeStore(root)


if __name__ == "__main__":
    main("features", run)
