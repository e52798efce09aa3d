"""The start of a segmentation run: a network from a preset or a file's card, with or without the file's weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from medssl.building import NETWORKS
from medssl.checks import choice
from medssl.config import config_dir, with_values
from medssl.models.segmenter import Segmenter, names_of_blocks, segmentation_recipe
from medssl.weights import card_of, describe_loading, encoder_recipe, load_parts

BRANCHES = ("student", "teacher")
DECODERS = ("all", "trained", "none")
PRESET = "unet"
"""The network of a run that neither states one nor starts from a file."""


@dataclass(frozen=True)
class Initial:
    """The file that a run starts from, and the network that it builds.

    Args:
        path: The file; None from scratch.
        card: Its card.
        layout: The layout of a published file.
        branch: `student` or `teacher`.
        model: Recipes of the network, as in the group `model`; entries that follow from the data are not resolved.
        decoder: The part of the file's decoder that is taken: `all`, the blocks that pre-training `trained`, or `none`.
    """

    path: Path | None
    card: dict[str, Any] | None
    layout: str | None
    branch: str
    model: Mapping[str, Any]
    decoder: str = "all"

    @property
    def name(self) -> str:
        """The name of the file in tables: method, length, data and settings of its training, or `scratch`."""
        if self.card is None:
            return "scratch"
        method = self.layout or str(self.card.get("method", "?")).rpartition(".")[2].lower()
        data, step = self.card.get("data", {}), self.card.get("step")
        details = [f"{step} steps"] if step is not None else []
        details += [f"{data['num_cases']} volumes of {data['name']}"] if "num_cases" in data else []
        details += [self.branch] if self.branch != "student" else []
        details += [f"decoder: {self.decoder}"] if self.decoder != "all" else []
        mark = f" [{self.card['training']}]" if "training" in self.card else ""
        return (f"{method} ({', '.join(details)})" if details else method) + mark

    def completed(self, config: DictConfig) -> DictConfig:
        """Return a copy of a configuration in which `model` is the network that is built."""
        return with_values(config, {"model": self.model})


def find_initial(config: DictConfig) -> Initial:
    """Read the cards that the settings name, and find the network that they describe.

    A network that is neither stated nor described by a file is the preset `unet`.

    Raises:
        ValueError: A file cannot be read, or a choice does not exist.
    """
    branch = choice("weights.branch", config.weights.branch, BRANCHES)
    layout = config.weights.layout
    path = None if config.weights.path is None else Path(config.weights.path).expanduser()
    card = None if path is None else card_of(path, layout=layout, branch=branch)
    usual = (card or {}).get("decoder_part", "all")
    decoder = choice("weights.decoder", config.weights.decoder, (None, *DECODERS)) or usual
    if card is not None and decoder == "trained" and "decoder_blocks" not in card:
        raise ValueError(
            f"weights.decoder=trained: {path} does not say which blocks of a decoder were trained; give all or none"
        )
    model: dict[str, Any] = OmegaConf.to_container(config.model, resolve=False)  # type: ignore[assignment]
    like = config.model.get("like")
    if model.get("encoder") is None and like is not None:
        model = _network_of(
            Path(like).expanduser(), model, layout=layout, branch=branch, allow_modules=config.allow_modules
        )
    elif model.get("encoder") is None:
        if model.get("keypoints") is not None:
            raise ValueError(
                "model.keypoints needs a network that has them; give weights=FILE, or a model that has them, too"
            )
        preset = OmegaConf.load(config_dir() / "model" / f"{PRESET}.yaml")
        model = OmegaConf.to_container(preset, resolve=False)  # type: ignore[assignment]
    return Initial(path, card, layout, branch, model, decoder)


def _network_of(
    like: Path, model: Mapping[str, Any], *, layout: str | None, branch: str, allow_modules: Sequence[str]
) -> dict[str, Any]:
    """Return the recipes of a file's network; further entries of `model` replace those of the file."""
    encoder = encoder_recipe(like, layout=layout, branch=branch)
    wishes: dict[str, Any] = {"spatial_dims": 3} if encoder.get("spatial_dims") == 2 else {}  # volumes are segmented
    if (keypoints := model.get("keypoints")) is not None:
        wishes["keypoints"] = keypoints
    if wishes:
        encoder = segmentation_recipe(
            encoder, packages=(*NETWORKS, *allow_modules), where=f"the network of {like}", **wishes
        )
    card = card_of(like, layout=layout, branch=branch)
    takes_decoder = model.get("decoder") is None and "decoder" in transferred(card)
    return {**model, "encoder": encoder, **({"decoder": card["decoder"]} if takes_decoder else {})}


def transferred(card: Mapping[str, Any]) -> list[str]:
    """Return the parts of a file that a segmenter starts from: both parts of a segmenter, else those in the card."""
    return ["encoder", "decoder"] if card.get("kind") == "segmenter" else list(card.get("transfers", ["encoder"]))


def load_initial(initial: Initial, segmenter: Segmenter) -> list[str]:
    """Load the parts that the file has for this network, with all of their tensors, and return lines for the user.

    The encoder is always loaded. The decoder is loaded if the file has one for segmenters and of the same class, or
    only those of its blocks that were trained. The head starts from scratch.

    Raises:
        ValueError: Tensors do not match, and nothing was loaded.
    """
    if initial.path is None or initial.card is None:
        return ["weights: none, the network starts from scratch"]
    parts, kind = {"encoder": segmenter.encoder}, type(segmenter.decoder)
    stated = initial.card["decoder"]["_target_"] if "decoder" in transferred(initial.card) else None
    if stated == f"{kind.__module__}.{kind.__qualname__}" and initial.decoder != "none":
        parts["decoder"] = segmenter.decoder
    takes_part = initial.decoder == "trained" and "decoder" in parts
    fresh = {name: tensor.clone() for name, tensor in segmenter.decoder.state_dict().items()} if takes_part else {}
    reports = load_parts(initial.path, parts, layout=initial.layout, branch=initial.branch)
    fresh_parts = [part for part in segmenter.parts() if part not in parts]
    lines = [f"weights: {initial.path}", describe_loading(reports, fresh_parts)]
    if takes_part:
        num_blocks = initial.card["decoder_blocks"]
        idle = fresh.keys() - names_of_blocks(segmenter.decoder, num_blocks)
        segmenter.decoder.load_state_dict(segmenter.decoder.state_dict() | {name: fresh[name] for name in idle})
        lines.append(f"of the decoder the first {num_blocks} blocks; {len(idle)} other tensors start from scratch")
    return lines
