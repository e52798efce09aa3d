"""Take the recorded ten steps again and say which losses moved: `python -m tests.record [METHOD ...] [--write]`."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, as in the tests
TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS / "methods"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import torch  # noqa: E402
from recorded_steps import GOLDEN, TenSteps, read_recorded, recorded_file, take  # noqa: E402

DIGITS = 6


def main(arguments: Sequence[str] | None = None, *, folder: Path = GOLDEN, every: Sequence[TenSteps] = ()) -> None:
    """Print a line for each loss that moved; with `--write`, replace the files in which one did."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.record",
        description="Take the ten recorded steps of tiny configurations again and print which losses moved by how much."
        " CONTRIBUTING.md says when they may be recorded anew.",
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="configurations, such as kaf_tiny; default: all")
    parser.add_argument(
        "--write",
        action="store_true",
        help="replace the files in golden of the named configurations whose losses moved",
    )
    chosen = parser.parse_args(arguments)
    if chosen.write and not chosen.methods:
        parser.error("--write replaces recorded losses; name the configurations that it may replace")
    steps = {one.name: one for one in every or find_steps()}
    if unknown := sorted(set(chosen.methods) - steps.keys()):
        parser.error(f"no ten steps are recorded of {', '.join(unknown)}; allowed are {', '.join(sorted(steps))}")
    moved = [name for name in chosen.methods or sorted(steps) if record(steps[name], folder, write=chosen.write)]
    if moved and not chosen.write:
        print(f"nothing was written; {parser.prog} {' '.join(moved)} --write replaces what is recorded")


def find_steps() -> list[TenSteps]:
    """Return the `TEN_STEPS` of all tests of tiny configurations."""
    files = sorted((TESTS / "methods").glob("test_*_configs.py"))
    return [importlib.import_module(file.stem).TEN_STEPS for file in files]


def record(steps: TenSteps, folder: Path, *, write: bool) -> bool:
    """Take the steps, print what moved and return whether anything did."""
    recorded = read_recorded(steps.name, folder)
    terms = recorded["terms"]
    losses = [[round(loss, DIGITS) for loss in row] for row in take(steps, terms)]
    if losses == recorded["losses"]:
        print(f"{steps.name}: no loss moved")
        return False
    print(f"{steps.name}:")
    if recorded["losses"]:
        columns = zip(*losses, strict=True), zip(*recorded["losses"], strict=True)
        for term, found, expected in zip(terms, *columns, strict=True):
            print(f"  {term}: {difference(found, expected, steps)}")
    else:
        print("  not recorded before")
    if write:
        write_losses(recorded_file(steps.name, folder), terms, losses)
    return True


def difference(found: Sequence[float], expected: Sequence[float], steps: TenSteps) -> str:
    """Return in words how far the losses of a term are from the recorded ones."""
    distances = [abs(new - old) for new, old in zip(found, expected, strict=True)]
    relative = [d / abs(old) if old else float(d > 0) for d, old in zip(distances, expected, strict=True)]
    if not any(distances):
        return "did not move"
    allowed = all(d <= max(steps.abs or 0, steps.rel * abs(old)) for d, old in zip(distances, expected, strict=True))
    step = max(range(len(distances)), key=distances.__getitem__)
    return (
        f"moved by up to {max(distances):.3g} (step {step}: {expected[step]:g} -> {found[step]:g}), relatively by up to"
        f" {max(relative):.3g}; its test {'allows that' if allowed else 'FAILS'}"
    )


def write_losses(file: Path, terms: Sequence[str], losses: Sequence[Sequence[float]]) -> None:
    """Write the losses of a configuration, a step a line."""
    version, kind = ".".join(torch.__version__.split(".")[:2]), torch.backends.cpu.get_cpu_capability()
    rows = ",\n".join(f"    {json.dumps(row)}" for row in losses)
    head = {"recipe": f"python -m tests.record, torch {version} on a CPU with {kind}, one thread", "terms": list(terms)}
    lines = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    file.write_text(f'{{\n{lines}  "losses": [\n{rows}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
