"""The start and the stop of every training command: claim the run folder, find the checkpoint, handle the signals."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from medssl.checks import existing_setting
from medssl.config import freeze, with_values
from medssl.data.split_names import check_split
from medssl.launcher import process_rank, was_restarted
from medssl.run.folder import RunFolder, checkpoint_to_resume, run_of
from medssl.run.settings import check_settings
from medssl.run.signals import StopSignals, stoppable
from medssl.run.store import check_source


@dataclass(frozen=True)
class Run:
    """The objects that a run begins with.

    Args:
        command: The name of the command.
        config: The settings, read-only.
        folder: The folder of the run's files.
        checkpoint: The file that the run continues from; None at a first start.
        signals: The stop signals.
    """

    command: str
    config: DictConfig
    folder: RunFolder
    checkpoint: Path | None
    signals: StopSignals


@contextmanager
def start(config: DictConfig, *, command: str, files: Mapping[str, str] | None = None) -> Iterator[Run]:
    """Claim the run folder for the body of the `with`; it is `runs/COMMAND` if none is given.

    The configuration is read-only afterwards. A stop outside of training keeps finished work and says how to continue.

    Args:
        config: The composed configuration.
        command: The name of the command.
        files: Settings that name files, each with the kind of file.

    Raises:
        ValueError: A setting is wrong, a file is not there, or the folder holds another run.
    """
    check_settings(config)
    for name, what in (files or {}).items():
        existing_setting(config, name, what=what)
    checkpoint = None if config.resume is None else checkpoint_to_resume(Path(config.resume).expanduser())
    check_split(config.data.get("split"))
    check_source(config)
    if config.output_dir is None:
        earlier = f"runs/{command}" if checkpoint is None else str(run_of(checkpoint))
        freeze(config)
        config = with_values(config, {"output_dir": earlier})
    folder = RunFolder(Path(config.output_dir).expanduser())
    restarted = checkpoint is None and was_restarted()
    if restarted and folder.last_checkpoint.is_file():
        checkpoint = folder.last_checkpoint
    with stoppable(folder.resume_hint) as signals:
        if process_rank() == 0:
            folder.claim(overwrite=config.overwrite or restarted, checkpoint=checkpoint)
        yield Run(command, freeze(config), folder, checkpoint, signals)
