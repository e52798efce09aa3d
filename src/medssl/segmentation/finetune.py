"""A segmentation run from its configuration: plan, network, loop, report."""

import shutil
from functools import partial
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback

from medssl.data.module import VolumeDataModule
from medssl.data.placements import RandomCrop
from medssl.data.randomness import counter_key
from medssl.data.sampling import Shuffled
from medssl.data.splits import write_split
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.inference.reading import Reading
from medssl.launcher import process_rank
from medssl.models.segmenter import Segmenter, build_segmenter
from medssl.run.folder import run_of
from medssl.run.start import Run
from medssl.run.store import open_store
from medssl.segmentation.card import build_card, setting
from medssl.segmentation.evaluator import Evaluator
from medssl.segmentation.initial_weights import find_initial, load_initial
from medssl.segmentation.method import Segmentation
from medssl.segmentation.plan import Plan, format_plan
from medssl.segmentation.report import report_run
from medssl.segmentation.sliding_window import check_windows
from medssl.segmentation.validation import Validation
from medssl.training.checkpoints import LastCheckpoint
from medssl.training.fit import check_trainer, fit, quiet, with_threads
from medssl.training.metrics import Metrics


def finetune(run: Run) -> None:
    """Prepare the data where needed, build and load the network, train it, evaluate it, and write the run folder.

    Raises:
        ValueError: A setting or file of the user is wrong; the message says what to do.
    """
    config, folder = run.config, run.folder
    quiet()
    config = with_threads(config, processes=check_trainer(config).num_devices)
    check_windows(config.overlap, config.window_batch)
    initial = find_initial(config)  # the file before the store: a mistake must not cost an hour of preparing
    store = open_store(config, is_resumed=run.checkpoint is not None)
    earlier = None if run.checkpoint is None else run_of(run.checkpoint) / folder.split.name
    plan, segmenter, recipe = build(Plan.of(config, store, initial, earlier=earlier))
    loaded = load_initial(initial, segmenter)
    settings, card, described = plan.settings, build_card(plan, store, recipe), setting(plan, segmenter, recipe)
    method = build_method(plan, segmenter)
    evaluator = Evaluator(
        store=store,
        reading=Reading.from_card(plan.reading),
        label_values=list(plan.classes),
        ignored_label=plan.ignored_label,
        overlap=config.overlap,
        window_batch=config.window_batch,
        tolerance_mm=config.tolerance_mm,
    )
    metrics = Metrics(
        folder.metrics, batch_size=settings.batch_size, validation="validation_dice" if plan.validates else None
    )
    validation = Validation(
        evaluator,
        plan.split.validation,
        every=settings.validate_every,
        metrics=metrics,
        best=folder.best_segmenter,
        card=card,
        figures=folder.figures,
        signals=run.signals,
    )
    callbacks = [
        validation,
        LastCheckpoint(folder.last_checkpoint, every=settings.checkpoint_every, signals=run.signals),
        LambdaCallback(on_train_start=partial(note_split, run, plan, store)),
    ]
    if process_rank() == 0:
        keep_best(run)
        print("\n".join([*loaded, *format_plan(plan, store, model=described["model"])]), flush=True)
    trainer = fit(
        run,
        method,
        build_data(plan, store),
        settings=settings,
        metrics=metrics,
        callbacks=callbacks,
        validates=False,
        may_be_done=not folder.results.is_file(),
    )
    if not run.signals.requested:
        report_run(trainer, method, evaluator, folder, plan=plan, card=card, setting=described)
    elif trainer.is_global_zero:
        print(f"stopped by {run.signals.requested} after step {trainer.global_step}; {folder.resume_hint()}")


def build(plan: Plan) -> tuple[Plan, Segmenter, dict[str, Any]]:
    """Return the network of a plan with fresh weights, which follow from the seed, and its recipe.

    The plan comes back with a crop that the network takes.

    Raises:
        ValueError: A class is not trusted, parts do not fit together, or a given crop does not fit the network.
    """
    settings = plan.settings
    torch.manual_seed(counter_key("weights", settings.seed))
    segmenter, recipe = build_segmenter(
        settings.model["encoder"],
        settings.model.get("decoder"),
        num_classes=len(plan.classes),
        in_channels=settings.values["facts"]["num_channels"],
        deep_supervision=settings.deep_supervision,
        allow_modules=settings.allow_modules,
    )
    return plan.fitted(segmenter.multiple_voxel), segmenter, recipe


def build_method(plan: Plan, segmenter: Segmenter) -> Segmentation:
    """Return the method that is trained.

    Raises:
        ValueError: A choice does not exist, or the encoder cannot be trained that way.
    """
    settings = plan.settings
    return Segmentation(
        segmenter=segmenter,
        label_values=list(plan.classes),
        ignored_label=plan.ignored_label,
        loss=instantiate(settings.loss),
        freeze=settings.freeze,
        layer_decay=settings.layer_decay,
        decoder_lr_scale=settings.decoder_lr_scale,
    )


def build_data(plan: Plan, store: VolumeStore) -> VolumeDataModule:
    """Return the labelled crops that a plan trains on: the group `crop`."""
    settings = plan.settings
    augment = [*settings.augment["spatial"], *settings.normalise, *settings.augment["intensity"]]
    crop = RandomCrop(
        size=plan.crop_voxel,
        spacing_mm=plan.spacing_mm,
        outside=settings.outside,
        label=True,
        label_share=settings.label_share,
        labels=list(plan.classes)[1:],
        augment=[instantiate(recipe, _convert_="all") for recipe in augment],
    )
    return VolumeDataModule(
        store=store,
        views=ViewPlan(groups={"crop": crop}),
        sampler=Shuffled(),
        batch_size=settings.batch_size,
        seed=settings.seed,
        accumulate=settings.accumulate,
        training_cases=plan.subset.cases,
    )


def keep_best(run: Run) -> None:
    """Copy the best weights into the folder of a run that continues one in another folder."""
    if run.checkpoint is not None:
        best = run_of(run.checkpoint) / run.folder.best_segmenter.name
        if best.is_file() and best.resolve() != run.folder.best_segmenter.resolve():
            shutil.copyfile(best, run.folder.best_segmenter)


def note_split(run: Run, plan: Plan, store: VolumeStore, trainer: L.Trainer, module: L.LightningModule) -> None:
    """Write the split into the run folder, on rank 0."""
    if trainer.is_global_zero:
        notes = {"labelled": plan.subset.hash, "classes": sorted(plan.classes), "ignored_label": plan.ignored_label}
        write_split(run.folder.split, store, plan.split, **notes)
