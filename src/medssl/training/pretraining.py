"""A pre-training run from its configuration: store, views, method, loop."""

import copy
import sys
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medssl.data.module import VolumeDataModule
from medssl.data.randomness import counter_key
from medssl.data.splits import pretraining_cases
from medssl.data.views import ViewPlan
from medssl.methods.base import Method
from medssl.run.folder import RunFolder, process_rank
from medssl.run.start import Start
from medssl.run.store import is_prepared, open_store
from medssl.training.checkpoints import LastCheckpoint
from medssl.training.export import Export, build_card
from medssl.training.figures import Pictures
from medssl.training.fit import build_module, check_trainer, fit, quiet, resolved
from medssl.training.metrics import Metrics
from medssl.training.positive_rate import automatic_threshold


def pretrain(begin: Start) -> None:
    """Prepare the data where needed, build everything that the settings name, train, and write the run folder.

    Raises: ValueError: a setting or file of the user is wrong; the message says what to do.
    """
    config, folder = begin.config, begin.folder
    quiet()
    world = check_trainer(config)  # this, views, sampler and method before the store: a slip costs no preparing
    views = instantiate(config.views, _convert_="all")
    config.facts.num_locations = views.num_locations
    if not views.tables:
        instantiate(config.sampler, _convert_="all")
    if not is_prepared(config):
        try_method(config, views)
    store = open_store(config, is_resumed=begin.checkpoint is not None)
    views.check(store)
    config.facts.num_locations = views.locations_in(store)
    for note in views.notes(store) if process_rank() == 0 else ():
        print(f"warning: {note}", file=sys.stderr, flush=True)
    sampler = instantiate(config.sampler, _convert_="all")
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
    find_threshold(config, data, world=world)
    values = resolved(config)
    module = build_module(begin, build_method(values), values)
    column = "validation_loss" if values["validate_every"] else None
    metrics = Metrics(folder.metrics, batch_size=values["batch_size"], validation=column)
    callbacks = [
        Pictures(folder.figures, every=values["figures_every"]),
        Export(folder.encoder, build_card(values, store, training_cases), every=values["export_every"]),
        LastCheckpoint(folder.last_checkpoint, every=values["checkpoint_every"], signals=begin.signals),
    ]
    trainer = fit(begin, module, data, values=values, metrics=metrics, callbacks=callbacks, validates=True)
    if trainer.is_global_zero:
        step, stopped = trainer.global_step, begin.signals.requested
        shape = (1, store.record(0).channels, *[96] * getattr(module.method.encoder, "spatial_dims", 3))
        print(closing_words(folder, stopped=stopped, step=step, total=trainer.max_steps, shape=shape))


def try_method(config: DictConfig, views: ViewPlan) -> None:
    """Build the method and forget it, unless its settings follow from facts that only the prepared data tell.

    Raises: ValueError: it refuses its settings.
    """
    known: dict[str, Any] = {"crop_voxel": views.first_size, "num_channels": 1}  # sizes do not follow from channels
    known |= {} if views.tables else {"num_locations": views.num_locations}
    trial = copy.deepcopy(config)
    trial.facts = dict.fromkeys(config.facts, "???") | known
    if finds_threshold(config):
        trial.method.positions.threshold = 1.0
    try:
        settings = OmegaConf.to_container(trial.method, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException:
        return
    build_method({"method": settings, "seed": config.seed})


def finds_threshold(config: DictConfig) -> bool:
    """Whether the method compares positions with a threshold that is to be found."""
    positions = config.method.get("positions")
    return isinstance(positions, DictConfig) and positions.get("threshold") == "auto"


def find_threshold(config: DictConfig, data: VolumeDataModule, *, world: int) -> None:
    """Put the number into `config` that `method.positions.threshold=auto` stands for, which follows from data and seed.

    It is that of `world` processes, whose samples are compared together or not.

    Raises: ValueError: there is none.
    """
    if not finds_threshold(config):
        return
    positions = config.method.positions
    positions.threshold = automatic_threshold(
        data.store,
        data.plan,
        data.sampler,
        rule=instantiate(positions, threshold=1.0, _convert_="all"),
        cases=data.training_cases,
        batch_size=config.batch_size,
        world=world,
        accumulate=config.accumulate,
        gather=config.method.get("gather"),
        seed=config.seed,
    )


def build_method(values: dict[str, Any]) -> Method:
    """The method with its first weights, which follow from the seed."""
    torch.manual_seed(counter_key("weights", values["seed"]))
    return instantiate(values["method"], _convert_="all")


def closing_words(folder: RunFolder, *, stopped: str, step: int, total: int, shape: tuple[int, ...]) -> str:
    """Where the results lie, and how to use them (on an image of `shape`) or go on."""
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
            f"    features = encoder(torch.zeros{shape})  # feature maps, fine to coarse",
        ]
    )
