import pytest

from medssl.launcher import is_launched, is_started_by_trainer, launch_key, local_rank, process_rank, was_restarted

NAMES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@pytest.fixture
def variables(monkeypatch):
    """Sets the variables of a launcher, where there were none."""
    for name in (*NAMES, "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def become(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return become


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "0"}, 3),
        ({"SLURM_PROCID": "2"}, 2),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "", "SLURM_PROCID": "2"}, 2),
    ],
)
def test_the_rank_is_what_the_launcher_says(variables, values, rank):
    variables(**values)
    assert process_rank() == rank
    assert local_rank() == int(values.get("LOCAL_RANK", "0"))


def test_a_job_that_its_scheduler_started_again_knows_it(variables):
    assert not was_restarted()
    variables(SLURM_RESTART_COUNT="1")
    assert was_restarted()


def test_a_process_that_the_trainer_of_another_rank_started_knows_it(variables):
    assert not is_launched()
    assert not is_started_by_trainer()
    variables(LOCAL_RANK="1", MASTER_PORT="29500")
    assert is_launched()
    assert is_started_by_trainer()
    variables(RANK="1")
    assert not is_started_by_trainer()


def test_ranks_of_one_launch_have_one_key_and_those_of_another_a_different_one(variables):
    alone = launch_key()
    variables(MASTER_PORT="29500", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", RANK="0")
    first = launch_key()
    variables(RANK="1")
    assert launch_key() == first != alone
    variables(MASTER_PORT="29501")
    assert launch_key() != first
