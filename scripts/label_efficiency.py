"""Does pre-training pay with few labels? The hippocampus protocol: 100 volumes train, few of them with labels; 60 test.

Pre-trains a method on the 100 training volumes, fine-tunes its network on `--labelled` of them, trains the same network
and a U-Net from scratch on the very same, with three seeds each, and compares all runs on the 60 test volumes.

    python scripts/label_efficiency.py --root /data/Task04_Hippocampus --output runs/label-efficiency
    python scripts/label_efficiency.py --root ... --output ... --arms unet --labelled 60 --steps 1000 --seeds 0
    python scripts/label_efficiency.py --root ... --output ... --method alice_tiny --twins optimizer.lr=3e-3
    python scripts/label_efficiency.py --root ... --output ... --method kaf_tiny --derive what=keypoints \
        --arms scratch pretrained duplicate unet

The arm `duplicate` is, for a network that uses keypoints, the one from scratch whose maps are doubled instead; the arm
`encoder` leaves a pre-trained decoder out.
`--derive` makes a table that the method's views want, in the store, before the first pre-training.
Finished runs are kept, so that a second start goes on with what is missing, and the U-Net serves every method.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

NUM_TRAINING, NUM_TEST = 100, 60
ARMS = ("scratch", "pretrained", "unet")  # the first is the reference of the comparison
MORE_ARMS = ("duplicate", "encoder")


def write_split(root: Path, path: Path) -> None:
    """The first 100 cases in the order of the SHA-256 of their names train, the next 60 test."""
    listed = json.loads((root / "dataset.json").read_text())["training"]
    names = [Path(entry["image"]).name.removesuffix(".nii.gz") for entry in listed]
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    test = order[NUM_TRAINING : NUM_TRAINING + NUM_TEST]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"train": sorted(order[:NUM_TRAINING]), "validation": [], "test": sorted(test)}))


def command(name: str, *settings: str) -> None:
    """Run one command of medssl and show it."""
    line = [sys.executable, "-m", f"medssl.{name}", *settings]
    print("$", " ".join(["python", *line[1:]]), flush=True)
    subprocess.run(line, check=True)


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the dataset.json of Task04_Hippocampus")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", default="glmae_tiny")
    parser.add_argument("--labelled", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of every training")
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *MORE_ARMS), default=ARMS)
    parser.add_argument("--derive", nargs="*", default=[], help="KEY=VALUE of medssl.derive, such as what=keypoints")
    parser.add_argument("--pretrain", nargs="*", default=[], help="further KEY=VALUE of medssl.pretrain")
    parser.add_argument("--finetune", nargs="*", default=[], help="further KEY=VALUE of medssl.finetune")
    parser.add_argument("--twins", nargs="*", default=[], help="likewise, of pretrained and scratch only")
    options = parser.parse_args()
    split = options.output / "split.json"
    write_split(options.root, split)
    data = ["data=decathlon", f"data.root={options.root}", f"data.split={split}", f"store={options.output / 'store'}"]
    is_ready = False
    runs: dict[str, list[Path]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        for arm in options.arms:
            encoder = options.output / f"{options.method}-seed{seed}" / "encoder.safetensors"
            if arm != "unet" and not encoder.is_file():
                if options.derive and not is_ready:
                    command("prepare", *data[:2], data[-1])
                    command("derive", *options.derive, data[-1])
                    is_ready = True
                budget = [f"trainer.max_steps={options.steps}", f"seed={seed}", "overwrite=true", *options.pretrain]
                where = [f"method={options.method}", f"output_dir={encoder.parent}", "validate_every=null"]
                command("pretrain", *where, *data, *budget)
            name = arm if arm == "unet" else f"{options.method}-{arm}"
            run = options.output / f"{name}-{options.labelled}labels-{options.steps}steps-seed{seed}"
            runs[arm].append(run)
            if (run / "metrics.json").is_file():
                continue
            network = {
                "pretrained": [f"weights={encoder}"],
                "scratch": [f"model.like={encoder}"],
                "duplicate": [f"model.like={encoder}", "model.keypoints=duplicate"],
                "encoder": [f"weights={encoder}", "weights.decoder=none"],
                "unet": ["model=unet"],
            }[arm]
            budget = [f"data.labelled={options.labelled}", f"trainer.max_steps={options.steps}", f"seed={seed}"]
            settings = [*options.finetune, *(options.twins if arm != "unet" else [])]
            command("finetune", *network, *data, *budget, f"output_dir={run}", "overwrite=true", *settings)
    every = [str(run) for arm in runs.values() for run in arm]
    if len(runs) > 1:
        command("compare", *every, f"output_dir={options.output / f'comparison-{options.method}'}", "overwrite=true")


if __name__ == "__main__":
    main()
