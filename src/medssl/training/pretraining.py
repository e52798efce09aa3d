"""A pre-training run from its configuration: store, views, method, loop."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from medssl.building import foreign_modules
from medssl.config import with_values
from medssl.data.module import VolumeDataModule
from medssl.data.splits import pretraining_cases
from medssl.data.views import ViewPlan
from medssl.launcher import process_rank
from medssl.methods.build import check_model, method_along
from medssl.run.settings import RunSettings, awaiting, with_facts
from medssl.run.start import Run
from medssl.run.store import is_prepared, open_store
from medssl.training.checkpoints import LastCheckpoint
from medssl.training.export import Export, build_card
from medssl.training.figures import Pictures
from medssl.training.fit import check_trainer, fit, quiet, with_threads
from medssl.training.metrics import Metrics
from medssl.training.parent import Parent


@dataclass(frozen=True)
class PretrainSettings(RunSettings):
    """The settings of a pre-training run, resolved and checked.

    Args:
        method: Recipe of the method with its networks.
        figures_every: Steps between two pictures; None for never.
        export_every: Steps between two exports of the encoder; None for never.
    """

    method: dict[str, Any]
    figures_every: int | None
    export_every: int | None


def pretrain(run: Run) -> None:
    """Prepare the data where needed, build everything that the settings name, train, and write the run folder.

    Raises:
        ValueError: A setting or file of the user is wrong; the message says what to do.
    """
    config, folder = run.config, run.folder
    quiet()
    trial = check_trainer(config)  # this, views, sampler and method before the store: a mistake is found at once
    config = with_threads(config, processes=trial.num_devices)
    check_model(config)
    views = instantiate(config.views, _convert_="all")
    if not views.tables:
        instantiate(with_facts(config, {"num_locations": views.num_locations}).sampler, _convert_="all")
    parent = Parent.of(OmegaConf.to_container(config.weights, resolve=True))  # type: ignore[arg-type]
    axes = None if parent is None else parent.axes
    if not is_prepared(config):
        try_method(config, views, axes)
    store = open_store(config, is_resumed=run.checkpoint is not None)
    views.check(store)
    for note in views.notes(store) if process_rank() == 0 else ():
        print(f"warning: {note}", file=sys.stderr, flush=True)
    training_cases, validation_cases = pretraining_cases(
        store,
        split=config.data.get("split"),
        fold=config.data.get("fold", 0),
        validation_fraction=config.data.get("validation_fraction", 0.0),
    )
    known = with_facts(config, {"num_locations": views.locations_in(store)})
    data = VolumeDataModule(
        store=store,
        views=views,
        sampler=instantiate(known.sampler, _convert_="all"),
        batch_size=config.batch_size,
        seed=config.seed,
        accumulate=config.accumulate,
        training_cases=training_cases,
        validation_cases=validation_cases,
    )
    facts = data.facts()
    facts |= method_facts(with_facts(config, facts), data, world=trial.world_size)
    settings = PretrainSettings.of(config, facts)
    method, recipe = method_along(settings.method, axes, seed=settings.seed)
    settings = replace(settings, method=recipe, values={**settings.values, "method": recipe})
    if parent is not None:
        lines = parent.load(method)
        if process_rank() == 0:
            print("\n".join(lines), flush=True)
    metrics = Metrics(
        folder.metrics,
        batch_size=settings.batch_size,
        validation="validation_loss" if settings.validate_every else None,
    )
    card = build_card(method, settings.values, store, training_cases, parent)
    callbacks = [
        Pictures(folder.figures, every=settings.figures_every),
        Export(folder.encoder, card, every=settings.export_every),
        LastCheckpoint(folder.last_checkpoint, every=settings.checkpoint_every, signals=run.signals),
    ]
    trainer = fit(run, method, data, settings=settings, metrics=metrics, callbacks=callbacks, validates=True)
    if trainer.is_global_zero:
        shape = (1, store.record(0).channels, *[96] * getattr(method.encoder, "spatial_dims", 3))
        modules = foreign_modules(card.get("encoder"))
        print(summary(run, step=trainer.global_step, total=settings.max_steps, shape=shape, modules=modules))


def try_method(config: DictConfig, views: ViewPlan, axes: str | None = None) -> None:
    """Build the method once, unless its settings follow from facts that only the prepared data give.

    Raises:
        ValueError: The method refuses its settings, the view groups, or the axes of its parent.
    """
    known: dict[str, Any] = {"crop_voxel": views.first_size, "num_channels": 1}  # sizes do not follow from channels
    known |= {} if views.tables else {"num_locations": views.num_locations}
    stand_ins = {
        place: recipe.stand_in for name, recipe in fact_recipes(config).items() for place in awaiting(config, name)
    }
    trial = with_values(with_facts(config, dict.fromkeys(config.facts, "???") | known), stand_ins)
    try:
        settings = OmegaConf.to_container(trial.method, resolve=True, throw_on_missing=True)
    except InterpolationKeyError:  # no fact will help
        raise
    except OmegaConfBaseException:
        return
    method, _ = method_along(settings, axes, seed=config.seed)  # type: ignore[arg-type]
    method.check_groups({name: spec.count for name, spec in views.groups.items()})


def fact_recipes(config: DictConfig) -> dict[str, Any]:
    """Return the objects that compute the facts that settings of the method await, by name.

    `facts_from` of a method's YAML names such a fact and the class that computes it; a setting of this name that is
    `auto` awaits it.
    """
    return {
        name: instantiate(recipe, _convert_="all")
        for name, recipe in (config.get("facts_from") or {}).items()
        if awaiting(config, name)
    }


def method_facts(config: DictConfig, data: VolumeDataModule, *, world: int) -> dict[str, Any]:
    """Return the facts that the method needs of the data of `world` processes.

    Raises:
        ValueError: A fact cannot be computed.
    """
    return {name: compute(data, world=world) for name, compute in fact_recipes(config).items()}


def summary(run: Run, *, step: int, total: int, shape: tuple[int, ...], modules: Sequence[str]) -> str:
    """Return lines that say where the results lie, and how to use them (on an image of `shape`) or continue."""
    folder = run.folder
    if run.signals.requested:
        return f"stopped by {run.signals.requested} after step {step} of {total}; {folder.resume_hint()}"
    allowed = f", allow_modules={list(modules)}" if modules else ""
    pictures = sorted(folder.figures.glob(f"*-{step:07d}.png"))
    return "\n".join(
        [
            f"encoder  {folder.encoder}",
            f"metrics  {folder.metrics}",
            *(f"picture  {path}" for path in pictures),
            "",
            "    import medssl, torch",
            f'    encoder = medssl.load_encoder("{folder.encoder}"{allowed})',
            f"    features = encoder(torch.zeros{shape})  # feature maps, fine to coarse",
        ]
    )
