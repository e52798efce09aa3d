"""The end of a segmentation run: its weights chosen, its cases predicted, its numbers written and printed."""

import csv
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from medssl.evaluation.results import summarise, write_results
from medssl.run.folder import RunFolder
from medssl.segmentation.evaluator import Evaluator
from medssl.segmentation.method import Segmentation
from medssl.segmentation.plan import Plan
from medssl.segmentation.validation import write_pictures
from medssl.weights import load_parts, save_weights

PACKAGES = ("medssl", "torch", "monai", "numpy", "scipy")


def report_run(
    trainer: L.Trainer,
    method: Segmentation,
    evaluator: Evaluator,
    folder: RunFolder,
    *,
    plan: Plan,
    card: dict[str, Any],
    setting: dict[str, Any],
) -> None:
    """Write `segmenter.safetensors` and the numbers of its predictions on the evaluation cases; rank 0 prints them.

    Args:
        trainer: The trainer, at the end of training.
        method: The method that was trained.
        evaluator: Predicts and scores cases.
        folder: The folder that everything is written to.
        plan: The plan of the run, which the results state.
        card: The card of the network.
        setting: The entries that distinguish this run from others, besides its seed.
    """
    device, step = trainer.strategy.root_device, trainer.global_step
    if trainer.is_global_zero:
        save_weights(folder.last_segmenter, method.parts(), {**card, "step": step})
        chosen = folder.best_segmenter if plan.choice == "best" else folder.last_segmenter
        shutil.copyfile(chosen, folder.segmenter)
        load_parts(chosen, method.parts())
    method.to(device)
    if trainer.world_size > 1:
        for tensor in method.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    where, cases = plan.split.evaluation
    begin = time.perf_counter()
    with trainer.precision_plugin.forward_context():
        found = evaluator.run(method.segmenter, cases, device=device, full=True, title="evaluating")
    assert found is not None
    if not trainer.is_global_zero:
        return
    results = summarise(sorted(found.scores.items()), list(plan.class_names))
    seconds = {"training": round(training_seconds(folder.metrics, plan.settings.batch_size), 1)}
    seconds["evaluation"] = round(time.perf_counter() - begin, 1)
    subset = plan.subset
    results |= {
        "data": {"name": plan.settings.data["name"], "store": str(evaluator.store.root)},
        "split": {
            "name": plan.split.name,
            "hash": plan.split.hash,
            "evaluated_on": where,
            "num_cases": len(cases),
            "content": hashlib.sha256(json.dumps(sorted(found.contents.items())).encode()).hexdigest()[:12],
        },
        "labelled": {
            "requested": subset.requested,
            "count": len(subset.cases),
            "seed": subset.seed,
            "hash": subset.hash,
            "cases": [evaluator.store.record(case).case for case in subset.cases],
        },
        "leakage": dict(plan.leakage),
        "classes_without_training_label": list(plan.unlearnable),
        "ignored_label": plan.ignored_label,
        "reading_differs": list(plan.other_reading),
        "report": plan.choice,
        "selected_on_evaluation": plan.choice == "best" and where == "validation",
        "setting": setting,
        "seed": plan.settings.seed,
        "step": step,
        "versions": {package: version(package) for package in PACKAGES},
        "wall_s": sum(seconds.values()),
        "seconds": seconds,
        "peak_memory_mb": peak_memory_mb(device),
    }
    write_results(folder.root, results)
    pictures = write_pictures(
        found.pictures, folder.figures, name=where, step=step, num_classes=len(evaluator.label_values)
    )
    print(format_results(results, folder, pictures, allow_modules=plan.settings.allow_modules))


def training_seconds(metrics: Path, batch_size: int) -> float:
    """Return the time of all steps of a run, over all its parts, without validation."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return sum(batch_size / float(row["samples_per_s"]) for row in csv.DictReader(file))


def peak_memory_mb(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process, and of the GPU where there is one."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss counts bytes there, kilobytes elsewhere
    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if device.type == "cuda":
        peak["gpu"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return peak


def format_results(
    results: dict[str, Any], folder: RunFolder, pictures: Sequence[Path], *, allow_modules: Sequence[str] = ()
) -> str:
    """Return the table of a run, the paths of its results, and the command that predicts with its network."""
    allowed = f" 'allow_modules=[{','.join(allow_modules)}]'" if allow_modules else ""
    split, labelled = results["split"], results["labelled"]
    heading = (
        f"{split['num_cases']} {split['evaluated_on']} cases of split {split['name']} [{split['hash']}],"
        f" {labelled['count']} labelled [{labelled['hash']}], {results['report']} weights, seed {results['seed']}"
    )
    columns = [results[metric] for metric in ("dice", "hd95_mm", "nsd")]
    rows = [["", "Dice", "HD95 mm", f"NSD {results['tolerance_mm']:g} mm"]]
    for name in results["dice"]["per_class"]:
        rows.append([name, *(_number(column["per_class"][name]) for column in columns)])
    rows.append(["mean", *(_number(column["mean"]) for column in columns)])
    width = max(len(row[0]) for row in rows)
    table = [f"{row[0]:<{width}}" + "".join(f"  {cell:>8}" for cell in row[1:]) for row in rows]
    marks = []
    if results["leakage"]["overlap"]:
        marks.append(f"LEAKAGE: {results['leakage']['overlap']} of these cases were seen in pre-training")
    marks += [f"LEAKAGE: {copies}" for copies in results["leakage"]["same_voxels"]]
    if results["selected_on_evaluation"]:
        marks.append("the weights were selected on the very cases they are evaluated on: the numbers flatter")
    if "phantom" in results["data"]["name"]:
        marks.append("synthetic data")
    return "\n".join(
        [
            heading,
            *table,
            *(f"note     {mark}" for mark in marks),
            f"results  {folder.results}",
            *(f"picture  {path}" for path in pictures),
            f"network  {folder.segmenter}",
            "",
            f"    python -m medssl.predict weights={folder.segmenter}{allowed} input=SCAN output_dir=predictions",
        ]
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if value < 10 else f"{value:.1f}"
