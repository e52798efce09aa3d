import os
import threading
import time

import pytest

from medssl.run import ranks as waiting
from medssl.run.ranks import RankZeroFailedError, rank_zero_first, remove_markers, word_file


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_PORT", "29500")

    monkeypatch.setattr(waiting, "POLL_S", 0.01)
    return become


def test_other_ranks_enter_when_rank_zero_has_left_and_hear_when_it_failed(tmp_path, as_rank):
    as_rank(0)
    with rank_zero_first(tmp_path, tmp_path / "store") as is_first:
        assert is_first
        assert not word_file(tmp_path).exists()
    as_rank(1)
    with rank_zero_first(tmp_path, tmp_path / "store") as is_first:
        assert not is_first
    as_rank(0)
    with pytest.raises(ValueError, match="too many"), rank_zero_first(tmp_path, tmp_path / "store"):
        raise ValueError("too many cases are rejected")
    as_rank(1)
    with (
        pytest.raises(RankZeroFailedError, match="rank 0 could not make the store ready: ValueError: too many cases"),
        rank_zero_first(tmp_path, tmp_path / "store"),
    ):
        pytest.fail("entered though rank 0 failed")
    remove_markers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_rank_waits_for_the_word_and_not_for_that_of_an_earlier_launch(tmp_path, as_rank):
    as_rank(1)
    word = word_file(tmp_path)
    word.write_text("ValueError: of yesterday")
    os.utime(word, (time.time() - 86400,) * 2)
    started = time.monotonic()
    threading.Timer(0.3, word.write_text, ["ready"]).start()
    with rank_zero_first(tmp_path, tmp_path / "store"):
        assert time.monotonic() - started > 0.2


def test_waiting_ends_when_nothing_happens_in_the_store(tmp_path, as_rank, monkeypatch):
    monkeypatch.setattr(waiting, "STALL_S", 0.2)
    as_rank(1)
    with pytest.raises(RankZeroFailedError, match="has not changed for"), rank_zero_first(tmp_path, tmp_path):
        pytest.fail("entered without a word of rank 0")


def test_a_process_that_rank_zero_started_itself_does_not_wait(tmp_path, monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    values = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}  # as Lightning sets them
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(waiting, "STALL_S", 0.0)
    with rank_zero_first(tmp_path, tmp_path / "store") as is_first:
        assert not is_first
