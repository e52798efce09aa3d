"""A pre-training run from its configuration: store, views, method, loop."""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from medssl.config import to_yaml
from medssl.data.module import VolumeDataModule
from medssl.data.prepare import PrepareError, prepare_store
from medssl.data.randomness import counter_key
from medssl.data.recipes import locate_store
from medssl.data.sources import SourceMissingError
from medssl.data.splits import pretraining_cases
from medssl.data.store import VolumeStore
from medssl.methods.base import Method
from medssl.training.checkpoints import LastCheckpoint, check_checkpoint
from medssl.training.export import Export, build_card
from medssl.training.failing import EndTogether
from medssl.training.method_module import MethodModule
from medssl.training.metrics import Metrics
from medssl.training.pictures import Pictures
from medssl.training.progress_bar import ProgressBar
from medssl.training.run_folder import RunFolder, process_rank, run_of
from medssl.training.settings import changes, check_settings
from medssl.training.stopping import Stopped, StopSignals
from medssl.training.waiting import forget, rank_zero_first


def pretrain(config: DictConfig, folder: RunFolder, *, checkpoint: Path | None, signals: StopSignals) -> None:
    """Prepare the data where needed, build everything that `config` names, train, and write the run folder.

    Raises: ValueError: a setting or file of the user is wrong; the message says what to do.
    """
    quiet()
    check_trainer(config)  # this and the views before the store: a slip need not cost an hour of preparing
    views = instantiate(config.views, _convert_="all")
    config.facts.num_locations = views.num_locations
    sampler = instantiate(config.sampler, _convert_="all")
    store = open_store(config, is_resumed=checkpoint is not None)
    training_cases, validation_cases = pretraining_cases(
        store,
        split=config.data.get("split"),
        fold=config.data.get("fold", 0),
        validation_fraction=config.data.get("validation_fraction", 0.0),
    )
    data = VolumeDataModule(
        store=store,
        views=views,
        sampler=sampler,
        batch_size=config.batch_size,
        seed=config.seed,
        accumulate=config.accumulate,
        training_cases=training_cases,
        validation_cases=validation_cases,
    )
    config.facts = data.facts()
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    check_settings(OmegaConf.create(values))
    method = build_method(values)
    module = MethodModule(
        method,
        optimizer=values["optimizer"],
        total_steps=values["trainer"]["max_steps"],
        steps_per_epoch=values["facts"]["steps_per_epoch"],
        seed=values["seed"],
    )
    module.new_optimizer()  # a setting that it refuses is refused here
    if checkpoint is not None:
        check_checkpoint(checkpoint, module)
        for change in changes(run_of(checkpoint) / "config.yaml", config) if process_rank() == 0 else []:
            print(f"resume: {change}; the run will not be the one it would have been")
    if checkpoint is not None and folder.wandb_id.is_file() and values["logger"].get("id", "") is None:
        values["logger"]["id"] = folder.wandb_id.read_text()
    trainer = build_trainer(values, folder, card=build_card(values, store, training_cases), signals=signals)

    def describe(trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            folder.write_config(to_yaml(config))
            if (store.root / "rejected.jsonl").is_file():
                shutil.copyfile(store.root / "rejected.jsonl", folder.rejected)
            for logger in trainer.loggers:
                logger.log_hyperparams(values)
                if isinstance(logger, WandbLogger):
                    folder.wandb_id.write_text(str(logger.version))

    trainer.callbacks.append(LambdaCallback(on_train_start=describe))  # type: ignore[attr-defined]
    if process_rank() == 0:
        folder.clear(checkpoint=checkpoint)  # not before: what is wrong with the new run must not cost the old one
        weights = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
        size = f"{len(store)} volumes, {weights / 1e6:.1f} M weights to train, {trainer.max_steps} steps"
        print(f"{size} -> {folder.root}", flush=True)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        forget(folder.root)
        step, channels = trainer.global_step, store.record(0).channels
        print(closing_words(folder, stopped=signals.requested, step=step, total=trainer.max_steps, channels=channels))


def open_store(config: DictConfig, *, is_resumed: bool = False) -> VolumeStore:
    """The store of the run, up to date with its source; rank 0 sees to that, the other ranks wait for it.

    Where the source is not at hand a finished store is used as it is, and so it is by a run that is resumed.
    """
    root = Path(locate_store(config.data, config.store))
    if config.data.get("source") is not None:
        with rank_zero_first(Path(config.output_dir).expanduser(), root) as is_first:
            if is_first and not (is_resumed and (root / "index.jsonl").is_file()):
                update_store(config, root)
    return VolumeStore(root)


def update_store(config: DictConfig, root: Path) -> None:
    """Prepare the store, or what is new in its source, and say in a line what has changed."""
    is_finished = (root / "index.jsonl").is_file()
    if not is_finished:
        print(f"preparing {config.data.name} -> {root}", flush=True)
    try:
        summary = prepare_store(
            instantiate(config.data.source, _convert_="all"),
            root,
            channels=config.data.channels,
            spacing_mm=config.data.spacing_mm,
            min_side_voxel=config.data.min_side_voxel,
            max_rejected_fraction=config.max_rejected_fraction,
            prune=False,  # another run may be reading
        )
    except Stopped as stop:
        raise Stopped(f"{stop} while preparing; finished cases are kept in {root}") from None
    except (SourceMissingError, PrepareError, OSError) as error:
        if not is_finished:
            raise
        print(f"{str(error).splitlines()[0]}; the store {root} is used as it is", flush=True)
    else:
        if is_finished and summary.has_changed:
            print(f"the source has changed: {summary}", flush=True)


def check_trainer(config: DictConfig) -> None:
    """Raises: ValueError: Lightning refuses the `trainer` settings, or this machine lacks the devices."""
    settings = {key: value for key, value in config.trainer.items() if key != "max_steps"}
    try:
        L.Trainer(**instantiate(settings, _convert_="all"), logger=False, enable_checkpointing=False)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error


def build_method(values: dict[str, Any]) -> Method:
    """The method with its first weights, which follow from the seed; compiled where that is asked for."""
    torch.manual_seed(counter_key("weights", values["seed"]))
    method = instantiate(values["method"], _convert_="all")
    if values["compile"]:
        for region in method.compile_regions():
            region.compile()
    return method


def build_trainer(
    values: dict[str, Any], folder: RunFolder, *, card: dict[str, Any], signals: StopSignals
) -> L.Trainer:
    """Lightning's loop with our callbacks; the `trainer` part of the configuration holds further arguments of it."""
    every = values["validate_every"]
    # a job that SLURM starts again goes on from last.ckpt; the trainer's own requeueing would leave another checkpoint
    environment = {"plugins": SLURMEnvironment(auto_requeue=False)} if SLURMEnvironment.detect() else {}
    callbacks: list[L.Callback] = [
        Metrics(folder.metrics, batch_size=values["batch_size"], with_validation=bool(every)),
        ProgressBar(),
        Pictures(folder.figures, every=values["figures_every"]),
        Export(folder.encoder, card, every=values["export_every"]),
        LastCheckpoint(folder.last_checkpoint, every=values["checkpoint_every"], signals=signals),
        EndTogether(),
    ]
    return L.Trainer(
        **{**environment, **instantiate(values["trainer"], _convert_="all")},
        max_epochs=-1,
        accumulate_grad_batches=values["accumulate"],
        gradient_clip_val=values["optimizer"].get("clip_norm"),
        val_check_interval=every * values["accumulate"] if every else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if every else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        logger=instantiate(values["logger"]) if values["logger"] else False,
        default_root_dir=folder.root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quiet() -> None:
    """Silence what the trainer says about itself; our own callbacks tell what a user needs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).* before .*optimizer\.step\(\)")


def closing_words(folder: RunFolder, *, stopped: str, step: int, total: int, channels: int) -> str:
    """Where the results lie, and how to use them or go on."""
    if stopped:
        return f"stopped by {stopped} after step {step} of {total}; {folder.way_on()}"
    pictures = sorted(folder.figures.glob(f"*-{step:07d}.png"))
    return "\n".join(
        [
            f"encoder  {folder.encoder}",
            f"metrics  {folder.metrics}",
            *(f"picture  {path}" for path in pictures),
            "",
            "    import medssl, torch",
            f'    encoder = medssl.load_encoder("{folder.encoder}")',
            f"    features = encoder(torch.zeros(1, {channels}, 96, 96, 96))  # feature maps, fine to coarse",
        ]
    )
