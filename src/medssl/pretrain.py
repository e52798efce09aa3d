"""Pre-train an encoder on unlabelled volumes.

Examples:
    python -m medssl.pretrain method=glmae_tiny data=phantoms output_dir=runs/first
    python -m medssl.pretrain method=glmae data=decathlon data.root=/data/Task04 trainer=gpu
    python -m medssl.pretrain method=glmae data=folder data.root=/scans trainer=ddp trainer.devices=4
    python -m medssl.pretrain method=glmae_tiny data=phantoms resume=runs/first
    python -m medssl.pretrain method=glmae_tiny data=phantoms weights=FILE    # starts from the encoder in FILE
    python -m medssl.pretrain --config-dir ./conf method=mine        # a method of your own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: DictConfig) -> None:
    """Claim the run folder, then import torch and other slow packages, and train."""
    from medssl.run.start import start

    with start(config, command="pretrain", files={"weights.path": "weight file"}) as run:
        from medssl.training.pretraining import pretrain

        pretrain(run)


if __name__ == "__main__":
    main("pretrain", run)
