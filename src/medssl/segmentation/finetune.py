"""A segmentation run from its configuration: store, split, network, loop, evaluation."""

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from medssl.data.module import VolumeDataModule
from medssl.data.placements import RandomCrop
from medssl.data.randomness import counter_key
from medssl.data.sampling import Shuffled
from medssl.data.splits import CaseSplit, few_labels, resolve_split, write_split
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.inference.reading import Reading
from medssl.models.segmenter import Segmenter, build_segmenter
from medssl.run.folder import process_rank, run_of
from medssl.run.settings import flat, short_hash
from medssl.run.start import Start
from medssl.run.store import open_store
from medssl.segmentation.evaluator import Evaluator
from medssl.segmentation.initial_weights import Initial, find_initial, load_initial
from medssl.segmentation.method import Segmentation
from medssl.segmentation.plan import (
    check_grid,
    check_resumed,
    find_classes,
    find_crop,
    find_overlap,
    find_spacing,
    other_reading,
    unlearnable,
)
from medssl.segmentation.report import Protocol, report_run
from medssl.segmentation.sliding_window import check_windows
from medssl.segmentation.validation import Validation
from medssl.training.checkpoints import LastCheckpoint
from medssl.training.fit import build_module, check_trainer, fit, quiet, resolved
from medssl.training.metrics import Metrics

REPORTS = ("auto", "best", "last")


def finetune(begin: Start) -> None:
    """Prepare the data where needed, build and load the network, train it, evaluate it, and write the run folder.

    Raises: ValueError: a setting or file of the user is wrong; the message says what to do.
    """
    config, folder = begin.config, begin.folder
    quiet()
    check_trainer(config)
    check_windows(config.overlap, config.window_batch)
    initial = find_initial(config)  # the file before the store: a slip need not cost an hour of preparing
    store = open_store(config, is_resumed=begin.checkpoint is not None)
    check_grid(store)
    split = resolve_split(store, split=config.data.split, fold=config.data.fold)
    subset = few_labels(store, split.training, labelled=config.data.labelled, seed=config.data.labelled_seed)
    leakage = find_overlap(initial.card, store, split, path=initial.path, allowed=config.allow_leakage)
    classes = find_classes(store, split, wanted=plain(config.data.classes))
    if begin.checkpoint is not None:
        check_resumed(run_of(begin.checkpoint) / folder.split.name, split, subset.hash, classes)
    set_facts(config, store, split, num_cases=len(subset.cases), num_classes=len(classes))
    segmenter, recipe = build_network(config)
    loaded = load_initial(initial, segmenter)
    values = resolved(config)
    reading = {
        "channels": values["data"].get("channels"),
        "spacing_mm": values["facts"]["spacing_mm"],
        "crop_voxel": values["facts"]["crop_voxel"],
        "outside": values["outside"],
        "normalise": values["normalise"],
        "modality": the_modality(store, subset.cases),
    }
    protocol = Protocol(
        split=split,
        subset=subset,
        leakage=leakage,
        class_names=list(classes.values())[1:],
        setting=setting(values, initial, segmenter, recipe),
        choice=weights_to_report(values, split),
        unlearnable=unlearnable(store, subset.cases, classes),
        other_reading=other_reading(initial.card, reading),
    )
    card = {
        "kind": "segmenter",
        **recipe,
        "classes": [{"value": value, "name": name} for value, name in classes.items()],
        "reading": reading,
        "method": initial.name,
        "data": {
            "name": values["data"]["name"],
            "num_cases": len(subset.cases),
            "split": {"name": split.name, "hash": split.hash},
            "labelled": subset.hash,
            "voxel_hashes": fingerprint(initial, store, subset.cases),
        },
        "versions": {package: version(package) for package in ("medssl", "torch", "monai", "numpy")},
    }
    method = Segmentation(
        segmenter=segmenter,
        label_values=list(classes),
        loss=instantiate(values["loss"]),
        freeze=values["freeze"],
        layer_decay=values["layer_decay"],
        decoder_lr_scale=decoder_lr_scale(values),
    )
    module = build_module(begin, method, values, may_be_done=not folder.results.is_file())
    data = VolumeDataModule(
        store=store,
        views=crops(values, labels=list(classes)[1:]),
        sampler=Shuffled(),
        batch_size=values["batch_size"],
        seed=values["seed"],
        accumulate=values["accumulate"],
        training_cases=subset.cases,
    )
    evaluator = Evaluator(
        store=store,
        reading=Reading.from_card(reading),
        label_values=list(classes),
        overlap=values["overlap"],
        window_batch=values["window_batch"],
        tolerance_mm=values["tolerance_mm"],
    )
    validates = bool(values["validate_every"] and split.validation)
    metrics = Metrics(
        folder.metrics, batch_size=values["batch_size"], validation="validation_dice" if validates else None
    )
    validation = Validation(
        evaluator,
        split.validation,
        every=values["validate_every"],
        metrics=metrics,
        best=folder.best_segmenter,
        card=card,
        figures=folder.figures,
        signals=begin.signals,
    )
    last = LastCheckpoint(folder.last_checkpoint, every=values["checkpoint_every"], signals=begin.signals)
    if process_rank() == 0:
        keep_best(begin)
        print("\n".join([*loaded, *plan_in_words(store, protocol, values)]), flush=True)

    def note(trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_split(folder.split, store, split, labelled=subset.hash, classes=sorted(classes))

    callbacks = [validation, last, LambdaCallback(on_train_start=note)]
    trainer = fit(begin, module, data, values=values, metrics=metrics, callbacks=callbacks, validates=False)
    if begin.signals.requested:
        if trainer.is_global_zero:
            print(f"stopped by {begin.signals.requested} after step {trainer.global_step}; {folder.way_on()}")
        return
    report_run(trainer, method, evaluator, folder, protocol=protocol, card=card, values=values)


def set_facts(config: DictConfig, store: VolumeStore, split: CaseSplit, *, num_cases: int, num_classes: int) -> None:
    """Write what follows from the data into `config.facts`. Raises: ValueError: spacing or crop are none."""
    spacing_mm = find_spacing(store, split.training, plain(config.working_spacing_mm))
    config.facts = {
        "num_cases": num_cases,
        "num_channels": store.record(split.training[0]).channels,
        "num_classes": num_classes,
        "num_locations": 0,
        "steps_per_epoch": num_cases / config.batch_size,
        "spacing_mm": spacing_mm,
        "crop_voxel": find_crop(store, split.training, crop_voxel=plain(config.crop_voxel), spacing_mm=spacing_mm),
    }


def plain(value: Any) -> Any:
    """A setting as plain Python values."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def build_network(config: DictConfig) -> tuple[Segmenter, dict[str, Any]]:
    """The network of `config.model` with fresh weights, which follow from the seed, and its recipe.

    A fitted crop grows to what the network takes.

    Raises: ValueError: a class is not trusted, parts do not fit together, or a given crop does not fit the network.
    """
    torch.manual_seed(counter_key("weights", config.seed))
    model: dict[str, Any] = OmegaConf.to_container(config.model, resolve=True)  # type: ignore[assignment]
    segmenter, recipe = build_segmenter(
        model["encoder"],
        model.get("decoder"),
        num_classes=config.facts.num_classes,
        in_channels=config.facts.num_channels,
        deep_supervision=config.deep_supervision,
        allow_modules=config.allow_modules,
    )
    sides, steps = list(config.facts.crop_voxel), segmenter.multiple_voxel
    fitting = [-(-side // step) * step for side, step in zip(sides, steps, strict=True)]
    if config.crop_voxel is not None and fitting != sides:
        raise ValueError(
            f"crop_voxel={sides} does not fit the network, whose crops are multiples of {list(steps)};"
            f" give {fitting}, or null"
        )
    config.facts.crop_voxel = fitting
    return segmenter, recipe


def crops(values: Mapping[str, Any], *, labels: Sequence[int]) -> ViewPlan:
    """The view plan of the run: the group `crop` with its label."""
    augment = [*values["augment"]["spatial"], *values["normalise"], *values["augment"]["intensity"]]
    crop = RandomCrop(
        size=values["facts"]["crop_voxel"],
        spacing_mm=values["facts"]["spacing_mm"],
        outside=values["outside"],
        label=True,
        label_share=values["label_share"],
        labels=list(labels),
        augment=[instantiate(recipe, _convert_="all") for recipe in augment],
    )
    return ViewPlan(groups={"crop": crop})


def weights_to_report(values: Mapping[str, Any], split: CaseSplit) -> str:
    """`best` or `last`: which weights are evaluated.

    `auto` takes the best on validation cases where these are not the ones that are evaluated.

    Raises: ValueError: no such choice, or nothing to select the best by.
    """
    choice, validates = values["report"], bool(values["validate_every"] and split.validation)
    if choice not in REPORTS:
        raise ValueError(f"report={choice}: give one of {', '.join(REPORTS)}")
    if choice == "best" and not validates:
        raise ValueError("report=best needs validation cases in the split and validate_every; give report=last")
    if choice == "auto":
        return "best" if validates and split.evaluation[0] == "test" else "last"
    return choice


COURSE = (
    *("freeze", "layer_decay", "decoder_lr", "deep_supervision", "batch_size", "accumulate", "window_hu", "outside"),
    *("label_share", "overlap", "optimizer", "loss", "normalise", "augment"),
)
"""Settings that tell one experiment from another, besides network, weights, data and length."""


def setting(
    values: Mapping[str, Any], initial: Initial, segmenter: Segmenter, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """What tells this run from others: runs that agree in it and differ in their seed are repetitions."""
    weights = sum(parameter.numel() for parameter in segmenter.parameters())
    kinds = [type(getattr(part, "net", part)).__name__ for part in (segmenter.encoder, segmenter.decoder)]
    facts, spacing = values["facts"], values["facts"]["spacing_mm"]
    return {
        "weights": initial.name,
        "model": f"{kinds[0]} + {kinds[1]}, {weights / 1e6:.2f} M [{short_hash(recipe)}]",
        "max_steps": values["trainer"]["max_steps"],
        "precision": str(values["trainer"].get("precision")),
        "crop_voxel": "x".join(map(str, facts["crop_voxel"])),
        "spacing_mm": spacing if isinstance(spacing, str) else "x".join(f"{s:g}" for s in spacing),
        "classes": facts["num_classes"] - 1,
        **{key: value for name in COURSE for key, value in flat(values[name], name).items()},
    }


def the_modality(store: VolumeStore, cases: Sequence[int]) -> str | None:
    """The modality of all cases; None where they differ."""
    found = {store.record(case).modality for case in cases}
    return found.pop() if len(found) == 1 else None


def decoder_lr_scale(values: Mapping[str, Any]) -> float:
    """Learning rate of the decoder over that of the encoder. Raises: ValueError: the latter is 0."""
    if values["decoder_lr"] is None:
        return 1.0
    if not values["optimizer"]["lr"]:
        raise ValueError("decoder_lr counts relative to optimizer.lr, which is 0; freeze=encoder keeps the encoder")
    return values["decoder_lr"] / values["optimizer"]["lr"]


def keep_best(begin: Start) -> None:
    """Bring the best weights along where a run goes on in another folder."""
    if begin.checkpoint is not None:
        best = run_of(begin.checkpoint) / begin.folder.best_segmenter.name
        if best.is_file() and best.resolve() != begin.folder.best_segmenter.resolve():
            shutil.copyfile(best, begin.folder.best_segmenter)


def fingerprint(initial: Initial, store: VolumeStore, cases: Sequence[int]) -> list[str] | None:
    """Hashes of the volumes that the network has seen: of those trained on here, and those of the file it came from.

    None where that file does not say: then nobody can tell.
    """
    before = [] if initial.card is None else initial.card.get("data", {}).get("voxel_hashes")
    if before is None:
        return None
    return sorted({*before, *(store.record(case).voxel_hash[:16] for case in cases)})


def plan_in_words(store: VolumeStore, protocol: Protocol, values: Mapping[str, Any]) -> list[str]:
    """What the run is about to do: cases, classes, crops, and what to beware of."""
    split, subset, facts = protocol.split, protocol.subset, values["facts"]
    where, cases = split.evaluation
    names = list(protocol.class_names)
    spacing = facts["spacing_mm"]
    lines = [
        f"split: {split.name} [{split.hash}], {len(split.training)} training, {len(split.validation)} validation,"
        f" {len(split.test)} test cases; numbers come from the {len(cases)} {where} cases",
        f"labelled: {len(subset.cases)} cases [{subset.hash}]"
        + (f": {', '.join(store.record(case).case for case in subset.cases)}" if len(subset.cases) <= 10 else ""),
        f"classes: {len(names)} ({', '.join(names[:15])}{', ...' if names[15:] else ''})",
        f"crops: {' x '.join(map(str, facts['crop_voxel']))} voxels at "
        + (spacing if isinstance(spacing, str) else f"{' x '.join(f'{s:g}' for s in spacing)} mm"),
        f"model: {protocol.setting['model']}",
    ]
    lines += [f"reading: {line}" for line in protocol.other_reading]
    if protocol.unlearnable:
        lines.append(f"classes: {', '.join(protocol.unlearnable)}: in no label that is trained on, cannot be learnt")
    if not protocol.leakage["checked"]:
        lines.append("leakage: the file does not say which volumes it was trained on; overlap cannot be checked")
    if protocol.leakage["overlap"]:
        lines.append(f"leakage: {protocol.leakage['overlap']} of the {where} cases were seen in pre-training (allowed)")
    if values["freeze"] == "all_but_head" and protocol.setting["weights"] != "scratch":
        lines.append("freeze: decoder layers that no file filled stay as they were drawn")
    return lines
