"""The fit of every training run: its trainer, the module under it, its callbacks and its logger."""

import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from medssl.config import freeze, with_values
from medssl.data.module import VolumeDataModule
from medssl.launcher import process_rank
from medssl.methods.base import Method
from medssl.run.folder import run_of
from medssl.run.ranks import end_together, remove_markers
from medssl.run.settings import RunSettings, changes
from medssl.run.start import Run
from medssl.threads import num_threads
from medssl.training.checkpoints import check_checkpoint
from medssl.training.method_module import MethodModule
from medssl.training.metrics import Metrics
from medssl.training.progress_bar import ProgressBar


def check_trainer(config: DictConfig) -> L.Trainer:
    """Return a trainer that trains nothing, but knows the number of processes that will train.

    Raises:
        ValueError: Lightning refuses the `trainer` settings, or this machine lacks the devices.
    """
    settings = {key: config.trainer[key] for key in config.trainer if key != "max_steps"}  # it may depend on the data
    try:
        return L.Trainer(**instantiate(settings, _convert_="all"), logger=False, enable_checkpointing=False)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error


def with_threads(config: DictConfig, *, processes: int) -> DictConfig:
    """Return the settings with the number of threads, and let this process and those that it starts compute with it.

    Args:
        config: The settings.
        processes: Processes of this machine that train.
    """
    threads = num_threads(config.threads, processes=processes)
    torch.set_num_threads(threads)
    if processes > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    return freeze(with_values(config, {"threads": threads}))


def fit(
    run: Run,
    method: Method,
    data: VolumeDataModule,
    *,
    settings: RunSettings,
    metrics: Metrics,
    callbacks: Sequence[L.Callback],
    validates: bool,
    may_be_done: bool = False,
) -> L.Trainer:
    """Train to the end or to a stop signal, and write the run folder; return the trainer, which holds the last step.

    Args:
        run: The start of the run.
        method: The method that is trained.
        data: The batches.
        settings: The settings of the run.
        metrics: The table of the run.
        callbacks: Further callbacks, in order; `LastCheckpoint` comes behind those with a state for the checkpoint.
        validates: Whether the trainer runs its validation loop every `validate_every` steps.
        may_be_done: Whether a checkpoint of the last step is accepted, since work is left after training.

    Raises:
        ValueError: The optimiser refuses a setting, or the checkpoint is of another network or run.
    """
    module = build_module(run, method, settings, may_be_done=may_be_done)
    every = settings.validate_every if validates else None
    # a job that SLURM starts again continues from last.ckpt; the trainer's requeueing would leave another checkpoint
    environment = {"plugins": SLURMEnvironment(auto_requeue=False)} if SLURMEnvironment.detect() else {}
    trainer = L.Trainer(
        **{**environment, **instantiate(settings.trainer, _convert_="all")},
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.optimizer.get("clip_norm"),
        val_check_interval=every * settings.accumulate if every else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if every else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[
            metrics,
            ProgressBar(),
            *callbacks,
            LambdaCallback(on_train_start=partial(describe, run, settings, data), on_exception=end_together),
        ],
        logger=build_logger(run, settings),
        default_root_dir=run.folder.root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if process_rank() == 0:
        run.folder.clear(checkpoint=run.checkpoint)  # not earlier: a mistake in the new run must not delete the old one
        weights = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        size = f"{len(data.training_cases)} volumes, {weights / 1e6:.1f} M weights to train"
        print(f"{size}, {trainer.max_steps} steps -> {run.folder.root}", flush=True)
    trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
    if trainer.is_global_zero:
        remove_markers(run.folder.root)
    return trainer


def build_module(run: Run, method: Method, settings: RunSettings, *, may_be_done: bool) -> MethodModule:
    """Return the module that trains `method`, checked against the checkpoint that the run continues from.

    Raises:
        ValueError: The optimiser refuses a setting, or the checkpoint is of another network or run.
    """
    if settings.compile:
        for region in method.compile_regions():
            region.compile()
    module = MethodModule(
        method,
        optimizer=settings.optimizer,
        total_steps=settings.max_steps,
        steps_per_epoch=settings.steps_per_epoch,
        seed=settings.seed,
    )
    module.new_optimizer()  # checks the settings before training
    if run.checkpoint is not None:
        check_checkpoint(run.checkpoint, module, may_be_done=may_be_done)
        earlier = run_of(run.checkpoint) / run.folder.config.name
        for change in changes(earlier, settings.values) if process_rank() == 0 else []:
            print(f"resume: {change}; the run will not be the one it would have been")
    return module


def build_logger(run: Run, settings: RunSettings) -> Any:
    """Return the logger that the settings name, with the id of the run that is continued; False for none."""
    if not settings.logger:
        return False
    recipe = dict(settings.logger)
    if run.checkpoint is not None and run.folder.wandb_id.is_file() and recipe.get("id", "") is None:
        recipe["id"] = run.folder.wandb_id.read_text(encoding="utf-8")
    return instantiate(recipe)


def describe(
    run: Run, settings: RunSettings, data: VolumeDataModule, trainer: L.Trainer, module: L.LightningModule
) -> None:
    """Write the description of the run, on rank 0: config.yaml, the rejected files, the parameters of loggers."""
    if not trainer.is_global_zero:
        return
    run.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(settings.values)), command=run.command)
    if (data.store.root / "rejected.jsonl").is_file():
        shutil.copyfile(data.store.root / "rejected.jsonl", run.folder.rejected)
    for logger in trainer.loggers:
        logger.log_hyperparams(dict(settings.values))
        if isinstance(logger, WandbLogger):
            run.folder.wandb_id.write_text(str(logger.version), encoding="utf-8")


def quiet() -> None:
    """Silence the trainer's own messages; our callbacks print what a user needs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).* before .*optimizer\.step\(\)")
