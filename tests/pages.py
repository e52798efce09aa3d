"""A page of the documentation, done as its reader does it: files written, commands run, Python run, in order.

A line that holds nothing but a file name in backquotes stands above the block with that file's text. A block of bash
holds commands; a block of Python without a file name above it is run as a program. All other blocks are to be read.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^(?:`(?P<file>[\w./-]+)`\n\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Step:
    """A file to write (`file` with its `text`), a command, or a program."""

    kind: str
    text: str
    file: str = ""


def steps(page: str) -> Iterator[Step]:
    """The steps of a page, in order; a command that goes over several lines is one."""
    for block in BLOCK.finditer((DOCS / page).read_text()):
        file, kind, text = block["file"], block["kind"], block["text"]
        if file:
            yield Step("file", text, file)
        elif kind == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield Step("command", line)
        elif kind == "python":
            yield Step("program", text)


def follow(page: str, folder: Path) -> int:
    """Do all steps of a page in an empty folder, each command and program in its own process; return their number."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = [step for step in steps(page) if not _written(step, folder)]
    for step in done:
        call = ["bash", "-c", step.text] if step.kind == "command" else [sys.executable, "-c", step.text]
        ended = subprocess.run(
            call, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, f"{page}: {step.text}\n{ended.stdout}\n{ended.stderr}"
    return len(done)


def follow_here(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Do all steps of a page in an empty folder, commands and programs in this process; return their number."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    done = [step for step in steps(page) if not _written(step, folder)]
    try:
        for step in done:
            if step.kind == "program":
                exec(compile(step.text, page, "exec"), {"__name__": "__main__"})
                continue
            python, _, module, *words = shlex.split(step.text)
            assert python == "python"
            monkeypatch.setattr(sys, "argv", [module, *words])
            monkeypatch.delitem(sys.modules, module, raising=False)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        for name in set(sys.modules) - known:
            if folder in Path(getattr(sys.modules[name], "__file__", None) or "/").resolve().parents:
                del sys.modules[name]
    return len(done)


def _written(step: Step, folder: Path) -> bool:
    """Write the file of a step; return whether it has one."""
    if not step.file:
        return False
    target = folder / step.file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(step.text)
    return True
