"""Trained networks as files: tensors of named parts and a card, in one safetensors file.

The card (JSON in the header) says how to rebuild the encoder and how its images were read. No code runs on load.
"""

import importlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medssl import layouts
from medssl.models.reoriented import Reoriented

FORMAT = 1
TRUSTED = ("medssl.models", "monai.networks")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of one part."""

    part: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ill_shaped: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every tensor of the part came from the file, and every one of the file was used."""
        return not (self.missing or self.unexpected or self.ill_shaped)

    def __str__(self) -> str:
        names = {"missing": self.missing, "unexpected": self.unexpected}
        names |= {"of another shape": self.ill_shaped, "reshaped": self.reshaped}
        details = [
            f"{len(some)} {what} ({', '.join(some[:4])}{', ...' if some[4:] else ''})"
            for what, some in names.items()
            if some
        ]
        return f"{self.part}: {', '.join([f'{len(self.matched)} tensors matched', *details])}"


def save_weights(path: str | Path, parts: Mapping[str, nn.Module], card: Mapping[str, Any]) -> None:
    """Write the tensors of `parts` as `part.tensor` and `card` into `path`; equal input gives equal bytes.

    The file appears at once or not at all. Wrappers of compiled modules leave no trace in the names.
    """
    target = Path(path)
    tensors = {
        f"{part}.{name.replace('_orig_mod.', '')}": tensor.detach().cpu().contiguous().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    header = json.dumps({**card, "format": FORMAT}, sort_keys=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # what the user's umask allows; safetensors would close the file to others
    save_file(tensors, partial, metadata={"card": header})
    partial.chmod(mode)
    partial.replace(target)


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a file written by `save_weights`.

    Raises:
        ValueError: the file is missing, broken, of another kind, or has no card that this version reads.
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
    if found != FORMAT:
        raise ValueError(f"{source} has format {found}, this version reads {FORMAT}; update medssl")
    return card


def load_encoder(
    path: str | Path, *, layout: str | None = None, branch: str = "student", allow_modules: Sequence[str] = ()
) -> nn.Module:
    """The pre-trained encoder in evaluation mode: `forward(x)` gives feature maps described by `channels`, `strides`.

    Args:
        path: a file of ours, or with `layout` a published checkpoint of that layout.
        layout: None or a name in `medssl.layouts.LAYOUTS`.
        branch: `student`, or `teacher` where the file holds one.
        allow_modules: packages besides `medssl.models` and `monai.networks` whose classes a card may name.

    Raises:
        ValueError: wrong file, unknown layout or branch, a class that is not allowed, or weights that do not fit.
    """
    if layout is None:
        card = read_card(path)
    else:
        card = layouts.infer_card(_published(path, layout, branch), source=str(path), layout=layout)
    if "encoder" not in card:
        raise ValueError(f"the card of {path} does not describe an encoder; its keys are {sorted(card)}")
    encoder = build_network(card["encoder"], allow_modules=allow_modules)
    load_parts(path, {"encoder": encoder}, layout=layout, branch=branch)
    axes = card.get("input_axes", "xyz")
    return (encoder if axes == "xyz" else Reoriented(encoder, axes=axes)).eval()


def load_parts(
    path: str | Path,
    parts: Mapping[str, nn.Module],
    *,
    layout: str | None = None,
    branch: str = "student",
    partial: bool = False,
) -> list[LoadReport]:
    """Load the named parts of a file into modules of the same names, all tensors or none.

    Modules with an `adapt` method may resize what they know how to resize (position tables, input channels); that is
    reported. `partial=True` lets missing, unexpected and ill-shaped tensors pass; the report then lists them.

    Raises:
        ValueError: wrong file, a part that the file does not hold, or tensors that do not match.
    """
    prefix = f"{branch}_" if layout is None and branch != "student" else ""
    wanted = [f"{prefix}{part}" for part in parts]
    tensors = _own(path, wanted) if layout is None else _published(path, layout, branch)
    reports, accepted = [], []
    for name, (part, module) in zip(wanted, parts.items(), strict=True):
        stored = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if not stored:
            held = _parts_of(path) if layout is None else sorted({key.partition(".")[0] for key in tensors})
            raise ValueError(f"{path} holds no part `{name}`; it holds {', '.join(held)}")
        report, fitting = _compare(part, module, stored)
        reports.append(report)
        accepted.append((module, fitting))
        log.info("%s: %s", path, report)
    wrong = [str(report) for report in reports if not report.fits]
    if wrong and not partial:
        raise ValueError(f"{path} does not fit; nothing was loaded. {'; '.join(wrong)}")
    for module, fitting in accepted:
        module.load_state_dict(fitting, strict=not partial)
    return reports


def build_network(recipe: Mapping[str, Any], *, allow_modules: Sequence[str] = ()) -> nn.Module:
    """Build the network that a card describes: `_target_` names a class, the other entries are its keywords.

    Raises:
        ValueError: the class is not in a trusted or allowed package, is no network, or refuses its keywords.
    """
    keywords = {
        key: build_network(value, allow_modules=allow_modules)
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for key, value in recipe.items()
        if key != "_target_"
    }
    target = str(recipe.get("_target_"))
    package, _, name = target.rpartition(".")
    allowed = (*TRUSTED, *allow_modules)
    if not any(package == root or package.startswith(f"{root}.") for root in allowed):
        raise ValueError(
            f"the card names the class {target}, which is outside {', '.join(allowed)}; if you trust the file, pass "
            f"allow_modules=[{package!r}]"
        )
    try:
        network = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the card names the class {target}, which cannot be imported: {error}") from None
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise ValueError(f"the card names {target}, which is no torch.nn.Module")
    try:
        return network(**keywords)
    except TypeError as error:
        raise ValueError(f"{target} does not take what the card gives: {error}") from None


def _compare(part: str, module: nn.Module, stored: dict[str, Tensor]) -> tuple[LoadReport, dict[str, Tensor]]:
    expected = module.state_dict()
    adapted = adapt(stored) if callable(adapt := getattr(module, "adapt", None)) else stored
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
        missing=tuple(sorted(expected.keys() - adapted.keys())),
        unexpected=tuple(sorted(adapted.keys() - expected.keys())),
        ill_shaped=tuple(ill_shaped),
        reshaped=tuple(sorted(key for key in fitting if stored[key].shape != fitting[key].shape)),
    )
    return report, fitting


def _own(path: str | Path, parts: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of some parts of a file of ours; the others are not read."""
    read_card(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.partition(".")[0] in parts]  # noqa: SIM118  (no mapping)
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(_wrong_kind(Path(path), error)) from None


def _parts_of(path: str | Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return sorted({key.partition(".")[0] for key in file.keys()})  # noqa: SIM118  (no mapping)


def _published(path: str | Path, layout: str, branch: str) -> dict[str, Tensor]:
    source = _existing(path)
    read = layouts.get(layout)
    try:
        with torch.serialization.safe_globals(layouts.SAFE_GLOBALS):
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are no checkpoints
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source} is no PyTorch checkpoint that loads without running code: {reason}") from None
    return read(checkpoint, source=str(source), branch=branch)


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
            f"published checkpoint its layout ({', '.join(layouts.LAYOUTS)})"
        )
    return f"{source} is not a whole safetensors file ({error}); it was cut off or is of another kind: copy it again"
