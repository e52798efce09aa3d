"""Derive tables from a prepared store.

Examples:
    python -m medssl.derive what=body store=STORE
    python -m medssl.derive what=pairs weights=runs/sam/encoder.safetensors store=STORE

`what` is a file of the group `what`, also from --config-dir: it names the class that makes the table of a case.
It may be stopped or killed at any moment and started again; finished tables are not made twice.
"""

from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: "DictConfig") -> None:
    """Derive what the configuration says, and say what came of it."""
    from hydra.utils import instantiate

    from medssl.tables.derived import derive

    derivation = instantiate(config.what, _convert_="all")
    if hasattr(derivation, "check"):
        derivation.check()
    print(derive(config.store, derivation, num_workers=config.num_workers))


if __name__ == "__main__":
    main("derive", run)
