"""Pre-train an encoder on unlabelled volumes.

Examples:
    python -m medssl.pretrain method=glmae_tiny data=phantoms output_dir=runs/first
    python -m medssl.pretrain method=glmae data=decathlon data.root=/data/Task04 trainer=gpu
    python -m medssl.pretrain method=glmae data=folder data.root=/scans trainer=ddp trainer.devices=4
    python -m medssl.pretrain method=glmae_tiny data=phantoms resume=runs/first
    python -m medssl.pretrain --config-dir ./conf method=mine        # a method of your own
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: DictConfig) -> None:
    """Claim the run folder, then train; a stop outside of training leaves what is done and says how to go on."""
    from medssl.training.run_folder import RunFolder, checkpoint_to_resume, process_rank, run_of, was_restarted
    from medssl.training.settings import check_settings
    from medssl.training.stopping import Stopped, StopSignals

    check_settings(config)
    checkpoint = None if config.resume is None else checkpoint_to_resume(Path(config.resume).expanduser())
    if config.output_dir is None:
        config.output_dir = "runs/pretrain" if checkpoint is None else str(run_of(checkpoint))
    folder = RunFolder(Path(config.output_dir).expanduser())
    restarted = checkpoint is None and was_restarted()
    if restarted and folder.last_checkpoint.is_file():
        checkpoint = folder.last_checkpoint
    with StopSignals() as signals:
        try:
            if process_rank() == 0:
                folder.claim(overwrite=config.overwrite or restarted, checkpoint=checkpoint)
            from medssl.training.pretraining import pretrain  # torch and all that takes seconds

            pretrain(config, folder, checkpoint=checkpoint, signals=signals)
        except Stopped as stop:
            print(f"\nstopped by {stop}; {folder.way_on()}", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main("pretrain", run)
