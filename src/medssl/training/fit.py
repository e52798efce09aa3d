"""What every training run is made of: its store, its trainer, the module under it, and the fit itself."""

import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from medssl.config import to_yaml
from medssl.data.module import VolumeDataModule
from medssl.methods.base import Method
from medssl.run.folder import process_rank, run_of
from medssl.run.ranks import end_together, forget
from medssl.run.settings import changes, check_settings
from medssl.run.start import Start
from medssl.training.checkpoints import check_checkpoint
from medssl.training.method_module import MethodModule
from medssl.training.metrics import Metrics
from medssl.training.progress_bar import ProgressBar


def check_trainer(config: DictConfig) -> int:
    """The number of processes that will train.

    Raises: ValueError: Lightning refuses the `trainer` settings, or this machine lacks the devices.
    """
    settings = {key: config.trainer[key] for key in config.trainer if key != "max_steps"}  # which may await the data
    try:
        return L.Trainer(**instantiate(settings, _convert_="all"), logger=False, enable_checkpointing=False).world_size
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error


def resolved(config: DictConfig) -> dict[str, Any]:
    """All settings as plain values, now that `facts` are known. Raises: ValueError: one is missing or wrong."""
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    check_settings(OmegaConf.create(values))
    return values


def build_module(begin: Start, method: Method, values: Mapping[str, Any], *, may_be_done: bool = False) -> MethodModule:
    """The module that trains `method`, checked against the checkpoint that the run goes on from.

    `may_be_done` accepts a checkpoint of the last step, where something is left to do after training.

    Raises: ValueError: the optimiser refuses a setting, or the checkpoint is of another network or run.
    """
    if values["compile"]:
        for region in method.compile_regions():
            region.compile()
    module = MethodModule(
        method,
        optimizer=values["optimizer"],
        total_steps=values["trainer"]["max_steps"],
        steps_per_epoch=values["facts"]["steps_per_epoch"],
        seed=values["seed"],
    )
    module.new_optimizer()  # a setting that it refuses is refused here
    if begin.checkpoint is not None:
        check_checkpoint(begin.checkpoint, module, may_be_done=may_be_done)
        earlier = run_of(begin.checkpoint) / "config.yaml"
        for change in changes(earlier, begin.config) if process_rank() == 0 else []:
            print(f"resume: {change}; the run will not be the one it would have been")
    return module


def fit(
    begin: Start,
    module: MethodModule,
    data: VolumeDataModule,
    *,
    values: dict[str, Any],
    metrics: Metrics,
    callbacks: Sequence[L.Callback],
    validates: bool,
) -> L.Trainer:
    """Train to the end or to a stop signal, and write the run folder. The trainer tells how far it came.

    Args:
        begin: the start of the run.
        module: what is trained.
        data: the batches.
        values: the resolved settings; their `trainer` part holds further arguments of the trainer.
        metrics: the table of the run.
        callbacks: what the run does besides, in order; `LastCheckpoint` behind all that must be in the checkpoint.
        validates: whether the trainer runs its validation loop every `validate_every` steps.
    """
    folder, checkpoint = begin.folder, begin.checkpoint
    if checkpoint is not None and folder.wandb_id.is_file() and values["logger"].get("id", "") is None:
        values["logger"]["id"] = folder.wandb_id.read_text()

    def describe(trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            folder.write_config(to_yaml(begin.config), command=begin.command)
            if (data.store.root / "rejected.jsonl").is_file():
                shutil.copyfile(data.store.root / "rejected.jsonl", folder.rejected)
            for logger in trainer.loggers:
                logger.log_hyperparams(values)
                if isinstance(logger, WandbLogger):
                    folder.wandb_id.write_text(str(logger.version))

    every = values["validate_every"] if validates else None
    # a job that SLURM starts again goes on from last.ckpt; the trainer's own requeueing would leave another checkpoint
    environment = {"plugins": SLURMEnvironment(auto_requeue=False)} if SLURMEnvironment.detect() else {}
    trainer = L.Trainer(
        **{**environment, **instantiate(values["trainer"], _convert_="all")},
        max_epochs=-1,
        accumulate_grad_batches=values["accumulate"],
        gradient_clip_val=values["optimizer"].get("clip_norm"),
        val_check_interval=every * values["accumulate"] if every else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if every else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[
            metrics,
            ProgressBar(),
            *callbacks,
            LambdaCallback(on_train_start=describe, on_exception=end_together),
        ],
        logger=instantiate(values["logger"]) if values["logger"] else False,
        default_root_dir=folder.root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if process_rank() == 0:
        folder.clear(checkpoint=checkpoint)  # not before: what is wrong with the new run must not cost the old one
        weights = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        size = f"{len(data.training_cases)} volumes, {weights / 1e6:.1f} M weights to train"
        print(f"{size}, {trainer.max_steps} steps -> {folder.root}", flush=True)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        forget(folder.root)
    return trainer


def quiet() -> None:
    """Silence what the trainer says about itself; our own callbacks tell what a user needs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).* before .*optimizer\.step\(\)")
