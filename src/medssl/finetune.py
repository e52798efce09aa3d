"""Fine-tune an encoder for segmentation, or train the same network from scratch.

Examples:
    python -m medssl.finetune weights=runs/pretrain/encoder.safetensors data.labelled=4 output_dir=runs/tuned
    python -m medssl.finetune weights=runs/pretrain/encoder.safetensors scratch_twin=true output_dir=runs/tuned
    python -m medssl.finetune model.like=runs/pretrain/encoder.safetensors output_dir=runs/scratch
    python -m medssl.finetune data=btcv data.root=/data/BTCV weights=encoder.safetensors trainer=gpu
    python -m medssl.finetune data=amos data.root=/data/amos22 data.modality=ct model=unet trainer=gpu
    python -m medssl.finetune weights=runs/pretrain/encoder.safetensors data.labelled=4 resume=runs/tuned
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medssl.config import main, with_values

if TYPE_CHECKING:
    from omegaconf import DictConfig

WEIGHTS = "weight file"


def run(config: DictConfig) -> None:
    """Train in the run folder; with `scratch_twin`, train the same network from scratch afterwards."""
    from medssl.run.folder import RunFolder
    from medssl.run.start import start

    twin = scratch_twin(config) if config.scratch_twin else None
    if twin is not None:  # refused now, not after an hour of training
        RunFolder(Path(twin.output_dir).expanduser()).claim(overwrite=twin.overwrite, checkpoint=None)
    with start(config, command="finetune", files={"weights.path": WEIGHTS, "model.like": WEIGHTS}) as tuned:
        from medssl.segmentation.finetune import finetune  # torch and all that takes seconds

        finetune(tuned)
    if twin is not None and tuned.folder.results.is_file():
        print(f"\nthe same from scratch -> {twin.output_dir}", flush=True)
        with start(twin, command="finetune") as scratch:
            finetune(scratch)
        print(f"\n    python -m medssl.compare {scratch.folder.root} {tuned.folder.root}")


def scratch_twin(config: DictConfig) -> DictConfig:
    """Return the settings of the same run without the weights: same network, plan, budget and seed.

    Its folder is OUTPUT_DIR-scratch.

    Raises:
        ValueError: There are no weights to leave out, several processes train, or a run is to be resumed.
    """
    if config.resume is not None:
        raise ValueError(
            "resume continues one run: leave scratch_twin out, and resume its twin in a second command if needed"
        )
    if config.weights.path is None:
        raise ValueError("scratch_twin=true repeats a run without its weights; give weights=FILE")
    if "strategy" in config.trainer:
        raise ValueError(
            "scratch_twin=true works in one process; with several, start a second run with model.like=FILE instead of"
            " weights=FILE"
        )
    changes = {"scratch_twin": False, "output_dir": f"{config.output_dir or 'runs/finetune'}-scratch"}
    like = {"model.like": config.weights.path} if "like" in config.model else {}
    return with_values(config, {**changes, **like, "weights.path": None})


if __name__ == "__main__":
    main("finetune", run)
