"""The command from labels to a segmenter: its numbers, its files, every way of starting, stopping and going on."""

import csv
import json
import os
import signal
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
import yaml
from killed_run import copied_at

import medssl
from medssl.config import main
from medssl.data.store import VolumeStore
from medssl.finetune import run
from medssl.segmentation.method import Segmentation
from medssl.weights import read_card, save_weights

STEPS = 6
VIT = {
    "_target_": "medssl.models.vit.VisionTransformer",
    **{"size_voxel": 16, "patch_voxel": 8, "in_channels": 1, "dim": 24, "depth": 2, "num_heads": 2},
}
PROBE = """
import os, signal
from monai.losses import DiceCELoss

class Probe(DiceCELoss):
    '''The usual loss, which gets its process a signal at a call that is asked for.'''
    calls = 0

    def forward(self, input, target):
        self.calls += 1
        name, _, call = os.environ.get("PROBE", "").partition("@")
        if name and self.calls == int(call):
            os.kill(os.getpid(), getattr(signal, name))
        return super().forward(input, target)
"""
PROBED = {"loss._target_": "loss_probe.Probe"}
ONE_STEP = {"trainer.max_steps": 1, "validate_every": "null"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder for runs that share one store, and an encoder file that was trained on other volumes."""
    root = tmp_path_factory.mktemp("finetune")
    (root / "conf").mkdir()
    (root / "conf" / "loss_probe.py").write_text(PROBE)
    torch.manual_seed(0)
    encoder = medssl.VisionTransformer(**{key: value for key, value in VIT.items() if key != "_target_"})
    data = {"name": "others", "num_cases": 1, "voxel_hashes": ["0123456789abcdef"]}
    card = {"encoder": VIT, "method": "medssl.methods.glmae.GLMAE", "data": data, "step": 7}
    save_weights(root / "encoder.safetensors", {"encoder": encoder}, card)
    return root


def arguments(root, name, **settings):
    fixed = {
        "model": "unet",
        "model.encoder.widths": "[4,8]",
        "model.encoder.strides": "[1,2]",
        "data": "phantoms",
        "data.num_cases": 6,
        "data.size_voxel": 32,
        "data.phantom_spacing_mm": 12,
        "data.labelled": 3,
        "crop_voxel": "[16,16,16]",
        "store": root / "store",
        "output_dir": root / name,
        "checkpoint_every": 4,
        "validate_every": 2,
        "trainer.max_steps": STEPS,
    }
    chosen = {**fixed, **settings}
    if "model" in settings:
        chosen = {key: value for key, value in chosen.items() if not key.startswith("model.encoder.")}
    return ["--config-dir", str(root / "conf"), *(f"{key}={value}" for key, value in chosen.items())]


def finetune(root, name, **settings):
    """Run the command in this process and give back the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        main("finetune", run, arguments=arguments(root, name, **settings))
    return root / name


def start(root, name, *, variables, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "medssl.finetune", *arguments(root, name, **settings)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def refused(root, name, capsys, **settings):
    """The one line that a refused command says."""
    with pytest.raises(SystemExit) as stop:
        finetune(root, name, **settings)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.fixture(scope="module")
def straight(workplace):
    with copied_at(Segmentation, STEPS - 1, workplace / "straight", workplace / "copied"):
        return finetune(workplace, "straight")


def test_a_run_leaves_numbers_a_network_and_pictures(straight):
    results = json.loads((straight / "metrics.json").read_text())
    assert results["split"] | {"hash": ""} == {
        "name": "5fold-0",
        "hash": "",
        "evaluated_on": "validation",
        "num_cases": len(results["cases"]),
        "content": results["split"]["content"],
    }
    assert results["labelled"]["count"] == 3 == len(results["labelled"]["cases"])
    assert results["leakage"] == {"checked": True, "overlap": 0, "allowed": False, "same_voxels": []}
    assert results["setting"]["weights"] == "scratch"
    assert (results["report"], results["selected_on_evaluation"], results["seed"]) == ("last", False, 0)
    means = [np.nanmean([v for v in case["dice"]["per_class"].values() if v is not None]) for case in results["cases"]]
    assert results["dice"]["mean"] == pytest.approx(np.mean(means))
    assert results["wall_s"] > 0
    assert results["peak_memory_mb"]["process"] > 0
    assert len(list(straight.glob("figures/validation-*.png"))) >= 2
    assert (straight / "split.json").is_file()
    assert (straight / "cases.csv").is_file()


def test_the_table_of_the_run_has_the_validation_dice_where_it_was_measured(straight):
    with (straight / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["validation_dice"]) for row in rows] == [False, True] * 3
    best = read_card(straight / "segmenter-best.safetensors")
    assert best["validation_dice"] == pytest.approx(max(float(r["validation_dice"]) for r in rows[1::2]), abs=1e-6)


def test_the_saved_segmenter_predicts_what_the_run_scored(straight):
    network, card = medssl.load_segmenter(straight / "segmenter.safetensors")
    assert [c["value"] for c in card["classes"]] == list(range(12))
    assert card["classes"][7]["name"] == "liver"
    assert card["reading"]["crop_voxel"] == [16, 16, 16]
    assert card["step"] == STEPS
    assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 12, 16, 16, 16)


@pytest.mark.parametrize("name", ["copied", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_ends_bitwise_like_a_straight_one(workplace, straight, name):
    probe = PROBED if name == "killed" else {}
    if name == "killed":
        process = start(workplace, name, variables={"PROBE": f"SIGKILL@{STEPS}"}, **probe)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    resumed = finetune(workplace, name, resume=workplace / name, **probe)
    for name in ("segmenter.safetensors", "segmenter-best.safetensors"):
        files = [medssl.load_segmenter(folder / name)[0].state_dict() for folder in (straight, resumed)]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    tables = []
    for folder in (straight, resumed):
        with (folder / "metrics.csv").open() as file:
            tables.append([(r["step"], r["loss"], r["validation_dice"]) for r in csv.DictReader(file)])
    assert tables[0] == tables[1]
    scores = [json.loads((folder / "metrics.json").read_text())["cases"] for folder in (straight, resumed)]
    assert scores[0] == scores[1]


def test_a_stop_signal_saves_and_says_how_to_go_on(workplace, monkeypatch, capsys):
    monkeypatch.setenv("PROBE", "SIGTERM@1")
    finetune(workplace, "stopped", **PROBED)
    assert f"resume={workplace / 'stopped'}" in capsys.readouterr().out
    assert torch.load(workplace / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert not (workplace / "stopped" / "metrics.json").exists()


def test_a_stop_at_a_validation_is_made_up_for_by_the_resumed_run(workplace, straight, monkeypatch):
    from medssl.segmentation.validation import Validation

    def interrupted(self, trainer, module):
        self.signals.requested = "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_validate", interrupted)
        folder = finetune(workplace, "interrupted")
    assert not (folder / "metrics.json").exists()
    finetune(workplace, "interrupted", resume=folder)
    tables = []
    for path in (straight, folder):
        with (path / "metrics.csv").open() as file:
            tables.append([(r["step"], r["loss"], r["validation_dice"]) for r in csv.DictReader(file)])
    assert tables[0] == tables[1]


def test_a_run_does_not_go_on_with_other_cases(workplace, straight, capsys):
    more = {"resume": straight, "trainer.max_steps": STEPS + 1}
    assert "data.fold was another" in refused(workplace, "elsewhere", capsys, **more, **{"data.fold": 1})
    message = refused(workplace, "elsewhere", capsys, **more, **{"data.labelled": 2})
    assert "data.labelled or its seed was another" in message


def test_other_reading_than_in_pre_training_is_said(workplace, capsys):
    card = read_card(workplace / "encoder.safetensors")
    window = {"_target_": "medssl.data.augment.ByModality", "window_hu": [-1000, 500]}
    card["reading"] = {"views": {"groups": {"crop": {"spacing_mm": "native", "augment": [window]}}}}
    del card["data"]["voxel_hashes"]
    encoder = medssl.load_encoder(workplace / "encoder.safetensors")
    save_weights(workplace / "read.safetensors", {"encoder": encoder}, card)
    tuned = {"model": "auto", "weights": workplace / "read.safetensors", **ONE_STEP}
    folder = finetune(workplace, "read", **tuned)
    said = capsys.readouterr().out
    assert "reading: normalise: ByModality window_hu=[-1000, 500] in pre-training" in said
    assert "overlap cannot be checked" in said
    assert read_card(folder / "segmenter.safetensors")["data"]["voxel_hashes"] is None


def test_a_finished_run_without_its_numbers_is_evaluated_again(workplace, straight, capsys):
    before = json.loads((straight / "metrics.json").read_text())["cases"]
    (straight / "metrics.json").unlink()
    finetune(workplace, "straight", resume=straight)
    assert json.loads((straight / "metrics.json").read_text())["cases"] == before
    assert "raise trainer.max_steps" in refused(workplace, "straight", capsys, resume=straight)


def test_an_encoder_file_brings_its_network_and_its_twin_starts_from_scratch(workplace, capsys):
    weights, like = workplace / "encoder.safetensors", {"model": "auto", **ONE_STEP}
    tuned = finetune(workplace, "tuned", weights=weights, **like)
    said = capsys.readouterr().out
    assert "matched" in said
    assert "cls_token" in said
    scratch = finetune(workplace, "scratch", **like, **{"model.like": weights})
    assert "from scratch" in capsys.readouterr().out
    settings = [json.loads((folder / "metrics.json").read_text())["setting"] for folder in (tuned, scratch)]
    assert settings[0]["weights"] == "glmae (7 steps, 1 volumes of others)"
    assert settings[1] == settings[0] | {"weights": "scratch"}
    stored = yaml.safe_load((tuned / "config.yaml").read_text())["model"]["encoder"]
    assert stored["dim"] == VIT["dim"]
    hashes = read_card(tuned / "segmenter.safetensors")["data"]["voxel_hashes"]
    assert "0123456789abcdef" in hashes
    assert len(hashes) == 4


def test_a_scratch_twin_differs_in_nothing_but_the_weights(workplace, capsys):
    weights = workplace / "encoder.safetensors"
    folder = finetune(workplace, "pair", model="auto", weights=weights, scratch_twin="true", **ONE_STEP)
    assert "medssl.compare" in capsys.readouterr().out
    ours, twin = (json.loads((path / "metrics.json").read_text()) for path in (folder, workplace / "pair-scratch"))
    assert twin["setting"] == ours["setting"] | {"weights": "scratch"}
    assert (twin["labelled"], twin["split"], twin["seed"]) == (ours["labelled"], ours["split"], ours["seed"])


@pytest.mark.parametrize(
    "change",
    [
        {"label_share": 1.0},
        pytest.param({"window_hu": "[-175,250]"}, marks=pytest.mark.slow),
        pytest.param({"augment.intensity": "[]"}, marks=pytest.mark.slow),
    ],
)
def test_runs_that_differ_in_more_than_their_seed_are_no_repetitions(workplace, straight, change):
    folder = finetune(workplace, "ablated", overwrite="true", seed=1, **change)
    settings = [json.loads((path / "metrics.json").read_text())["setting"] for path in (straight, folder)]
    assert settings[0] != settings[1]
    assert settings[0].keys() == settings[1].keys()


def test_a_segmenter_file_gives_its_decoder_too(workplace, straight, capsys):
    finetune(
        workplace,
        "continued",
        **{"model": "auto", "weights": straight / "segmenter.safetensors", "data.classes": "[7,8]"},
        **{**ONE_STEP, "allow_leakage": "true"},
    )
    said = capsys.readouterr().out
    assert "decoder: " in said
    assert "classes: 2 (liver, spleen)" in said


def test_evaluation_on_volumes_that_pre_training_saw_is_refused_or_marked(workplace, straight, capsys):
    store = VolumeStore(workplace / "store")
    card = read_card(workplace / "encoder.safetensors")
    card["data"]["voxel_hashes"] = [record.voxel_hash[:16] for record in store.records()]
    encoder = medssl.load_encoder(workplace / "encoder.safetensors")
    save_weights(workplace / "leaky.safetensors", {"encoder": encoder}, card)
    leaky = {"model": "auto", "weights": workplace / "leaky.safetensors", **ONE_STEP}
    assert "were seen in the pre-training" in refused(workplace, "leaky", capsys, **leaky)
    folder = finetune(workplace, "leaky", **leaky, allow_leakage="true")
    assert json.loads((folder / "metrics.json").read_text())["leakage"]["overlap"] == 2
    assert "LEAKAGE" in capsys.readouterr().out


def test_more_channels_than_pre_trained_repeat_the_stem_aloud(workplace, capsys, make_store):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-1000, 1000, (2, 24, 24, 24)).astype(np.int16) for _ in range(3)]
    store = make_store(*arrays, labels=[(a[0] > 300).astype(int) for a in arrays], splits=("train", "train", "test"))
    chosen = {"data": "store", "store": store.root, "data.labelled": 2, "model": "auto", "trainer.max_steps": 1}
    drop = ("data.num_cases", "data.size_voxel", "data.phantom_spacing_mm")
    line = [a for a in arguments(workplace, "two", **chosen) if a.partition("=")[0] not in drop]
    main("finetune", run, arguments=[*line, f"weights={workplace / 'encoder.safetensors'}"])
    assert "patch_embed.proj.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.labelled": 40}, "give a count from 1 to"),
        ({"data.split": "btcv_24_6"}, "btcv_24_6"),
        ({"data.fold": 7}, "data.fold=7"),
        ({"freeze": "decoder"}, "freeze='decoder' is not known"),
        ({"crop_voxel": "[15,16,16]"}, "crop_voxel=[15, 16, 16] does not fit"),
        ({"report": "first"}, "auto, best, last"),
        ({"report": "best", "validate_every": "null"}, "report=best needs validation cases"),
        ({"weights": "nowhere.safetensors"}, "there is no weight file nowhere.safetensors"),
        ({"weights.branch": "pupil"}, "student, teacher"),
        ({"data.classes": "[99]"}, "value 99 is in no label"),
        ({"model": "nothing"}, "unet"),
        ({"scratch_twin": "true"}, "give weights=FILE"),
        ({"overlap": 1.0}, "overlap must lie in [0, 1)"),
        ({"crop_voxel": 16}, "three whole numbers above 0"),
        ({"data.classes": 7}, "give a list of label values"),
        ({"data.fold": "a"}, "data.fold must be a whole number"),
        ({"decoder_lr": "abc"}, "decoder_lr must be a number"),
        ({"optimizer.lr": 0, "decoder_lr": 0.001}, "which is 0"),
        ({"data.spacing_mm": "[24,24,24]", "store": "null"}, "give working_spacing_mm"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(workplace, straight, capsys, monkeypatch, settings, message):
    monkeypatch.chdir(workplace)
    assert message in refused(workplace, "mistake", capsys, **settings)
    assert not (workplace / "mistake" / "metrics.csv").exists()


def test_truncated_weights_are_refused(workplace, capsys):
    whole = (workplace / "encoder.safetensors").read_bytes()
    (workplace / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    cut = {"model": "auto", "weights": workplace / "cut.safetensors"}
    assert "not a whole safetensors file" in refused(workplace, "cut", capsys, **cut)


def test_frozen_encoders_keep_their_weights(workplace):
    weights = workplace / "encoder.safetensors"
    folder = finetune(workplace, "frozen", model="auto", weights=weights, freeze="encoder", **{"trainer.max_steps": 2})
    before = medssl.load_encoder(weights).state_dict()
    after = medssl.load_segmenter(folder / "segmenter.safetensors")[0].encoder.state_dict()
    shared = [key for key in after if key.startswith("blocks.")]
    assert shared
    assert all(torch.equal(before[key], after[key]) for key in shared)


def test_labels_up_to_117_with_gaps_are_learnt_and_predicted_with_their_own_values(real_data, tmp_path, capsys):
    folder = real_data / "ct_abdomen"
    image, label = folder / "ct_slab_3mm.nii.gz", folder / "ct_slab_3mm_organs.nii.gz"
    rows = [f"{case},{image},{label},{split}" for case, split in (("a", "train"), ("b", "test"))]
    (tmp_path / "slabs.csv").write_text("\n".join(["case,image,label,split", *rows]))
    given = {
        **{"model": "unet", "model.encoder.widths": "[4,8]", "model.encoder.strides": "[1,2]"},
        **{"data": "csv", "data.root": tmp_path / "slabs.csv", "crop_voxel": "[64,64,32]", "overlap": 0},
        **{"store": tmp_path / "store", "output_dir": tmp_path / "run", "trainer.max_steps": 2},
        "allow_leakage": "true",  # there is one such scan
    }
    main("finetune", run, arguments=[f"{key}={value}" for key, value in given.items()])
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["leakage"]["same_voxels"] == ["b (test) and a (training) hold the same voxels"]
    assert "LEAKAGE: b (test) and a (training) hold the same voxels" in capsys.readouterr().out
    assert len(results["classes"]) == 41
    values = np.unique(np.asanyarray(nibabel.load(label).dataobj))
    weights = tmp_path / "run" / "segmenter.safetensors"
    assert [c["value"] for c in read_card(weights)["classes"]] == values.tolist()

    from medssl.predict import run as predict

    place = f"output_dir={tmp_path / 'out'}"
    main("predict", predict, arguments=[f"weights={weights}", f"input={image}", place, "overlap=0"])
    truth, found = nibabel.load(image), nibabel.load(tmp_path / "out" / "ct_slab_3mm.nii.gz")
    assert found.shape == truth.shape
    assert np.array_equal(found.affine, truth.affine)
    assert set(np.unique(np.asanyarray(found.dataobj))) <= set(values.tolist())
