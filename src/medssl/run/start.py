"""How every training command starts and stops: claim the run folder, find the checkpoint, mind the signals."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from medssl.run.folder import RunFolder, checkpoint_to_resume, process_rank, run_of, was_restarted
from medssl.run.settings import check_settings
from medssl.run.signals import Stopped, StopSignals


@dataclass(frozen=True)
class Start:
    """What a run begins with: its command and settings, its folder, a checkpoint to go on from, the stop signals."""

    command: str
    config: DictConfig
    folder: RunFolder
    checkpoint: Path | None
    signals: StopSignals


def start(config: DictConfig, train: Callable[[Start], None], *, command: str) -> None:
    """Claim the run folder, `runs/COMMAND` where none is given, then train.

    A stop outside of training leaves what is done and says how to go on.

    Raises: ValueError: a setting is wrong, or the folder holds another run.
    """
    check_settings(config)
    checkpoint = None if config.resume is None else checkpoint_to_resume(Path(config.resume).expanduser())
    if config.output_dir is None:
        config.output_dir = f"runs/{command}" if checkpoint is None else str(run_of(checkpoint))
    folder = RunFolder(Path(config.output_dir).expanduser())
    restarted = checkpoint is None and was_restarted()
    if restarted and folder.last_checkpoint.is_file():
        checkpoint = folder.last_checkpoint
    with StopSignals() as signals:
        try:
            if process_rank() == 0:
                folder.claim(overwrite=config.overwrite or restarted, checkpoint=checkpoint)
            train(Start(command, config, folder, checkpoint, signals))
        except Stopped as stop:
            print(f"\nstopped by {stop}; {folder.way_on()}", file=sys.stderr)
            sys.exit(130)
