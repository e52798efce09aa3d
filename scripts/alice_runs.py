"""Does a short training of Alice learn without collapsing? `alice_tiny` on phantoms and on the hippocampus volumes.

Phantoms (synthetic) get their pairs from an anatomical embedding that is trained first, on the same subjects
(`sam_phantoms.py`, `derive what=pairs`); the hippocampus volumes, too small for one, by body coordinates, and are then
segmented with few labels (`label_efficiency.py`).

    python scripts/alice_runs.py --output runs/alice                                    # phantoms alone
    python scripts/alice_runs.py --output runs/alice --root /data/Task04_Hippocampus    # both

Prints each loss over the first and the last steps, and what tells a collapse. Exits with 1 where a loss has not fallen
or the teacher lies below the floors of docs/methods/alice.md. Finished runs are kept.
"""

import argparse
import csv
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean

from omegaconf import OmegaConf

WINDOW = 20  # steps at either end that are averaged
TERMS = ("loss", "inter_volume", "intra_volume", "reconstruction")
TWINS_LR = 3e-3  # better of 1e-3 and 3e-3 for nnFormer from scratch: 150 steps, other seed, untested cases
ENTROPY_FLOOR, STD_FLOOR = 0.25, 0.1  # of ln(prototypes); of the spread that even directions have


def command(*words: str) -> None:
    """Run Python with these words and show them."""
    print("$ python", " ".join(words), flush=True)
    subprocess.run([sys.executable, *words], check=True)


def on_phantoms(output: Path, *, steps: int, further: list[str]) -> list[Path]:
    """The folder of a run on pairs that an embedding of its own mined."""
    sam, run = output / "sam", output / "phantoms"
    if not (run / "encoder.safetensors").is_file():
        command(str(Path(__file__).with_name("sam_phantoms.py")), "--output", str(sam))  # ends here if it finds nothing
        weights, store = next(sam.glob("ellipsoids-*/encoder.safetensors")), sam / "store-ellipsoids"
        command("-m", "medssl.derive", "what=pairs", f"weights={weights}", f"store={store}")
        pairs = ["views.groups.pair.matcher._target_=medssl.data.matching.TableMatcher", "sampler.partner=linked"]
        where = ["data=store", "data.split=5fold", f"store={store}", f"output_dir={run}", "overwrite=true"]
        budget = [f"trainer.max_steps={steps}", "validate_every=null", *further]
        command("-m", "medssl.pretrain", "method=alice_tiny", *pairs, *where, *budget)
    return [run]


def on_hippocampus(output: Path, root: Path, *, steps: int, further: list[str]) -> list[Path]:
    """The folders of the pre-trainings behind the comparison with few labels."""
    script = str(Path(__file__).with_name("label_efficiency.py"))
    where = ["--root", str(root), "--output", str(output), "--method", "alice_tiny"]
    command(script, *where, "--twins", f"optimizer.lr={TWINS_LR}", "--pretrain", f"trainer.max_steps={steps}", *further)
    return sorted(output.glob("alice_tiny-seed*"))


def report(run: Path) -> bool:
    """Print the curves of a run in a few numbers; whether they fall and stay above the floors."""
    with (run / "metrics.csv").open() as file:
        rows = [{name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)]
    prototypes = OmegaConf.load(run / "config.yaml").method.head.num_prototypes
    floors = {"entropy_teacher_mean": ENTROPY_FLOOR * math.log(prototypes), "feature_std": STD_FLOOR}
    print(f"\n{run.name}: {len(rows)} steps, means of the first and the last {WINDOW}")
    good = []
    for name in (*TERMS, *floors, "entropy_teacher", "entropy_tokens_mean", "accuracy"):
        first, last = (mean(row[name] for row in some) for some in (rows[:WINDOW], rows[-WINDOW:]))
        verdict = ""
        if name in TERMS or name in floors:
            good.append(last > floors[name] if name in floors else last < first)
            verdict = f"{f'floor {floors[name]:.2f}' if name in floors else 'falls':12} {'ok' if good[-1] else 'NO'}"
        print(f"{name:22}{first:10.3f} -> {last:7.3f}   {verdict}")
    return all(good)


def main() -> int:
    """Run what is missing, then look at the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="folder with the dataset.json of Task04_Hippocampus")
    parser.add_argument("--steps", type=int, default=200, help="of alice_tiny")
    parser.add_argument("--pretrain", nargs="*", default=[], help="further KEY=VALUE of medssl.pretrain for alice_tiny")
    options = parser.parse_args()
    runs = on_phantoms(options.output, steps=options.steps, further=options.pretrain)
    if options.root is not None:
        runs += on_hippocampus(
            options.output / "hippocampus", options.root, steps=options.steps, further=options.pretrain
        )
    return int(not all([report(run) for run in runs]))


if __name__ == "__main__":
    raise SystemExit(main())
