"""The folder of a run: where each of its files lies, and who may start in it."""

import os
from pathlib import Path

from medssl.data.atomic import clear_partial


def process_rank() -> int:
    """The rank of this process as its launcher (torchrun, SLURM, Lightning) tells it; 0 for a process on its own."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))  # 0 on one process alone


def was_restarted() -> bool:
    """Whether a scheduler started this very job again after it was stopped."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


HEADER = "# a run of medssl.{command} with all its settings\n"
DIGITS = "[0-9]" * 7
WRITTEN = (
    *("config.yaml", "metrics.csv", "rejected.jsonl", "wandb_id"),
    *("checkpoints/last.ckpt", f"figures/*-{DIGITS}.png"),
    *("encoder.safetensors", f"encoder-{DIGITS}.safetensors"),
    *("segmenter.safetensors", "segmenter-best.safetensors", "segmenter-last.safetensors"),
    *("metrics.json", "cases.csv", "split.json"),
)
"""What a run writes, and all that overwriting one removes; what other programs write beside it stays."""


class RunFolder:
    """Paths inside the output folder of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.csv"
        self.last_checkpoint = root / "checkpoints" / "last.ckpt"
        self.figures = root / "figures"
        self.encoder = root / "encoder.safetensors"
        self.segmenter = root / "segmenter.safetensors"
        self.best_segmenter = root / "segmenter-best.safetensors"
        self.last_segmenter = root / "segmenter-last.safetensors"
        self.results = root / "metrics.json"
        self.split = root / "split.json"
        self.rejected = root / "rejected.jsonl"
        self.wandb_id = root / "wandb_id"

    def holds_a_run(self) -> bool:
        """Whether an earlier run trained here; one that stopped before its first step left nothing to lose."""
        return any(path.exists() for path in (self.metrics, self.last_checkpoint, self.encoder, self.segmenter))

    def resume_hint(self) -> str:
        """How to go on with what lies here."""
        if self.last_checkpoint.is_file():
            return f"saved {self.last_checkpoint}; go on with the same command and resume={self.root}"
        return f"no checkpoint is saved yet; start the same command again{' with overwrite=true' * self.holds_a_run()}"

    def write_config(self, text: str, *, command: str) -> None:
        """Write config.yaml under a line that tells it from another program's."""
        self.config.write_text(HEADER.format(command=command) + text)

    def claim(self, *, overwrite: bool, checkpoint: Path | None) -> None:
        """Make the folder for a run; an earlier run stays in it until `clear`.

        Raises: ValueError: an earlier run lies here that is neither gone on with nor to be overwritten.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output_dir={self.root} is a file; name a folder")
        goes_on = self._holds(checkpoint)
        if self.holds_a_run() and not goes_on and not overwrite:
            going_on = f"go on with it by resume={self.root}, " if self.last_checkpoint.is_file() else ""
            raise ValueError(
                f"{self.root} already holds a run; {going_on}replace it by overwrite=true, or give another output_dir"
            )
        start = HEADER.partition("{")[0].encode()
        foreign = self.config.is_file() and not self.config.read_bytes().startswith(start)
        if foreign and not goes_on and not overwrite:
            raise ValueError(
                f"{self.config} is not of a run; give another output_dir, or lose that file by overwrite=true"
            )
        self.last_checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.figures.mkdir(exist_ok=True)

    def clear(self, *, checkpoint: Path | None) -> None:
        """Remove the files of an earlier run, unless `checkpoint` is its own, and what a killed one left half written.

        This is the last thing before training.
        """
        for path in (self.metrics, self.last_checkpoint, self.encoder, self.segmenter):
            clear_partial(path.parent, path.name)
        if not self._holds(checkpoint):
            for path in [path for pattern in WRITTEN for path in self.root.glob(pattern)]:
                path.unlink()

    def _holds(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and run_of(checkpoint).resolve() == self.root.resolve()


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def checkpoint_to_resume(path: Path) -> Path:
    """The checkpoint that `resume=PATH` means: the file itself, or `checkpoints/last.ckpt` of a run folder.

    Raises: ValueError: there is none.
    """
    checkpoint = RunFolder(path).last_checkpoint if path.is_dir() else path
    if not checkpoint.is_file():
        raise ValueError(f"resume={path}: there is no checkpoint {checkpoint}; give a run folder or a .ckpt file")
    return checkpoint
