"""Do features of DrasCLR tell how ill a subject is? Trains on phantoms with emphysema, probes features of other ones.

    python scripts/drasclr_phantoms.py --output runs/drasclr-phantoms
    python scripts/drasclr_phantoms.py --output ... --locations body               # a grid in the body, not the lungs
    python scripts/drasclr_phantoms.py --output ... --train 8 --probed 12 --steps 20 --folds 3         # does it work?

`--train` subjects are pre-trained on without any target; a linear model on the pooled features of `--probed` others
predicts their severity, cross-validated. Beside the trained encoder stand
    untrained   the same network with random weights,
    histogram   of the grey values in the very patches that the encoder sees,
    lungs       mean density and share below -950 HU of the labelled lungs: what a segmentation would give.

Patches of 32 mm (16 voxels of 2 mm) lie well inside the lungs of a further phantom, whose body box is mapped onto that
of each subject: the tips of the lungs are cut off in most fields, which registration does not forgive. They are seen
in a lung window and without gamma, which changes the very grey values that emphysema consists of. Visits to a location
are longer than its queue, so that most keys are young: older ones are told from new ones by their age alone.

Exits with 1 where the difference of R2 to the untrained encoder is not above zero with its whole interval, for any
seed. Finished parts are kept, so that a second start goes on with what is missing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from medssl.data.store import VolumeStore
from medssl.extraction.feature_file import Features, load_features
from medssl.phantoms.emphysema import low_attenuation
from medssl.phantoms.torso import LABELS, draw_phantom

SPACING_MM, SIZE_VOXEL, PATCH_VOXEL = 4.0, 96, 8  # of the phantoms
WINDOW_HU = (-1024, -750)
REFERENCE_SEED = 2_000_006  # of no subject of the two stores, whose seeds begin at 0 and 1,000,003
LUNGS = {"what.patch_voxel": PATCH_VOXEL, "what.step_voxel": 12, "what.spacing_mm": SPACING_MM, "what.accept": 0.9}
GROUPS = ("anchor", "neighbours")
VIEWS = [
    "views.groups.anchor.table=locations",
    "views.groups.anchor.grid=null",
    "views.groups.anchor.spacing_mm=2.0",
    *(f"views.groups.{group}.augment.0.window_hu=[{WINDOW_HU[0]},{WINDOW_HU[1]}]" for group in GROUPS),
    *(f"views.groups.{group}.augment.3.probability=0" for group in GROUPS),  # gamma
]
TRAINING = [
    "batch_size=32",
    "method.queue.length=128",
    "sampler.batches_per_visit=10",
    "method.encoder.init=per_expert",  # AdamW turns kernels of the official size by a tenth of their length a step
    "optimizer.lr=5e-4",
]
BINS_HU = np.linspace(-1024, 240, 65)
"""Grey values in steps of 20 HU."""
OTHERS = ("untrained", "histogram", "lungs")


def command(name: str, *settings: str) -> None:
    """Run one command of medssl and show it."""
    line = [sys.executable, "-m", f"medssl.{name}", *settings]
    print("$", " ".join(["python", *line[1:]]), flush=True)
    subprocess.run(line, check=True)


def prepare(output: Path, *, num_cases: int, seed: int, locations: str) -> Path:
    """The store of phantoms with emphysema, with the places of the lungs in each where they are wanted."""
    store = output / f"store-{num_cases}-seed{seed}"
    if not (store / "index.jsonl").is_file():
        size = [f"data.size_voxel={SIZE_VOXEL}", f"data.phantom_spacing_mm={SPACING_MM}"]
        subjects = ["data=phantoms", "data.emphysema=true", f"data.num_cases={num_cases}", f"data.seed={seed}"]
        command("prepare", *subjects, *size, f"store={store}")
    if locations == "lungs" and not (store / "derived" / "locations.json").is_file():
        image, mask = output / "reference.nii.gz", output / "reference-lungs.nii.gz"
        if not mask.is_file():
            write_reference(image, mask)
        settings = [f"{key}={value}" for key, value in LUNGS.items()]
        where = ["what=locations", f"reference={image}", "provider=body_box", f"what.roi={mask}", f"store={store}"]
        command("derive", *where, *settings)
    return store


def write_reference(image: Path, mask: Path) -> None:
    """Draw a healthy phantom and a mask of its lungs."""
    import nibabel

    volume, label = draw_phantom(REFERENCE_SEED, size_voxel=(SIZE_VOXEL,) * 3, spacing_mm=SPACING_MM)
    for path, values in ((image, volume.array[0]), (mask, (label == LABELS["lungs"]).astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(values, volume.affine), path)


def histograms(store: VolumeStore, like: Features) -> Features:
    """The shares of grey values in each patch of other features."""
    rows = []
    for case, name in enumerate(store.names):
        record, number = store.record(case), like.case.tolist().index(name)
        voxels = store.read(case, 0, (0, 0, 0), record.shape).result()[0]
        to_voxel = np.linalg.inv(record.volume_to_mm)
        centres = like.centre_mm[number] @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        shares = np.full((len(centres), len(BINS_HU) - 1), np.nan, np.float32)
        for place in np.flatnonzero(like.valid[number]):
            low = np.rint(centres[place] - (PATCH_VOXEL - 1) / 2).astype(int)
            box = tuple(slice(max(0, a), a + PATCH_VOXEL) for a in low)
            counts, _ = np.histogram(voxels[box].clip(BINS_HU[0], BINS_HU[-1]), BINS_HU)
            shares[place] = counts / counts.sum()
        rows.append({"feature": shares, "valid": like.valid[number], "centre_mm": like.centre_mm[number]})
    return Features.of(store.names, rows, coordinate=like.coordinate)


def lung_densities(store: VolumeStore) -> Features:
    """Mean density and share below -950 HU of the labelled lungs, at one location in the middle."""
    rows, shown = [], {"valid": np.ones(1, bool), "centre_mm": np.zeros((1, 3), np.float32)}
    for case in range(len(store)):
        shape = store.record(case).shape
        voxels = store.read(case, 0, (0, 0, 0), shape).result()[0]
        lungs = store.read_label(case, (0, 0, 0), shape).result()[0] == LABELS["lungs"]
        values = [[voxels[lungs].mean(), low_attenuation(voxels, lungs)]]
        rows.append({"feature": np.array(values, np.float32), **shown})
    return Features.of(store.names, rows, coordinate=np.zeros((1, 3), np.float32))


def score(values: dict[str, float]) -> str:
    """A number with its interval."""
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**values)


def main() -> int:
    """Run what is missing, then print what the features tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=160, help="subjects of the pre-training")
    parser.add_argument("--probed", type=int, default=120, help="subjects whose severity is predicted")
    parser.add_argument("--locations", choices=("lungs", "body"), default="lungs")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of pre-training and of random weights")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--pretrain", nargs="*", default=[], help="further KEY=VALUE of medssl.pretrain")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    training, probed = (
        prepare(options.output, num_cases=num, seed=seed, locations=options.locations)
        for seed, num in enumerate((options.train, options.probed))
    )
    rows = []
    for seed in options.seeds:
        run = options.output / f"{options.locations}-{options.train}cases-{options.steps}steps-seed{seed}"
        encoder = run / "encoder.safetensors"
        if not encoder.is_file():
            where = ["data=store", "data.split=null", f"store={training}", f"output_dir={run}", "overwrite=true"]
            budget = [f"trainer.max_steps={options.steps}", f"seed={seed}", "validate_every=null"]
            places = VIEWS if options.locations == "lungs" else []
            command("pretrain", "method=drasclr_tiny", *where, *places, *TRAINING, *budget, *options.pretrain)
        found = {name: run / "features" / str(len(VolumeStore(probed))) / name for name in ("trained", *OTHERS)}
        for name, weights in {"trained": [], "untrained": [f"untrained={seed}"]}.items():
            where = [f"weights={encoder}", "data=store", f"store={probed}", f"output_dir={found[name]}"]
            command("features", *where, *weights)
        store = VolumeStore(probed)
        for name in ("histogram", "lungs"):
            found[name].mkdir(parents=True, exist_ok=True)
            made = lung_densities(store) if name == "lungs" else histograms(store, load_features(found["trained"]))
            made.save(found[name], {"origin": {"store": str(probed), "kind": name}})
        for other in OTHERS:
            results = found["trained"].parent / f"probe-{options.folds}folds-{other}"
            if not (results / "probe.json").is_file():
                pair = [f"features={found['trained']}", f"reference={found[other]}"]
                about = [f"targets={probed / 'targets.csv'}", "target=severity", f"num_folds={options.folds}"]
                command("probe", *pair, *about, f"output_dir={results}")
            rows.append((seed, other, json.loads((results / "probe.json").read_text())))
    print(f"\nR2 of the severity of {options.probed} phantoms, 95 % intervals over subjects")
    print(f"{'seed':6}{'':12}{'R2':26}{'trained less this'}")
    above = []
    for seed, other, values in rows:
        if other == OTHERS[0]:
            print(f"{seed:<6}{'trained':12}{score(values['features']['scores']['r2'])}")
            above.append(values["difference"]["r2"]["low"] > 0)
        print(f"{seed:<6}{other:12}{score(values['reference']['scores']['r2']):26}{score(values['difference']['r2'])}")
    return int(not all(above))


if __name__ == "__main__":
    raise SystemExit(main())
