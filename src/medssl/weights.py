"""Files of trained networks: tensors of named parts and a card, in one safetensors file.

The card (JSON in the header) says how to rebuild the encoder and how its images were read. No code runs on load.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medssl.building import build_network as build_network
from medssl.data.atomic import whole_file
from medssl.layouts import catalogue
from medssl.models.reoriented import TARGET, Reoriented, along
from medssl.models.segmenter import Segmenter, build_segmenter

FORMAT = 2
READABLE = (1, 2)
"""Formats of cards that are read; docs/data.md says what they are."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """The outcome of loading the tensors of one part.

    The network changes some tensors by its own rules (`adapt`): it resized or cut those in `reshaped`, and does not use
    those of the file in `left_out`. Those in `fresh` are not in the file, and keep their first values by such a rule.
    """

    part: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ill_shaped: tuple[str, ...]
    reshaped: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the tensors of the part came from the file, all of the file's were used, and all else is by rule."""
        return not (self.missing or self.unexpected or self.ill_shaped)

    def __str__(self) -> str:
        names = {"missing": self.missing, "unexpected": self.unexpected}
        names |= {"of another shape": self.ill_shaped, "reshaped": self.reshaped, "left out": self.left_out}
        names |= {"fresh": self.fresh}
        details = [
            f"{len(some)} {what} ({', '.join(some[:4])}{', ...' if some[4:] else ''})"
            for what, some in names.items()
            if some
        ]
        return f"{self.part}: {', '.join([f'{len(self.matched)} tensors matched', *details])}"


def save_weights(path: str | Path, parts: Mapping[str, nn.Module], card: Mapping[str, Any]) -> None:
    """Write the tensors of `parts` as `part.tensor` and `card` into `path`; equal input gives equal bytes.

    The file appears as a whole or not at all. The names of wrappers (of compiled modules, `Reoriented`) are left out.
    """
    target = Path(path)
    tensors = {
        f"{part}.{name.replace('_orig_mod.', '')}": tensor.detach().cpu().contiguous().clone()
        for part, module in parts.items()
        for name, tensor in _bare(module).state_dict().items()
    }
    header = json.dumps({**card, "format": FORMAT}, sort_keys=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask allows; safetensors would close the file to others
        save_file(tensors, partial, metadata={"card": header})
        partial.chmod(mode)


def read_card(path: str | Path) -> dict[str, Any]:
    """Return the card of a file written by `save_weights`.

    Raises:
        ValueError: The file is missing, broken, of another kind, or has no card that this version reads.
    """
    source = _existing(path)
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(_wrong_kind(source, error)) from None
    try:
        card = json.loads(metadata["card"])
        found = card.get("format")
    except (KeyError, json.JSONDecodeError, AttributeError):
        raise ValueError(
            f"{source} is a safetensors file without a medssl card; it holds tensors of an unknown network. Load a "
            "file that pre-training exported, or name its layout"
        ) from None
    if found not in READABLE:
        raise ValueError(f"{source} has format {found}, this version reads 1 and 2; update medssl")
    return card


def card_of(path: str | Path, *, layout: str | None = None, branch: str = "student") -> dict[str, Any]:
    """Return the card of a file of ours, or with `layout` one that is read off the tensors of a published file.

    Raises:
        ValueError: The file is wrong, or the layout or branch is unknown.
    """
    if layout is None:
        return read_card(path)
    return catalogue.get(layout).card(_published(path, layout, branch), source=str(path))


def axes_in(card: Mapping[str, Any]) -> str | None:
    """Return the axes that the encoder of a card was trained with, as `Reoriented` takes them.

    It is None where the card describes no encoder and states no axes.
    """
    recipe = card.get("encoder")
    if recipe is None:
        return card.get("input_axes")
    return recipe["axes"] if recipe.get("_target_") == TARGET else card.get("input_axes", "xyz")


def encoder_recipe(path: str | Path, *, layout: str | None = None, branch: str = "student") -> dict[str, Any]:
    """Return the recipe of the encoder in a file, for `build_network` or `build_segmenter`.

    An encoder that was trained with other axes than ours is wrapped in `Reoriented`.

    Raises:
        ValueError: The file is wrong, the layout or branch is unknown, or the card describes no encoder.
    """
    card = card_of(path, layout=layout, branch=branch)
    if "encoder" not in card:
        raise ValueError(f"the card of {path} does not describe an encoder; its keys are {sorted(card)}")
    return along(card["encoder"], card.get("input_axes", "xyz"))


def load_encoder(
    path: str | Path, *, layout: str | None = None, branch: str = "student", allow_modules: Sequence[str] = ()
) -> nn.Module:
    """Return the pre-trained encoder in evaluation mode.

    Its `forward(x)` gives feature maps, which `channels` and `strides` describe.

    Args:
        path: A file of ours, or with `layout` a published checkpoint of that layout.
        layout: None for a file of ours, a name in `medssl.layouts.catalogue.LAYOUTS`, or MODULE.NAME of your own
            `Layout`.
        branch: `student`, or `teacher` if the file holds one.
        allow_modules: Packages besides `medssl.models` and `monai.networks` whose classes a card may name.

    Raises:
        ValueError: The file is wrong, the layout or branch is unknown, a class is not allowed, or the weights do not
            fit.
    """
    encoder = build_network(encoder_recipe(path, layout=layout, branch=branch), allow_modules=allow_modules)
    load_parts(path, {"encoder": encoder}, layout=layout, branch=branch)
    return encoder.eval()


def load_segmenter(path: str | Path, *, allow_modules: Sequence[str] = ()) -> tuple[Segmenter, dict[str, Any]]:
    """Return the segmenter of a file in evaluation mode, and its card.

    The card holds labels (`classes`), the reading recipe, the data and the versions.

    Raises:
        ValueError: Wrong or broken file, one that holds no segmenter, a class that is not allowed, or a card whose
            networks or labels do not belong to the tensors.
    """
    card = read_card(path)
    if card.get("kind") != "segmenter":
        raise ValueError(
            f"{path} holds {'a pre-trained encoder' if 'encoder' in card else 'tensors'}, not a segmenter; fine-tune "
            f"it first (python -m medssl.finetune weights={path} ...) and give the segmenter.safetensors of that run"
        )
    if lacking := sorted({"encoder", "decoder", "num_classes", "deep_supervision", "classes"} - card.keys()):
        raise ValueError(f"the card of {path} lacks {', '.join(lacking)}; write the file again with this version")
    num_classes = card["num_classes"]
    if len(card["classes"]) != num_classes:
        raise ValueError(f"the card of {path} names {len(card['classes'])} labels for {num_classes} classes")
    encoder = card["encoder"]
    network, _ = build_segmenter(
        encoder,
        card["decoder"],
        num_classes=num_classes,
        deep_supervision=card["deep_supervision"],
        allow_modules=allow_modules,
    )
    load_parts(path, network.parts())
    return network.eval(), card


def load_parts(
    source: str | Path | Mapping[str, Any],
    parts: Mapping[str, nn.Module],
    *,
    layout: str | None = None,
    branch: str = "student",
    partial: bool = False,
) -> list[LoadReport]:
    """Load the named parts of a file into modules of the same names, all tensors or none, and return the reports.

    `source` is a path, or what such a file holds: tensors named `part.tensor` as in ours, or with `layout` what
    `torch.load` gives for a published file.

    Modules with an `adapt` method may resize tensors that they know how to resize (position tables, input channels) and
    leave out tensors that they do not use (a CLS token). Tensors that a module names in `may_be_fresh` (a mask token)
    need not be in the file. The reports list these. A part is loaded into the network inside a `Reoriented`. With
    `partial=True`, missing, unexpected and ill-shaped tensors are reported, not refused.

    Raises:
        ValueError: The file is wrong, does not hold a part, or its tensors do not match.
    """
    where = "the mapping" if isinstance(source, Mapping) else str(source)
    prefix = f"{branch}_" if layout is None and branch != "student" else ""
    wanted = [f"{prefix}{part}" for part in parts]
    tensors = _own(source, wanted) if layout is None else _published(source, layout, branch)
    reports, accepted = [], []
    for name, (part, wrapped) in zip(wanted, parts.items(), strict=True):
        module = _bare(wrapped)
        stored = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if not stored:
            held = _parts_of(source if layout is None else tensors)
            raise ValueError(f"{where} holds no part `{name}`; it holds {', '.join(held)}")
        report, fitting = _compare(part, module, stored)
        reports.append(report)
        accepted.append((module, fitting))
        log.info("%s: %s", where, report)
    wrong = [str(report) for report in reports if not report.fits]
    if wrong and not partial:
        raise ValueError(f"{where} does not fit; nothing was loaded. {'; '.join(wrong)}")
    for module, fitting in accepted:
        module.load_state_dict(fitting, strict=not partial)
    return reports


def describe_loading(reports: Sequence[LoadReport], fresh: Sequence[str], *, copied: Sequence[str] = ()) -> str:
    """Return lines for users: what came from the file, what was copied from it, and what starts from scratch."""
    lines = [f"from the file: {'; '.join(map(str, reports))}"] if reports else []
    lines += [f"copied from what was loaded: {', '.join(copied)}"] if copied else []
    return "\n".join(lines + ([f"from scratch: {', '.join(fresh)}"] if fresh else []))


def _bare(module: nn.Module) -> nn.Module:
    whole: nn.Module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    return whole.net if isinstance(whole, Reoriented) else whole


def _compare(part: str, module: nn.Module, stored: dict[str, Tensor]) -> tuple[LoadReport, dict[str, Tensor]]:
    expected = module.state_dict()
    adapted = adapt(stored) if callable(adapt := getattr(module, "adapt", None)) else stored
    fresh = set(getattr(module, "may_be_fresh", ())) & (expected.keys() - adapted.keys())
    fitting = {
        key: tensor for key, tensor in adapted.items() if key in expected and tensor.shape == expected[key].shape
    }
    ill_shaped = (
        f"{key} is {tuple(tensor.shape)} instead of {tuple(expected[key].shape)}"
        for key, tensor in adapted.items()
        if key in expected and key not in fitting
    )
    report = LoadReport(
        part=part,
        matched=tuple(sorted(fitting)),
        missing=tuple(sorted(expected.keys() - adapted.keys() - fresh)),
        unexpected=tuple(sorted(adapted.keys() - expected.keys())),
        ill_shaped=tuple(ill_shaped),
        reshaped=tuple(
            sorted(key for key in fitting.keys() & stored.keys() if stored[key].shape != fitting[key].shape)
        ),
        left_out=tuple(sorted(stored.keys() - adapted.keys())),
        fresh=tuple(sorted(fresh)),
    )
    return report, fitting | {key: expected[key] for key in fresh}


def _own(source: str | Path | Mapping[str, Any], parts: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of some parts of a file of ours, or of a mapping like it; other parts are not read."""
    if isinstance(source, Mapping):
        return {key: tensor for key, tensor in source.items() if key.partition(".")[0] in parts}
    read_card(source)
    try:
        with safe_open(source, framework="pt") as file:
            keys = [key for key in file.keys() if key.partition(".")[0] in parts]  # noqa: SIM118  (no mapping)
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(_wrong_kind(Path(source), error)) from None


def _parts_of(source: str | Path | Mapping[str, Any]) -> list[str]:
    """Return the parts that a file of ours, or a mapping of its tensors, holds."""
    if isinstance(source, Mapping):
        return sorted({key.partition(".")[0] for key in source})
    with safe_open(source, framework="pt") as file:
        return sorted({key.partition(".")[0] for key in file.keys()})  # noqa: SIM118  (no mapping)


def _published(path: str | Path | Mapping[str, Any], layout: str, branch: str) -> dict[str, Tensor]:
    """Return the tensors of a published file, or of what it holds, under our names."""
    read = catalogue.get(layout).read
    if isinstance(path, Mapping):
        return read(path, source="the mapping", branch=branch)
    source = _existing(path)
    try:
        with torch.serialization.safe_globals(catalogue.SAFE_GLOBALS):
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are no checkpoints
        reason = _reason(error)
        raise ValueError(f"{source} is no PyTorch checkpoint that loads without running code: {reason}") from None
    return read(checkpoint, source=str(source), branch=branch)


def _reason(error: Exception) -> str:
    """Return the reason of an error, without PyTorch's advice to load the file in a way that may run code in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not re.search("weights_only|still be loaded|Check the documentation", line)]
    return re.split(r"\.? Please use ", lines[0])[0] if lines else type(error).__name__


def _existing(path: str | Path) -> Path:
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"there is no weight file {source}")
    return source


def _wrong_kind(source: Path, error: SafetensorError) -> str:
    with source.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return (
            f"{source} is a PyTorch pickle, not a safetensors file; give the encoder.safetensors of a run, or for a "
            f"published checkpoint its layout ({', '.join(catalogue.LAYOUTS)})"
        )
    return f"{source} is not a whole safetensors file ({error}); it was cut off or is of another kind: copy it again"
