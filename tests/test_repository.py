"""What holds of the files themselves: which room imports which, how long a file is, what it calls other modules."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from medssl.moved import MODULES, NAMES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "medssl"
MOST_LINES = 400
TEXTS = ("src", "configs", "tests", "scripts", "docs", ".ci", "*.md", "pyproject.toml", "Makefile")
"""Folders and files that name modules."""
EARLIER = ROOT / "tests" / "earlier"
"""Files that an earlier version wrote; they keep its names."""
LAYERS = (
    ("compare", "derive", "features", "finetune", "match", "predict", "prepare", "pretrain", "probe"),  # commands
    ("segmentation", "tables", "probing"),
    ("extraction", "training"),
    ("inference", "run", "evaluation", "methods", "weights"),
    ("layouts", "models", "losses"),
    ("ops", "building", "config"),
    ("checks", "moved", "launcher", "paths", "threads"),
)
"""Rooms and files of `src/medssl`, from the top down. Each imports lower layers, never its own or a higher one."""
FREE = {"lazy": ("lazy",), "data": ("data", "lazy"), "phantoms": ("data", "lazy", "phantoms")}
"""Rooms and files that every layer may import, and all that they import themselves."""


def imported_rooms(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and room of every import of medssl, also in functions and under `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides the room; name it in full"
            whole = node.module or ""
            names = [f"medssl.{alias.name}" for alias in node.names] if whole == "medssl" else [whole]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "medssl":
                yield node.lineno, rest.partition(".")[0]


def allowed_rooms(room: str) -> set[str]:
    """Return the rooms that may be imported in `room`."""
    if room in FREE:
        return set(FREE[room])
    layer = next(number for number, rooms in enumerate(LAYERS) if room in rooms)
    return {room, *FREE, *(lower for rooms in LAYERS[layer + 1 :] for lower in rooms)}


def rooms() -> set[str]:
    """Return all rooms (folders) and single files of the package."""
    return {path.stem for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__", "configs")}


def test_every_room_has_a_layer():
    layers = [room for layer in LAYERS for room in layer]
    assert len(layers) == len(set(layers))
    assert not (rooms() - {*layers, *FREE}), "give the new room or file its place in LAYERS"


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_point_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    allowed = allowed_rooms(room)
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports medssl.{other}"
        for file in files
        for line, other in imported_rooms(file.read_text())
        if other not in allowed
    ]
    assert not wrong, f"{wrong}; {room} may import {', '.join(sorted(allowed))}"


def test_an_import_counts_wherever_it_stands():
    text = """
import medssl.data.store
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from medssl.training.fit import fit
def late():
    from medssl import config, load_encoder
    import medssl
"""
    assert list(imported_rooms(text)) == [(2, "data"), (5, "training"), (7, "config"), (7, "load_encoder"), (8, "")]
    assert "load_encoder" not in allowed_rooms("segmentation")
    assert "training" in allowed_rooms("segmentation")
    assert "extraction" not in allowed_rooms("training")
    assert allowed_rooms("data") == {"data", "lazy"}


@pytest.mark.parametrize("folder", ["src", "tests", "scripts"])
def test_no_file_is_longer_than_400_lines(folder):
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")
    }
    assert not {file: lines for file, lines in lengths.items() if lines > MOST_LINES}


def old_paths() -> re.Pattern[str]:
    """Match a place that a module or class has left: dotted, as an import or as a file.

    A bare `data/NAME` may be a configuration of `configs/data`, so a file counts with its ending or its package.
    """
    moved = [((room, file), "") for room, files in MODULES.items() for file in files]
    moved += [((room, file), name) for (room, file), names in NAMES.items() for name in names]
    places = [r"medssl/layouts\.py"]  # a folder now
    for (room, file), name in moved:
        *parents, last = [part for part in ("medssl", room, file, name) if part]
        package = r"\.".join(parents)
        places += [rf"{package}\.{last}\b", rf"from {package} import [^\n]*\b{last}\b"]
        if not name:
            places += [rf"{'/'.join(parents)}/{last}\b", rf"\b{room}/{file}\.py\b"]
    return re.compile("|".join(places))


def test_no_text_names_a_place_that_a_module_has_left():
    pattern, texts = old_paths(), [path for name in TEXTS for path in ROOT.glob(name)]
    files = [file for text in texts for file in (text.rglob("*") if text.is_dir() else [text]) if file.is_file()]
    wrong = [
        f"{file.relative_to(ROOT)}:{number} {found[0]}"
        for file in files
        if file.suffix not in (".png", ".pyc") and EARLIER not in file.parents
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if "medssl" in line or ".py" in line
        for found in pattern.finditer(line)
    ]
    assert len(files) > 300
    assert not wrong


def test_a_place_that_was_left_is_found_in_every_spelling():
    room, file = next((room, file) for room, files in MODULES.items() for file in files if room)
    home, module = "data", "cases"
    pattern, name = old_paths(), next(iter(NAMES[home, module]))
    for old in (
        ".".join(("medssl", room, file)),
        f"from medssl.{room} import other, {file}",
        f"{room}/{file}" + ".py",
        "/".join(("src", "medssl", room, file)),
        "/".join(("medssl", "layouts")) + ".py",
        f"from medssl.{home}.{module} import Case, {name}",
    ):
        assert pattern.search(old), old
    for now in (f"medssl.{MODULES[room][file]}", f"medssl.{home}.{module}.Case", "configs/data/phantoms.yaml"):
        assert not pattern.search(now), now


def test_no_class_name_stands_in_two_files():
    homes = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(file.relative_to(PACKAGE))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_texts_for_users_are_free_of_the_words_that_we_do_not_use():
    words = re.compile(r"\b(wants|made anew|goes on|by itself|likewise|mend|dear)\b")
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    lines = ((file, line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    assert not [f"{file.name}: {line.strip()}" for file, line in lines if words.search(line)]


def texts_without_encoding(text: str) -> Iterator[int]:
    """Yield the line of every call that reads or writes text in the encoding of the machine's language."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        called = node.func.attr if is_method else getattr(node.func, "id", "")
        given = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        modes = [str(one.value) for one in given if isinstance(one, ast.Constant)]
        opens = called == "open" and (not node.args or any(re.fullmatch(r"[rwax]t?\+?", mode) for mode in modes))
        if opens or (is_method and called in ("read_text", "write_text")):
            yield node.lineno


@pytest.mark.parametrize("room", sorted(rooms()))
def test_texts_are_read_and_written_as_utf_8_whatever_the_language_of_the_machine(room):
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    found = {str(file): list(texts_without_encoding(file.read_text(encoding="utf-8"))) for file in files}
    assert not {file: lines for file, lines in found.items() if lines}, 'give encoding="utf-8"'


def test_a_text_without_an_encoding_is_found_in_every_spelling():
    text = """
path.read_text()
path.write_text(text)
path.open()
path.open("w", newline="")
open(path, "a")
path.open(mode="r")
path.open("rb")
write_text(path, text)
path.read_text(encoding="utf-8")
store.open(case, "0")
"""
    assert list(texts_without_encoding(text)) == [2, 3, 4, 5, 6, 7]
