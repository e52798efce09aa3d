"""Prepare a store of volumes from images: python -m medssl.prepare data=folder data.root=IMAGES store=STORE.

It may be stopped or killed at any moment and started again; finished cases are not made twice.
"""

from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: "DictConfig") -> None:
    """Prepare what the configuration says, and say what came of it."""
    from hydra.utils import instantiate

    from medssl.data.prepare import prepare_store
    from medssl.data.recipes import locate_store

    if config.data.get("source") is None:
        raise ValueError(f"data={config.data.name} is a finished store; prepare takes images, such as data=folder")
    store = locate_store(config.data, config.store)
    print(f"preparing {config.data.name} -> {store}", flush=True)
    summary = prepare_store(
        instantiate(config.data.source, _convert_="all"),
        store,
        channels=config.data.channels,
        spacing_mm=config.data.spacing_mm,
        min_side_voxel=config.data.min_side_voxel,
        max_rejected_fraction=config.max_rejected_fraction,
        num_workers=config.num_workers,
    )
    print(summary)


if __name__ == "__main__":
    main("prepare", run)
