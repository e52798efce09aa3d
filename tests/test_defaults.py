"""A default stands in the constructor and, for readers, in the YAML of the published run; here both are held equal."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
ROOMS = tuple(f"medssl.{room}." for room in ("methods", "models", "losses", "ops", "tables", "phantoms"))
"""Classes whose defaults are those of the published run; the classes of `medssl.data` do nothing by default."""
ON_PURPOSE = {
    ("method/models_genesis.yaml", "Reconstructor.output"): "its images lie in [0, 1], those of other methods do not",
    ("method/sam_embed.yaml", "SamResNet.base_channels"): "half of the published width",
    ("model/kaf.yaml", "KAFEncoder.strides"): "None follows from the number of levels; the file shows the numbers",
    ("model/kaf.yaml", "DifferenceOfGaussians.value_range"): "the range of windowed values, not of any image",
    ("model/resenc.yaml", "ResidualEncoder.strides"): "None follows from the number of stages",
    ("model/resenc.yaml", "UNetDecoder.convs_per_stage"): "one convolution, as in ResEnc plans; a U-Net has two",
    ("model/unet.yaml", "UNetEncoder.strides"): "None follows from the number of stages",
    ("model/unetr.yaml", "VisionTransformer.class_token"): "UNETR has none; masked autoencoders do",
    (
        "what/embeddings.yaml",
        "PairPoints.num_candidates",
    ): "more points for the online search than for a table of pairs",
    ("what/keypoints.yaml", "DifferenceOfGaussians.value_range"): "the range of windowed values, not of any image",
}
"""Options that the YAML sets to another value than the constructor, with the reason."""


def blocks(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings with a `_target_` in nested values."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from blocks(value)
    elif isinstance(node, list):
        for value in node:
            yield from blocks(value)


def plain(value: Any) -> Any:
    """A value as YAML has it: tuples are lists."""
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def stated(file: Path) -> Iterator[tuple[str, Any, Any]]:
    """Each option that a file states and whose constructor has a default: its name and both values."""
    for block in blocks(yaml.safe_load(file.read_text())):
        module, _, name = block["_target_"].rpartition(".")
        if not f"{module}.".startswith(ROOMS):
            continue
        for key, parameter in inspect.signature(getattr(importlib.import_module(module), name)).parameters.items():
            follows = isinstance(block.get(key), dict) or "${" in str(block.get(key))
            if key in block and not follows and parameter.default is not parameter.empty:
                yield f"{name}.{key}", plain(block[key]), plain(parameter.default)


def differing() -> set[tuple[str, str]]:
    """File and option wherever YAML and constructor say different things; one number for three axes is the same."""
    files = [file for folder in ("method", "model", "what") for file in (CONFIGS / folder).glob("*.yaml")]
    return {
        (str(file.relative_to(CONFIGS)), option)
        for file in files
        for option, written, default in stated(file)
        if written != default and written != [default] * 3
    }


def test_what_yaml_and_constructor_both_state_is_equal_unless_it_differs_on_purpose():
    found = differing()
    assert found - ON_PURPOSE.keys() == set(), "change both, or say here why they differ"
    assert ON_PURPOSE.keys() - found == set(), "these are equal now"


def test_enough_is_compared():
    counts = {
        folder: sum(len(list(stated(f))) for f in (CONFIGS / folder).glob("*.yaml")) for folder in ("method", "model")
    }
    assert counts["method"] > 80
    assert counts["model"] > 60


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name; lists are values."""
    if not isinstance(node, dict):
        return {path: node}
    return {name: value for key, one in node.items() for name, value in leaves(one, f"{path}.{key}").items()}


def bases() -> Iterator[tuple[Path, Path]]:
    """Each configuration that builds on another of its group, and that other one."""
    for file in CONFIGS.glob("m*/*.yaml"):
        for entry in (yaml.safe_load(file.read_text()) or {}).get("defaults", []):
            if isinstance(entry, str) and entry != "_self_":
                yield file, file.with_name(f"{entry}.yaml")


@pytest.mark.parametrize(("variant", "base"), sorted(bases()), ids=lambda file: file.stem)
def test_a_variant_states_only_what_it_changes(variant, base):
    own, below = (leaves(yaml.safe_load(file.read_text())) for file in (variant, base))
    repeated = [name for name, value in own.items() if name != ".defaults" and below.get(name, ...) == value]
    assert repeated == []
