"""The names that `medssl` gives away, and what importing them costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import medssl

ROOT = Path(__file__).parent.parent
SOURCE = Path(medssl.__file__)


def test_every_name_is_there_and_comes_from_where_it_is_said_to():
    for name, home in medssl._HOME.items():
        found = getattr(medssl, name)
        assert found.__name__ == name
        assert found.__module__.startswith(home)
        assert getattr(sys.modules[home], name) is found


def test_type_checkers_see_the_same_names():
    tree = ast.parse(SOURCE.read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    assert seen == medssl._HOME
    assert sorted(medssl.__all__) == sorted({"__version__", *seen})


def test_the_page_lists_every_name_and_no_other():
    table = (ROOT / "docs" / "your-own-loop.md").read_text().split("## Names")[1].split("\n## ")[0]
    listed = re.findall(r"`(\w+)`", table)
    assert sorted(listed) == sorted(medssl._HOME)


def test_importing_the_package_loads_neither_torch_nor_lightning():
    script = (
        "import sys, medssl; heavy = {'torch', 'lightning', 'numpy', 'hydra', 'omegaconf'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "assert medssl.methods.__name__ == 'medssl.methods'; assert not heavy & set(sys.modules); "
        "print(medssl.methods.macl.MACL is medssl.MACL, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_every_room_gives_its_modules():
    rooms = [folder.parent for folder in SOURCE.parent.glob("*/__init__.py")]
    assert len(rooms) > 10
    for room in rooms:
        listed = dir(getattr(medssl, room.name))
        assert {file.stem for file in room.glob("*.py")} - {"__init__"} <= set(listed)
        assert room.name in dir(medssl)


def test_a_name_that_does_not_exist_is_told_with_the_nearest():
    with pytest.raises(AttributeError, match="module 'medssl' has no attribute 'GLMea'; did you mean 'GLMAE'"):
        _ = medssl.GLMea
    with pytest.raises(AttributeError, match=r"'medssl\.losses' has no attribute 'instanec'; did you mean 'instance'"):
        _ = medssl.losses.instanec
    assert not hasattr(medssl, "__wrapped__")
