import os

import pytest

from medssl.data.workers import WorkerDiedError, num_cores, run_all


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_for_every_item(num_workers):
    assert sorted(run_all(abs, [-1, 2, -3, 4, -5, 6, -7], num_workers=num_workers, progress=False)) == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]
    assert list(run_all(abs, [], num_workers=num_workers, progress=False)) == []


def test_a_worker_that_is_killed_is_said_so():
    with pytest.raises(WorkerDiedError, match="start again with fewer than num_workers=2"):
        list(run_all(os._exit, [9, 9, 9], num_workers=2, progress=False))


def test_the_items_under_way_are_named_when_a_worker_is_killed():
    with pytest.raises(WorkerDiedError) as caught:
        list(run_all(os._exit, [77, 78, 79, 80, 81], num_workers=1, progress=False))
    assert "\n  77\n" in str(caught.value)
    assert "78" not in str(caught.value)


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(ValueError, match=r"num_workers takes null .* got -1"):
        list(run_all(abs, [1], num_workers=-1, progress=False))


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(TypeError, match="bad operand"):
        list(run_all(abs, ["text"], num_workers=1, progress=False))


def test_a_worker_uses_one_thread_and_there_is_at_least_one_core():
    assert list(run_all(os.getenv, ["OPENBLAS_NUM_THREADS"], num_workers=1, progress=False)) == ["1"]
    assert num_cores() >= 1


def test_the_bar_counts_what_was_done_before(capfd):
    list(run_all(abs, [1, 2], num_workers=0, description="deriving", num_done=3))
    assert "5/5" in capfd.readouterr().err
