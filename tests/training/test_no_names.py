"""The rooms that train and segment know no method and no network by name, in imports, code, comments and texts."""

import ast
import re
from pathlib import Path

import pytest

import medssl
from medssl.config import config_dir

SOURCE = Path(medssl.__file__).parent
SHARED = {"base", "build", "positions"}
"""Files of methods/ that are no method, and more than one can use."""
EVERY_NETWORK = {"Segmenter"}
"""What every network of a segmentation is: encoder, decoder and head."""


def class_names(room):
    trees = [ast.parse(file.read_text()) for file in (SOURCE / room).glob("*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def method_names():
    """Names of configurations and files, in one spelling: `glmae`, `gl-mae` and `GLMAE` are one."""
    files = {file.stem for file in (SOURCE / "methods").glob("*.py")} - SHARED - {"__init__"}
    configs = {file.stem for file in (config_dir() / "method").glob("*.yaml")}
    published = {name.partition("_")[0] for name in files | configs if not name.startswith("models_")}
    return {name.replace("_", "") for name in files | configs | published}


@pytest.mark.parametrize("room", ["training", "segmentation"])
def test_no_method_and_no_network_is_named(room):
    methods, networks = method_names(), class_names("models") - EVERY_NETWORK
    assert {"glmae", "macl", "kaf", "alice", "drasclr", "samembed", "mae", "modelsgenesis", "simclr", "voco"} <= methods
    assert {"KAFEncoder", "VisionTransformer", "ConditionedEncoder"} <= networks
    found = []
    for file in sorted((SOURCE / room).glob("*.py")):
        text = file.read_text()
        words = set(re.findall(r"[A-Za-z_]\w*", text)) | set(re.findall(r"[A-Za-z]+-[A-Za-z]+", text))
        found += [f"{file.name}: {word}" for word in words if word in networks]
        found += [f"{file.name}: {word}" for word in words if re.sub("[_-]", "", word).lower() in methods]
    assert not found


@pytest.mark.parametrize("room", ["training", "segmentation"])
def test_of_the_networks_only_what_all_have_in_common_is_imported(room):
    texts = [file.read_text() for file in (SOURCE / room).glob("*.py")]
    imported = {name for text in texts for name in re.findall(r"medssl\.models(?:\.| import )(\w+)", text)}
    assert imported <= {"segmenter"}
