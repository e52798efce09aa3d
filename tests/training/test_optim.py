import math

import pytest
import torch

from medssl.config import user_message
from medssl.training.optim import build_optimizer, rate_share, rescale


def test_the_rate_rises_linearly_and_falls_as_half_a_cosine():
    shares = [rate_share(step, total_steps=110, warmup_steps=10) for step in (0, 5, 10, 35, 60, 110, 200)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0, 0])


def test_the_cosine_ends_at_the_final_fraction():
    assert rate_share(100, total_steps=100, final_fraction=0.1) == pytest.approx(0.1)
    assert rate_share(0, total_steps=100, final_fraction=0.1) == 1


def test_the_cosine_stops_at_the_least_fraction_and_the_warm_up_starts_below():
    shares = [rate_share(step, total_steps=110, warmup_steps=10, least_fraction=0.25) for step in (5, 60, 80, 110)]
    assert rate_share(1, total_steps=110, warmup_steps=10, least_fraction=0.25) == 0.1
    assert shares == pytest.approx([0.5, 0.5, 0.25, 0.25])


def test_groups_keep_what_they_state_and_take_the_rest_from_the_settings():
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    settings = {"_target_": "torch.optim.AdamW", "lr": 0.2, "weight_decay": 0.5, "betas": [0.9, 0.95]}
    settings |= {"warmup_steps": 2, "final_fraction": 0.0, "clip_norm": 1.0}
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer, schedule = build_optimizer(settings, groups, total_steps=10)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.1, 0.2, 0.2 * 0.5 * (1 + math.cos(math.pi / 8))])


def test_a_warm_up_as_long_as_the_run_is_refused():
    settings = {"_target_": "torch.optim.SGD", "lr": 0.1, "warmup_steps": 10}
    with pytest.raises(ValueError, match=r"warmup_steps=10 leaves nothing of trainer\.max_steps=10"):
        build_optimizer(settings, [{"params": [torch.nn.Parameter(torch.ones(1))]}], total_steps=10)


def test_a_key_that_the_optimiser_does_not_know_is_named():
    settings = {"_target_": "torch.optim.SGD", "lr": 0.1, "betas": [0.9, 0.95]}
    with pytest.raises(ValueError, match="betas"):
        build_optimizer(settings, [{"params": [torch.nn.Parameter(torch.ones(1))]}], total_steps=10)


def test_a_value_that_the_optimiser_refuses_is_a_mistake_of_the_user():
    settings = {"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [2, 0.9]}
    with pytest.raises(ValueError, match="optimizer: Invalid beta") as caught:
        build_optimizer(settings, [{"params": [torch.nn.Parameter(torch.ones(1))]}], total_steps=10)
    assert user_message(caught.value).count("\n") == 0


def test_a_restored_optimiser_goes_on_with_the_settings_of_now():
    weight = torch.nn.Parameter(torch.ones(2))
    build = {"_target_": "torch.optim.SGD", "lr": 0.2, "weight_decay": 0.5}
    before, old_schedule = build_optimizer(build, [{"params": [weight]}], total_steps=4)
    for _ in range(2):
        before.step()
        old_schedule.step()
    now = {**build, "lr": 0.4, "weight_decay": 0.25}
    after, schedule = build_optimizer(now, [{"params": [weight]}], total_steps=8)
    after.load_state_dict(before.state_dict())
    schedule.load_state_dict(old_schedule.state_dict())
    rescale(after, schedule, settings=build_optimizer(now, [{"params": [weight]}], total_steps=8)[0])
    (group,) = after.param_groups
    assert group["weight_decay"] == 0.25
    assert group["lr"] == 0.4 * rate_share(2, total_steps=8)
    after.step()
    schedule.step()
    assert group["lr"] == 0.4 * rate_share(3, total_steps=8)
    assert before.param_groups[0]["lr"] == 0.2 * rate_share(2, total_steps=4)


DECAYING = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.04, "weight_decay_end": 0.4}


def decaying(*, total_steps=4, **settings):
    """The optimiser over a weight, a bias without decay and a weight, and its schedule."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(2)) for _ in range(3)]
    groups = [{"params": [p]} for p in parameters]
    groups[1]["weight_decay"] = 0.0
    return build_optimizer({**DECAYING, **settings}, groups, total_steps=total_steps)


def decays_of(optimizer, schedule, *, steps):
    found = []
    for _ in range(steps):
        found.append([group["weight_decay"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def test_the_weight_decay_follows_half_a_cosine_where_a_group_states_none():
    expected = [0.4 - 0.18 * (1 + math.cos(math.pi * step / 4)) for step in range(6)]
    expected[5] = 0.4
    found = decays_of(*decaying(), steps=6)
    assert [row[0] for row in found] == pytest.approx(expected)
    assert [row[2] for row in found] == pytest.approx(expected)
    assert [row[1] for row in found] == [0.0] * 6
    assert found[0][0] == pytest.approx(0.04)


def test_a_moving_decay_is_the_one_that_acts():
    """With a gradient of zero a step of AdamW is the decay alone: the weight shrinks by rate times decay."""
    optimizer, schedule = decaying()
    weight = optimizer.param_groups[0]["params"][0]
    for step in range(3):
        before, rate = weight.detach().clone(), optimizer.param_groups[0]["lr"]
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        schedule.step()
        decay = 0.4 - 0.18 * (1 + math.cos(math.pi * step / 4))
        assert torch.allclose(weight, before * (1 - rate * decay), atol=1e-7)


def test_a_restored_run_goes_on_with_the_decay_of_its_settings(tmp_path):
    straight = decaying()
    rest = decays_of(*straight, steps=4)[2:]
    optimizer, schedule = decaying()
    decays_of(optimizer, schedule, steps=2)
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    for settings, length in (({}, 4), ({"weight_decay_end": 0.2}, 4), ({}, 8)):
        after, resumed = decaying(total_steps=length, **settings)
        after.load_state_dict(state["optimizer"])
        resumed.load_state_dict(state["schedule"])
        rescale(after, resumed, settings=decaying(total_steps=length, **settings)[0])
        found = decays_of(after, resumed, steps=2)
        end = settings.get("weight_decay_end", 0.4)
        expected = [end - 0.5 * (end - 0.04) * (1 + math.cos(math.pi * step / length)) for step in (2, 3)]
        assert [row[0] for row in found] == pytest.approx(expected)
        if not settings and length == 4:
            assert found == rest


def test_an_end_of_the_decay_without_a_beginning_is_refused():
    with pytest.raises(ValueError, match=r"weight_decay_end=0\.4 .* starts at optimizer\.weight_decay=None"):
        decaying(weight_decay=None)


def test_the_rate_of_poly_falls_with_the_share_of_epochs_that_are_left_and_by_stairs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = {"_target_": "torch.optim.SGD", "lr": 0.01, "shape": "poly", "exponent": 0.9, "hold_steps": 250}
    optimizer, schedule = build_optimizer(settings, [{"params": [parameter]}], total_steps=1000 * 250)
    rate = schedule.lr_lambdas[0]
    for step, epoch in ((0, 0), (249, 0), (250, 1), (125_000, 500), (249_999, 999)):
        assert rate(step) == pytest.approx((1 - epoch / 1000) ** 0.9, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_warm_up_by_epochs_gives_each_of_them_the_share_of_its_end():
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = {"_target_": "torch.optim.SGD", "lr": 0.01, "shape": "poly", "exponent": 0.9, "hold_steps": 250}
    options = {"total_steps": 1000 * 250}
    optimizer, schedule = build_optimizer({**settings, "warmup_steps": 12_500}, [{"params": [parameter]}], **options)
    rate = schedule.lr_lambdas[0]
    for step, epoch in ((0, 0), (100, 0), (249, 0), (250, 1), (12_249, 48), (12_250, 49), (12_499, 49)):
        assert rate(step) == pytest.approx((epoch + 1) / 50, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 50)
    for step, epoch in ((12_500, 50), (12_749, 50), (12_750, 51), (249_999, 999)):
        assert rate(step) == pytest.approx((1 - (epoch - 50) / 950) ** 0.9, rel=1e-12)
    _, uneven = build_optimizer({**settings, "warmup_steps": 400}, [{"params": [parameter]}], **options)
    assert [uneven.lr_lambdas[0](step) for step in (0, 250, 499)] == [250 / 400, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"optimizer\.hold_steps must be a number above 0"):
        build_optimizer({**settings, "hold_steps": 0}, [{"params": [parameter]}], **options)


def test_poly_goes_on_after_a_warm_up():
    shares = [rate_share(step, total_steps=110, warmup_steps=10, shape="poly") for step in (5, 10, 60, 110)]
    assert shares == pytest.approx([0.5, 1, 0.5**0.9, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"shape": "step"}, r"optimizer\.shape is 'step'"), ({"shape": "poly", "exponent": 0}, r"optimizer\.exponent")],
)
def test_a_shape_that_is_not_known_is_refused(settings, message):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    with pytest.raises(ValueError, match=message):
        build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.01, **settings}, groups, total_steps=10)
