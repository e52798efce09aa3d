"""The folder of a run: where each of its files lies, and which run may start in it."""

from pathlib import Path

from medssl.data.atomic import clear_partial

HEADER = "# a run of medssl.{command} with all its settings\n"
DIGITS = "[0-9]" * 7
WRITTEN = (
    *("config.yaml", "metrics.csv", "rejected.jsonl", "wandb_id"),
    *("checkpoints/last.ckpt", f"figures/*-{DIGITS}.png"),
    *("encoder.safetensors", f"encoder-{DIGITS}.safetensors"),
    *("segmenter.safetensors", "segmenter-best.safetensors", "segmenter-last.safetensors"),
    *("metrics.json", "cases.csv", "split.json"),
)
"""The files that a run writes; overwriting a run removes these, and keeps the files of other programs."""


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
        """Return whether an earlier run trained here; one that stopped before its first step left nothing to lose."""
        return any(path.exists() for path in (self.metrics, self.last_checkpoint, self.encoder, self.segmenter))

    def resume_hint(self) -> str:
        """Return a line that says how to continue the run in this folder."""
        if self.last_checkpoint.is_file():
            return f"saved {self.last_checkpoint}; go on with the same command and resume={self.root}"
        return f"no checkpoint is saved yet; start the same command again{' with overwrite=true' * self.holds_a_run()}"

    def write_config(self, text: str, *, command: str) -> None:
        """Write config.yaml below a first line that marks it as ours."""
        self.config.write_text(HEADER.format(command=command) + text, encoding="utf-8")

    def claim(self, *, overwrite: bool, checkpoint: Path | None) -> None:
        """Make the folder for a run; the files of an earlier run stay in it until `clear`.

        Raises:
            ValueError: An earlier run lies here, and is neither continued nor to be overwritten.
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
        """Remove the files of an earlier run, unless `checkpoint` belongs to it.

        Half-written files of a killed run are removed too. This is the last step before training.
        """
        for path in (self.metrics, self.last_checkpoint, self.encoder, self.segmenter):
            clear_partial(path.parent, path.name)
        if not self._holds(checkpoint):
            for path in [path for pattern in WRITTEN for path in self.root.glob(pattern)]:
                path.unlink()

    def _holds(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and run_of(checkpoint).resolve() == self.root.resolve()


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def checkpoint_to_resume(path: Path) -> Path:
    """Return the checkpoint that `resume=PATH` means: the file itself, or `checkpoints/last.ckpt` of a run folder.

    Raises:
        ValueError: There is no such checkpoint.
    """
    checkpoint = RunFolder(path).last_checkpoint if path.is_dir() else path
    if not checkpoint.is_file():
        raise ValueError(f"resume={path}: there is no checkpoint {checkpoint}; give a run folder or a .ckpt file")
    return checkpoint
