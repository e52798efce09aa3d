"""Which store a run opens, and what it looks at before."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from hydra.utils import instantiate

from medssl.config import compose
from medssl.methods.build import build_method
from medssl.run.store import open_store
from medssl.training import pretraining


@pytest.fixture
def images(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        image(tmp_path / "in" / f"{name}.nii.gz")
    return tmp_path / "in"


def image(path):
    array = np.random.default_rng(len(path.name)).integers(-500, 500, (12, 12, 12)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def config(tmp_path, *more):
    (tmp_path / "out").mkdir(exist_ok=True)
    fixed = [f"output_dir={tmp_path / 'out'}", f"store={tmp_path / 's'}"]
    return compose("pretrain", ["data=folder", f"data.root={tmp_path / 'in'}", *fixed, *more])


def test_new_files_reach_the_store_of_the_next_run_in_one_line_and_no_change_is_silent(images, tmp_path, capfd):
    assert len(open_store(config(tmp_path))) == 2
    assert capfd.readouterr().out == f"preparing folder -> {tmp_path / 's'}\n"
    assert len(open_store(config(tmp_path))) == 2
    assert capfd.readouterr() == ("", "")
    image(images / "longer.nii.gz")
    assert len(open_store(config(tmp_path))) == 3
    assert capfd.readouterr().out == f"the source has changed: 3 cases (1 new) -> {tmp_path / 's'}\n"
    (images / "a.nii.gz").unlink()
    assert len(open_store(config(tmp_path), is_resumed=True)) == 3
    assert len(open_store(config(tmp_path))) == 2
    assert list((tmp_path / "s").glob("a-*.zarr")), "another run may read it"


def test_another_split_and_group_reach_the_index(images, tmp_path, capfd):
    def opened(group):
        (images / "t.csv").write_text(f"image,group,split\na.nii.gz,{group},train\nb.nii.gz,x,test\n")
        return open_store(config(tmp_path, "data=csv"))

    assert opened("x").record(0).group == "x"
    capfd.readouterr()
    assert opened("y").record(0).group == "y"
    assert "2 cases (0 new), 1 in another group or split" in capfd.readouterr().out


@pytest.mark.parametrize("gone", ["missing", "empty"])
def test_a_store_is_used_without_its_source(gone, images, tmp_path, capfd):
    open_store(config(tmp_path))
    capfd.readouterr()
    shutil.rmtree(images)
    if gone == "empty":  # where nothing is mounted
        images.mkdir()
    assert len(open_store(config(tmp_path))) == 2
    printed = capfd.readouterr().out
    assert printed.endswith(f"the store {tmp_path / 's'} is used as it is\n")
    assert printed.count("\n") == 1
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(ValueError, match=r"does not exist|no image below"):
        open_store(config(tmp_path))


def test_new_files_that_are_too_often_unreadable_leave_the_store_as_it_is(images, tmp_path, capfd):
    open_store(config(tmp_path))
    (images / "text.nii.gz").write_text("no image")
    assert len(open_store(config(tmp_path))) == 2
    printed = capfd.readouterr()
    assert "1 of 3 cases are rejected, more than max_rejected_fraction=0.2; the store" in printed.out
    assert [json.loads(line)["case"] for line in (tmp_path / "s" / "index.jsonl").read_text().splitlines()] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    ("settings", "is_tried"),
    [
        (("method=macl_tiny",), True),
        (("method=macl_tiny", "data=decathlon", "data.root=task"), True),  # all channels, so one stands for them
        (("method=drasclr_tiny",), False),  # its queue has as many entries as there are cases
    ],
)
def test_a_method_is_tried_before_the_store_unless_it_needs_what_only_the_store_knows(settings, is_tried, monkeypatch):
    built = []

    def method_along(settings, axes, *, seed):
        built.append(settings)
        return build_method("sam_embed_tiny", seed=seed), settings

    monkeypatch.setattr(pretraining, "method_along", method_along)
    config = compose("pretrain", settings)
    pretraining.try_method(config, instantiate(config.views, _convert_="all"))
    assert len(built) == is_tried
    assert config.facts.num_channels is None
    assert all(settings["backbone"]["encoder"]["in_channels"] == 1 for settings in built)
