"""Fine-tune an encoder for segmentation, or train the same network from scratch.

Examples:
    python -m medssl.finetune weights=runs/pretrain/encoder.safetensors data.labelled=4 output_dir=runs/tuned
    python -m medssl.finetune model.like=runs/pretrain/encoder.safetensors data.labelled=4 output_dir=runs/scratch
    python -m medssl.finetune data=btcv data.root=/data/BTCV weights=encoder.safetensors trainer=gpu
    python -m medssl.finetune data=amos data.root=/data/amos22 data.modality=ct model=unet trainer=gpu
    python -m medssl.finetune resume=runs/tuned
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from medssl.training.starting import Start


def run(config: DictConfig) -> None:
    """Claim the run folder, then train in it."""
    from medssl.training.starting import start

    start(config, train, command="finetune")


def train(begin: Start) -> None:
    """Import torch and all that takes seconds, then fine-tune."""
    from medssl.training.finetuning import finetune

    finetune(begin)


if __name__ == "__main__":
    main("finetune", run)
