"""Where modules went before the first release, for files that still name the old places: YAML, cards, `config.yaml`."""

from collections.abc import Mapping
from typing import Any

MODULES: dict[str, dict[str, str]] = {  # room: {file that left it: its place now}
    "": {"layouts_kaf": "layouts.kaf", "layouts_macl": "layouts.macl"},
    "data": {
        "case_numbers": "tables.case_numbers",
        "derived": "tables.derived",
        "emphysema": "phantoms.emphysema",
        "external_keypoints": "tables.external_keypoints",
        "heights": "tables.heights",
        "location_report": "tables.location_report",
        "location_tables": "tables.locations",
        "locations": "tables.anchors",
        "phantom_canvas": "phantoms.canvas",
        "phantoms": "phantoms.torso",
        "references": "tables.references",
        "registration": "tables.registration",
        "store_writing": "data.store_writer",
        "supervoxels": "tables.supervoxels",
        "writing": "data.atomic",
    },
    "evaluation": {
        "overlap": "evaluation.scores",
        "pictures": "segmentation.pictures",
        "probe_models": "probing.models",
        "probe_report": "probing.report",
        "probe_scores": "probing.scores",
        "probe_targets": "probing.targets",
        "probing": "probing.cross_validation",
    },
    "inference": {
        "embedder": "extraction.embedder",
        "embedding": "extraction.embedding",
        "ensemble": "segmentation.ensemble",
        "feature_file": "extraction.feature_file",
        "features": "extraction.features",
        "keypoint_pictures": "tables.keypoint_pictures",
        "keypoint_tables": "tables.keypoints",
        "locating": "extraction.match",
        "native_grid": "segmentation.native_grid",
        "online": "tables.embeddings",
        "pairs": "tables.pairs",
        "patch_encoder": "extraction.patch_encoder",
        "phantom_input": "segmentation.phantom_input",
        "predicting": "segmentation.predict",
        "segmenting": "segmentation.segment",
        "sliding_window": "segmentation.sliding_window",
    },
    "methods": {
        "macl_positions": "methods.positions",
        "macl_threshold": "training.positive_rate",
        "panels": "ops.panels",
        "segmentation": "segmentation.method",
    },
    "ops": {"shrinking": "ops.downsample"},
    "training": {
        "evaluating": "segmentation.evaluator",
        "failing": "run.ranks",
        "finetuning": "segmentation.finetune",
        "initialising": "segmentation.initial_weights",
        "pictures": "training.figures",
        "planning": "segmentation.plan",
        "reporting": "segmentation.report",
        "run_folder": "run.folder",
        "running": "training.fit",
        "settings": "run.settings",
        "starting": "run.start",
        "stopping": "run.signals",
        "validation": "segmentation.validation",
        "waiting": "run.ranks",
    },
}
NAMES: dict[tuple[str, str], dict[str, str]] = {  # (room, file): {name that went elsewhere than its file: its place}
    ("inference", "predicting"): {"find_device": "inference.device"},
    ("inference", "segmenting"): {"fetch_from": "inference.record", "record_of": "inference.record"},
    ("training", "running"): dict.fromkeys(("open_store", "is_prepared", "update_store"), "run.store"),
    ("data", "cases"): {"PhantomCase": "phantoms.source"},
    ("data", "sources"): {"Phantoms": "phantoms.source"},
}
RENAMED = {
    "medssl.extraction.match.Scan": "medssl.extraction.match.MatchedScan",
    "medssl.models.alice_backbones.build_backbone": "medssl.models.alice_backbones.Backbone",
    "medssl.models.partial_unet.build_partial_unet": "medssl.models.partial_unet.PartialUNet",
    "medssl.run.start.Start": "medssl.run.start.Run",
    "medssl.segmentation.evaluator.Found": "medssl.segmentation.evaluator.Evaluation",
    "medssl.segmentation.predict.Settings": "medssl.segmentation.settings.PredictSettings",
    "medssl.tables.pairs.Pairs": "medssl.tables.pairs.PairTable",
}


def new_path(path: str) -> str | None:
    """Return the path that a module, class or function of medssl has now; None where it did not move."""
    if path in RENAMED:
        return RENAMED[path]
    package, *parts = path.split(".")
    if package != "medssl" or not parts:
        return None
    if parts[0] in MODULES[""]:
        parts = ["", *parts]
    if len(parts) < 2:
        return None
    room, file, *names = parts
    home = NAMES.get((room, file), {}).get(names[0]) if names else None
    if home:
        return ".".join(["medssl", home, *names])
    if file in MODULES.get(room, {}):
        moved = ".".join(["medssl", MODULES[room][file], *names])
        return RENAMED.get(moved, moved)
    return None


def refuse_moved(values: Any, *, source: str) -> None:
    """Check that no `_target_` in nested plain values names a place that medssl has left.

    Raises:
        ValueError: A `_target_` names such a place; the message says the new path.
    """
    pending = [values]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            target = node.get("_target_")
            if isinstance(target, str) and (place := new_path(target)):
                raise ValueError(f"{source} names {target}, which is {place} now; write the new path there")
        pending += node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
