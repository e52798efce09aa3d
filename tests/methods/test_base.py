from dataclasses import replace

import pytest
import torch
from torch import nn

from medssl.methods.base import Method, Progress, StepOutput

RUN = {"step": 3, "total_steps": 10, "epoch": 0.5, "total_epochs": 2.0, "seed": 1}


class Small(Method):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def forward(self, batch, progress):
        return StepOutput(self.encoder(torch.ones(1, 3)).sum())


def draw(name="mask", **changes):
    return torch.rand(5, generator=Progress(**{**RUN, **changes}).generator(name)).tolist()


def test_a_draw_depends_on_seed_step_micro_batch_rank_and_name_only():
    assert draw() == draw() == draw(total_steps=99, epoch=0.7, total_epochs=3.0)
    others = [draw(seed=2), draw(step=4), draw(micro=1), draw(rank=1), draw("subset")]
    assert all(other != draw() for other in others)
    assert len({tuple(other) for other in others}) == len(others)


def test_a_draw_may_repeat_while_the_run_goes_on():
    assert draw(draw=7) == draw(draw=7, step=9, epoch=1.5) == draw(step=7)


def test_a_draw_stays_the_same_between_versions():
    assert draw()[:2] == pytest.approx([0.0725150, 0.6416237], abs=1e-6)


def test_dropout_depends_on_seed_step_micro_batch_and_rank_only():
    def drawn(**changes):
        Progress(**{**RUN, **changes}).seed_torch()
        return torch.rand(5).tolist()

    assert drawn() == drawn(total_steps=99, epoch=0.7, draw=5)
    others = [drawn(seed=2), drawn(step=4), drawn(micro=1), drawn(rank=1)]
    assert len({tuple(other) for other in (drawn(), *others)}) == 5


def test_progress_needs_no_arguments_where_nothing_has_happened_yet():
    assert Progress() == Progress(step=0, total_steps=1, epoch=0.0, total_epochs=1.0, seed=0, rank=0, micro=0)


def test_biases_and_norms_are_not_decayed_and_frozen_tensors_not_trained():
    method = Small()
    decayed, plain = method.param_groups()
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert [tuple(p.shape) for p in plain["params"]] == [(4,)] * 3
    assert plain["weight_decay"] == 0
    assert "weight_decay" not in decayed


def test_a_method_without_one_dimensional_weights_has_one_group():
    method = Small()
    method.encoder = nn.Linear(3, 4, bias=False)
    assert len(method.param_groups()) == 1


def test_a_method_may_decay_all_that_it_trains():
    method = Small()
    method.decays_all = True
    (group,) = method.param_groups()
    assert group.keys() == {"params"}
    assert [tuple(p.shape) for p in group["params"]] == [(4, 3), (4,), (4,), (4,)]


def test_progress_knows_half_a_cosine_over_the_steps_of_the_run():
    values = [Progress(**{**RUN, "step": step}).cosine(0.996, 1.0) for step in (0, 5, 10)]
    assert values == pytest.approx([0.996, 0.998, 1.0], abs=1e-12)


def test_the_encoder_is_what_leaves_pre_training_unless_a_method_says_more():
    method = Small()
    assert method.parts() == {"encoder": method.encoder}
    assert method.figures({}, {}, Progress(**RUN)) == {}
    assert method.compile_regions() == [method.encoder]


def test_extras_are_those_of_evaluation_and_leave_training_modes_as_they_are():
    class Told(Small):
        def forward(self, batch, progress):
            output = super().forward(batch, progress)
            return replace(output, extras={"training": torch.tensor(self.training)} if progress.with_extras else {})

    method = Told()
    method.encoder[1].eval()  # one that its method keeps so
    assert method({}, Progress()).extras == {}
    extras = method.extras({}, Progress())
    assert not extras["training"]
    assert [module.training for module in (method, method.encoder[0], method.encoder[1])] == [True, True, False]
