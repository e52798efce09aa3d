"""Runs of the contrastive methods by the commands."""

import torch
from killed_run import copied_at
from omegaconf import OmegaConf

from medssl.config import compose, main
from medssl.finetune import run as finetune
from medssl.pretrain import run

SMALL = ("data=phantoms", "data.num_cases=5", "data.size_voxel=32", "data.phantom_spacing_mm=12.0")
BUDGET = ("trainer.max_steps=2", "batch_size=2", "validate_every=null", "figures_every=100")
FOUR_STEPS = ("checkpoint_every=2", "trainer.max_steps=4")


def resolved(*overrides, channels=1, side=32):
    """The configuration of a run on 32 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    facts = {"num_cases": 32, "num_channels": channels, "num_locations": 0, "steps_per_epoch": 4.0}
    config.facts = {**facts, "crop_voxel": [side] * 3}
    return OmegaConf.to_container(config, resolve=True)


def pretrained(method, where, folder, *settings):
    """A finished run, by the command."""
    main("pretrain", run, arguments=[f"method={method}", *where, *BUDGET, *settings, f"output_dir={folder}"])
    return folder


def rows(folder):
    """The lines of a run's metrics."""
    names, *lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [dict(zip(names, map(lambda cell: float(cell or "nan"), line), strict=True)) for line in lines]


def last(folder):
    """The checkpoint of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def straight_run(name, kind, where, folder, *settings):
    """A run of four steps in `folder / "straight"`; `folder / "broken"` is that of one that was killed in the last."""
    straight, broken = folder / "straight", folder / "broken"
    with copied_at(kind, 3, straight, broken):
        pretrained(name, where, straight, *settings, *FOUR_STEPS)
    assert last(broken)["global_step"] == 2
    return straight


def assert_resumes(name, where, folder, *settings, terms):
    """Check that a run that was killed in step 4 of 4, after a checkpoint at 2, ends as the straight one did."""
    straight, broken = folder / "straight", folder / "broken"
    pretrained(name, where, broken, *settings, *FOUR_STEPS, "figures_every=null", f"resume={broken}")
    first, second = last(straight), last(broken)
    assert first["global_step"] == second["global_step"] == 4
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(torch.equal(tensor, second["state_dict"][key]) for key, tensor in first["state_dict"].items())
    values = [[[row[term] for term in terms] for row in rows(one)] for one in (straight, broken)]
    assert values[0] == values[1]


def two_steps_of_finetuning(folder, where, out):
    """Check that a segmenter starts from a run's encoder and trains."""
    words = ["trainer.max_steps=2", "data.crop_voxel=[16,16,16]", "batch_size=1", "validate_every=null"]
    main(
        "finetune",
        finetune,
        arguments=[f"weights={folder / 'encoder.safetensors'}", *where, *words, f"output_dir={out}"],
    )
    assert (out / "metrics.json").exists()
