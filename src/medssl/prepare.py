"""Prepare a store of volumes from images: python -m medssl.prepare data=folder data.root=IMAGES store=STORE.

It may be stopped or killed at any moment and started again; finished cases are not made twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl import checks
from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class PrepareSettings:
    """The checked settings of a preparation: which images, into which store.

    Args:
        name: Name of the data.
        source: The source that finds the images.
        store: Folder of the store.
        recipe: How an image is prepared: `channels`, `spacing_mm`, `min_side_voxel`.
        max_rejected_fraction: Share of unreadable files above which the store is not finished.
        num_workers: Number of processes; None for one per core.
        verify: Whether to read all files, also those whose size and time have not changed.
    """

    name: str
    source: Any
    store: Path
    recipe: dict[str, Any]
    max_rejected_fraction: float
    num_workers: int | None
    verify: bool

    @classmethod
    def of(cls, config: DictConfig) -> PrepareSettings:
        """Return the settings of a configuration, checked.

        Raises:
            ValueError: A setting is wrong, or there are no images to prepare.
        """
        from hydra.utils import instantiate

        from medssl.data.recipes import locate_store, preparation
        from medssl.run.store import check_source

        data = config.data
        if data.get("source") is None:
            raise ValueError(f"data={data.name} is a finished store; prepare takes images, such as data=folder")
        check_source(config)
        return cls(
            name=data.name,
            source=instantiate(data.source, _convert_="all"),
            store=Path(locate_store(data, config.store)),
            recipe=preparation(data),
            max_rejected_fraction=checks.share("max_rejected_fraction", config.max_rejected_fraction),
            num_workers=checks.whole("num_workers", config.num_workers, or_null="for one a core"),
            verify=checks.switch("verify", config.verify),
        )


def run(config: DictConfig) -> None:
    """Prepare the store that the configuration names, print a table and a summary, and write the report."""
    settings = PrepareSettings.of(config)

    from medssl.data.prepare import prepare_store
    from medssl.data.store import VolumeStore
    from medssl.evaluation.store_report import overview, write_report

    print(f"preparing {settings.name} -> {settings.store}", flush=True)
    summary = prepare_store(
        settings.source,
        settings.store,
        **settings.recipe,
        max_rejected_fraction=settings.max_rejected_fraction,
        num_workers=settings.num_workers,
        verify=settings.verify,
    )
    store = VolumeStore(summary.root)
    tables = overview(list(store.records()))
    print(tables)
    print(f"{summary}; report: {write_report(store, tables)}")


if __name__ == "__main__":
    main("prepare", run)
