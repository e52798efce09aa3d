import pytest
import torch
from torch import nn

from medssl.ops.ema import frozen_copy, update_ema


def student():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net[0].bias.requires_grad_(False)
    return net


def test_a_frozen_copy_is_equal_evaluates_and_takes_no_gradient():
    net = student().train()
    teacher = frozen_copy(net)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), net.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert net.training
    assert net[0].weight.requires_grad


def test_trained_weights_are_averaged_and_all_else_is_copied():
    net = student()
    teacher = frozen_copy(net)
    before = teacher[0].weight.clone()
    with torch.no_grad():
        for tensor in (*net.parameters(), net[1].running_mean):
            tensor += 1.0
    update_ema(teacher, net, momentum=0.75)
    assert torch.allclose(teacher[0].weight, before + 0.25)
    assert torch.equal(teacher[0].bias, net[0].bias)
    assert torch.equal(teacher[1].running_mean, net[1].running_mean)


def test_a_teacher_may_keep_buffers_of_its_own():
    net = student()
    teacher = frozen_copy(net)
    with torch.no_grad():
        for tensor in (*net.parameters(), net[1].running_mean):
            tensor += 1.0
    update_ema(teacher, net, momentum=0.5, copy_buffers=False)
    assert teacher[1].running_mean.tolist() == [0.0] * 4
    assert torch.equal(teacher[1].bias, net[1].bias - 0.5)
    assert torch.equal(teacher[0].bias, net[0].bias)


@pytest.mark.parametrize(("momentum", "source"), [(1.0, "old"), (0.0, "new")])
def test_the_ends_of_the_momentum_are_exact(momentum, source):
    net = student()
    teacher = frozen_copy(net)
    expected = {"old": teacher[0].weight.clone()}
    net[0].weight.data.mul_(1.7)
    expected["new"] = net[0].weight.clone()
    update_ema(teacher, net, momentum=momentum)
    assert torch.equal(teacher[0].weight, expected[source])


def test_a_student_that_trains_nothing_is_copied():
    frozen = student().requires_grad_(False)
    teacher = frozen_copy(frozen)
    with torch.no_grad():
        for tensor in (*frozen.parameters(), frozen[1].running_mean):
            tensor += 1.0
    update_ema(teacher, frozen, momentum=0.75)
    pairs = zip(teacher.state_dict().values(), frozen.state_dict().values(), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)
    update_ema(nn.Identity(), nn.Identity(), momentum=0.75)
