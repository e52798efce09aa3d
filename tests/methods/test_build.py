"""Methods built by one line, without data."""

import pytest
import torch

import medssl
from medssl.config import main
from medssl.pretrain import run
from medssl.training.method_module import MethodModule

SMALL = ["views.groups.global.size=[32,32,32]", "views.groups.local.size=[16,16,16]"]


def test_the_first_weights_are_those_of_a_pre_training_run(tmp_path, monkeypatch):
    first = {}

    class Recorded(MethodModule):
        def __init__(self, method, **options):
            first.update({name: value.clone() for name, value in method.state_dict().items()})
            super().__init__(method, **options)

    monkeypatch.setattr("medssl.training.fit.MethodModule", Recorded)
    words = ["data.num_cases=2", "data.size_voxel=48", "batch_size=2", "trainer.max_steps=1", "seed=3", *SMALL]
    words += [f"output_dir={tmp_path}/run", f"store={tmp_path}/store"]
    main("pretrain", run, arguments=["method=glmae_tiny", *words])
    method = medssl.build_method("glmae_tiny", seed=3, overrides=SMALL)
    assert method.state_dict().keys() == first.keys()
    assert all(value.equal(first[name]) for name, value in method.state_dict().items())


def test_the_first_weights_follow_from_the_seed_and_disturb_no_other_numbers():
    torch.manual_seed(0)
    first = medssl.build_method("macl_tiny")
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert drawn.equal(torch.rand(3))
    state, again, other = (m.state_dict() for m in (first, *map(built, (0, 1))))
    assert all(value.equal(again[name]) for name, value in state.items())
    assert any(not value.equal(other[name]) for name, value in state.items())


def built(seed):
    return medssl.build_method("macl_tiny", seed=seed)


def test_numbers_of_the_data_are_given_or_follow_from_the_views():
    method = medssl.build_method("drasclr_tiny", in_channels=2)
    assert method.queue.num_locations == len(method.coordinates) == 27  # a grid of 3 x 3 x 3
    assert method.encoder.in_channels == 2
    words = ["batch_size=8", "method.queue.dim=4", "method.head.out_dim=4"]
    table = medssl.build_method("drasclr", num_locations=5, num_cases=40, overrides=words)
    assert table.queue.keys.shape == (5, 32, 4)
    assert medssl.build_method("drasclr", num_locations=1, overrides=words).queue.length == 4096
    with pytest.raises(ValueError, match=r"method\.warm_up_steps .* give build_method the number as steps_per_round=N"):
        medssl.build_method("drasclr_tiny", overrides=["method.warm_up_steps=${facts.steps_per_round}"])
    warm = ["method.warm_up_steps=${facts.steps_per_round}"]
    assert medssl.build_method("drasclr_tiny", steps_per_round=7, overrides=warm).warm_up_steps == 7


def test_views_of_another_size_make_other_networks():
    wide, narrow = medssl.build_method("glmae_tiny"), medssl.build_method("glmae_tiny", overrides=SMALL)
    assert [m.encoder.grid for m in (wide, narrow)] == [(6, 6, 6), (4, 4, 4)]  # of patches of 8 voxels


def test_a_method_of_ones_own_is_built_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # and taken off afterwards
    (tmp_path / "method").mkdir()
    (tmp_path / "own_for_build.py").write_text(
        "from medssl.methods.glmae import GLMAE\n\n\nclass Own(GLMAE):\n    pass\n"
    )
    text = "# @package _global_\ndefaults:\n  - glmae_tiny\n  - _self_\nmethod:\n  _target_: own_for_build.Own\n"
    (tmp_path / "method" / "own.yaml").write_text(text)
    assert type(medssl.build_method("own", extra_dir=tmp_path)).__name__ == "Own"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("alice_tini", [], r"method=alice_tini does not exist; method is one of alice, alice_tiny"),
        ("alice_tiny", ["method.mask_ratio=2"], r"mask_ratio must lie in \[0, 1\), got 2"),
        ("alice_tiny", ["method.mask_rati=0.5"], "there is no key 'method.mask_rati'"),
        ("alice_tiny", ["+method.colour=red"], "unexpected keyword argument 'colour'"),
        ("drasclr", [], r"method\.queue\.num_locations follows from the data; .* as num_locations=N"),
    ],
)
def test_mistakes_are_told_in_one_line(name, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        medssl.build_method(name, overrides=overrides)
    assert "\n" not in str(error.value)
