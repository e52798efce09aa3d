import json
from pathlib import Path

import pytest

from medssl.ops.schedules import cosine, linear_ramp

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glmae.json").read_text())


@pytest.mark.parity
def test_the_cosine_has_the_card_s_values():
    for step, value in GOLDEN["momentum_schedule"].items():
        assert cosine(int(step), 50, start=0.996, end=1.0) == pytest.approx(value, abs=1e-15)


@pytest.mark.parity
def test_the_cosine_after_a_warm_up_has_the_card_s_values():
    for step, value in GOLDEN["rate_schedule"].items():
        found = cosine(int(step), 50, start=5e-4, end=1e-6, warmup_steps=10)
        assert found == pytest.approx(value, rel=1e-6, abs=1e-18)


@pytest.mark.parity
def test_the_cosine_of_a_short_run_has_the_card_s_values():
    expected = json.loads((Path(__file__).parents[1] / "golden" / "alice.json").read_text())["rate_schedule"]
    found = [cosine(step, 12, start=1.0, end=0.1, warmup_steps=3) for step in range(12)]
    assert found == pytest.approx(expected, abs=1e-8)
    assert cosine(50, 100, start=0.996, end=1.0) == pytest.approx(0.998, abs=1e-12)


def test_the_cosine_stays_at_its_end():
    assert cosine(50, 50, start=0.9, end=1.0) == 1.0
    assert cosine(70, 50, start=0.9, end=1.0) == 1.0


def test_the_ramp_is_straight_and_then_constant():
    assert [linear_ramp(x, 4, start=0.0, end=1.0) for x in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert linear_ramp(0, 0, start=0.0, end=1.0) == 1.0
