"""Derive tables from a prepared store.

Examples:
    python -m medssl.derive what=body store=STORE
    python -m medssl.derive what=pairs weights=runs/sam/encoder.safetensors store=STORE

`what` is a file of the group `what`, also from --config-dir: it names the class that makes the table of a case.
It may be stopped or killed at any moment and started again; finished tables are not made twice.
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
class DeriveSettings:
    """The checked settings of a derivation: which table, from which store.

    Args:
        store: A prepared store.
        derivation: The derivation that makes the table of a case.
        num_workers: Number of processes; None for one per core.
    """

    store: Path
    derivation: Any
    num_workers: int | None

    @classmethod
    def of(cls, config: DictConfig) -> DeriveSettings:
        """Return the settings of a configuration, checked.

        Raises:
            ValueError: A setting is wrong, or names a file that is not there.
        """
        store = checks.existing("store", config.store, what="store", folder=True)
        for name, what in {"weights.path": "weight file", "file": "table"}.items():
            checks.existing_setting(config, name, what=what)
        num_workers = checks.whole("num_workers", config.num_workers, or_null="for one a core")

        from hydra.utils import instantiate  # classes of tables, which may import torch

        derivation = instantiate(config.what, _convert_="all")
        if hasattr(derivation, "check"):
            derivation.check()
        return cls(store, derivation, num_workers)


def run(config: DictConfig) -> None:
    """Derive the table that the configuration names, and print a summary."""
    settings = DeriveSettings.of(config)

    from medssl.tables.derived import derive

    print(derive(settings.store, settings.derivation, num_workers=settings.num_workers))


if __name__ == "__main__":
    main("derive", run)
