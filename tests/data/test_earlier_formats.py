"""Files of earlier formats: weights of format 1 load, a store of format 1 is refused with the command that renews it.

`tests/earlier` was written by commit 7406fd7: a store of one scan with its table of bodies, an encoder, a
segmenter, and the settings of a run.
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from medssl import load_encoder, load_segmenter
from medssl.config import compose, main
from medssl.data.prepare import prepare_store
from medssl.data.recipes import check_recipe, store_recipe
from medssl.data.sources import Folder
from medssl.data.store import VolumeStore
from medssl.derive import run as derive
from medssl.inference.reading import Reading
from medssl.prepare import run as prepare
from medssl.run.settings import changes
from medssl.tables.derived import Body
from medssl.tables.derived import derive as make_tables
from medssl.weights import read_card

EARLIER = Path(__file__).parents[1] / "earlier"
COMMAND = "python -m medssl.prepare data=folder data.root=/data/scans data.min_side_voxel=8 store="


@pytest.fixture
def store(tmp_path):
    return Path(shutil.copytree(EARLIER / "store", tmp_path / "old"))


def test_a_store_of_format_one_is_refused_with_the_command_that_makes_it_again(store, tmp_path, capsys):
    expected = (
        f"store={store} has format 1, this version reads and writes 2; prepare its images again into another folder"
    )
    for opened in (
        lambda: VolumeStore(store),
        lambda: check_recipe(store, store_recipe(Folder(root=tmp_path))),
        lambda: make_tables(store, Body(), num_workers=0, progress=False),
    ):
        with pytest.raises(ValueError) as caught:
            opened()
        assert str(caught.value) == f"{expected}: {COMMAND}{store}-2"
    for run, arguments in (
        (prepare, ["data=folder", f"data.root={tmp_path}", f"store={store}"]),
        (derive, ["what=body", f"store={store}"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(run.__module__.rpartition(".")[2], run, arguments=arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"error: {expected}" in error
        assert len(error.splitlines()) == 1


def test_nothing_of_a_refused_store_is_changed(store, tmp_path):
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="has format 1"):
        prepare_store(Folder(root=tmp_path), store, num_workers=0, progress=False)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_a_segmenter_of_format_one_loads_and_says_how_it_reads():
    path = EARLIER / "segmenter.safetensors"
    network, card = load_segmenter(path)
    assert (read_card(path)["format"], card["reading"]["modality"]) == (1, "ct")
    assert Reading.from_card(card["reading"]).modality == ("ct",)
    scan = torch.linspace(-1, 1, 16**3).reshape(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert network.eval()(scan).double().sum().item() == pytest.approx(15.140463312040083, rel=1e-5)


def test_an_encoder_of_format_one_gives_the_features_that_it_gave():
    encoder = load_encoder(EARLIER / "encoder.safetensors").eval()
    scan = torch.linspace(-1, 1, 16**3).reshape(1, 1, 16, 16, 16)
    with torch.no_grad():
        sums = [level.double().sum().item() for level in encoder(scan)]
    assert sums == pytest.approx([6211.677830911175, 1600.7539712792359], rel=1e-5)


def test_settings_of_a_run_whose_classes_have_moved_are_refused_with_the_new_place():
    earlier = EARLIER / "config.yaml"
    assert yaml.safe_load(earlier.read_text(encoding="utf-8"))["data"]["name"] == "phantoms"
    with pytest.raises(ValueError, match=r"medssl\.data\.sources\.Phantoms.*medssl\.phantoms\.source") as caught:
        changes(earlier, compose("pretrain", ["method=glmae_tiny"]))
    assert len(str(caught.value).splitlines()) == 1
