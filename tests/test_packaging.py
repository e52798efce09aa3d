"""The wheel holds all that a run needs: built without isolation, used outside of the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = [
    "method=glmae_tiny",
    "data=phantoms",
    "data.num_cases=2",
    "data.size_voxel=48",
    "batch_size=2",
    "trainer.max_steps=2",
    "output_dir=out",
]


def call(*command, folder, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.packaging
def test_a_wheel_pre_trains_outside_of_the_checkout(tmp_path):
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", folder=ROOT)
    (wheel,) = (tmp_path / "dist").glob("medssl-*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, folder=work)

    where = call(sys.executable, "-c", "import medssl; print(medssl.__file__)", folder=work, PYTHONPATH=site)
    assert Path(where.strip()).is_relative_to(site)
    output = call(sys.executable, "-m", "medssl.pretrain", *SMALL, folder=work, PYTHONPATH=site)
    assert "encoder.safetensors" in output
    assert len((work / "out" / "metrics.csv").read_text().splitlines()) == 3
    assert list((work / "stores").glob("phantoms-*/index.jsonl"))
    splits = "from medssl.data.split_names import REGISTRY; print(*sorted(file.stem for file in REGISTRY.iterdir()))"
    found = call(sys.executable, "-c", splits, folder=work, PYTHONPATH=site)
    assert found.split() == ["btcv_18_12", "btcv_24_6", "btcv_5fold"]
    loaded = "import medssl; print(medssl.load_encoder('out/encoder.safetensors').strides[0])"
    assert call(sys.executable, "-c", loaded, folder=work, PYTHONPATH=site).strip() == "(8, 8, 8)"
