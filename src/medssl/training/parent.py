"""The file whose networks a pre-training run starts from, which its own card then names as its parent."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medssl.checks import choice
from medssl.methods.base import Method
from medssl.methods.build import axes_of, same_axes
from medssl.weights import axes_in, card_of, describe_loading, load_parts

BRANCHES = ("student", "teacher")


@dataclass(frozen=True)
class Parent:
    """The file that a run starts from.

    Args:
        path: The file.
        card: Its card.
        layout: The layout of a published file; None for ours.
        branch: `student` or `teacher`.
        parts: The networks that are taken: `encoder`, or more of those that the method exports.
    """

    path: Path
    card: Mapping[str, Any]
    layout: str | None
    branch: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Parent | None":
        """Return the file that the settings `weights` name; None where they name none.

        Raises:
            ValueError: The file cannot be read, or a choice does not exist.
        """
        branch = choice("weights.branch", settings["branch"], BRANCHES)
        parts = settings["parts"]
        if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"weights.parts takes names of networks such as [encoder]; got {parts!r}")
        if settings["path"] is None:
            return None
        path = Path(settings["path"]).expanduser()
        card = card_of(path, layout=settings["layout"], branch=branch)
        return cls(path, card, settings["layout"], branch, tuple(parts))

    @property
    def axes(self) -> str | None:
        """Axes that the encoder of the file was trained with; None for an unknown encoder."""
        return axes_in(self.card)

    def load(self, method: Method) -> list[str]:
        """Load the networks into a method that was just built, and return lines for the user.

        Networks that start as copies become copies again, but those that `parts` names keep what the
        file has for them. The lines say what was loaded, what was copied from it, and every other network with weights.

        Raises:
            ValueError: The method has no such network, or tensors do not match, and nothing was loaded.
        """
        assert self.axes is None or same_axes(axes_of(method.encoder), self.axes), "see `method_along`"
        own = method.parts()
        if unknown := [part for part in self.parts if part not in own]:
            raise ValueError(f"weights.parts names {', '.join(unknown)}; {type(method).__name__} has {', '.join(own)}")
        wanted = {part: own[part] for part in self.parts}
        try:
            reports = load_parts(self.path, wanted, layout=self.layout, branch=self.branch)
        except ValueError as error:
            raise ValueError(f"{error}{self._advice(own['encoder'])}") from error
        loaded = {id(tensor) for part in wanted.values() for tensor in _tensors(part).values()}
        copied: set[int] = set()
        for copy, original in method.copies_of_encoder():
            held, source = _tensors(copy), _tensors(original)
            kept = {name for name, tensor in held.items() if id(tensor) in loaded}
            copy.load_state_dict({name: (held if name in kept else source)[name] for name in held})
            copied |= {id(held[name]) for name in held.keys() - kept if id(source[name]) in loaded}
        networks = {name: {id(one) for one in part.parameters()} for name, part in own.items()}
        networks |= _others(method, set().union(*networks.values()))
        fresh = [name for name, tensors in networks.items() if tensors - loaded - copied]
        copies = [name for name, tensors in networks.items() if name not in fresh and tensors & copied]
        lines = [f"weights: {self.path}", describe_loading(reports, fresh, copied=copies)]
        if (axes := axes_of(method.encoder)) != "xyz":
            lines.append(f"axes: {axes}, those of the file; images are turned for the encoder")
        return lines

    def _advice(self, encoder: nn.Module) -> str:
        held, own = str(self.card.get("encoder", {}).get("_target_", "")).rpartition(".")[2], type(encoder).__name__
        return f"; the file holds a {held}, the method trains a {own}" if held and held != own else ""

    def entries(self) -> dict[str, Any]:
        """Return what the card of a run says of its parent."""
        facts = {name: self.card[name] for name in ("method", "training", "step", "parent") if name in self.card}
        layout = {} if self.layout is None else {"layout": self.layout}
        data = self.card.get("data", {}).get("name")
        return {
            "file": self.path.name,
            "parts": list(self.parts),
            **layout,
            **facts,
            **({"data": data} if data else {}),
        }

    @property
    def voxel_hashes(self) -> list[str] | None:
        """Hashes of the volumes that the networks have seen; None where the card does not say."""
        return self.card.get("data", {}).get("voxel_hashes")


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the very tensors of a network, by name."""
    return network.state_dict(keep_vars=True)


def _others(module: nn.Module, taken: set[int], prefix: str = "") -> dict[str, set[int]]:
    """Return the largest networks inside a module that hold no taken parameter, by name, as sets of parameters."""
    own = module.named_parameters(recurse=False)
    found = {f"{prefix}{name}": {id(one)} for name, one in own if id(one) not in taken}
    for name, child in module.named_children():
        held = {id(one) for one in child.parameters()}
        if held & taken:
            found |= _others(child, taken, f"{prefix}{name}.")
        elif held:
            found[f"{prefix}{name}"] = held
    return found
