import os
import subprocess
import sys

import pytest
import torch

from medssl.config import compose, freeze
from medssl.threads import num_threads, wait_asleep
from medssl.training.fit import with_threads


@pytest.fixture
def quiet_environment(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_number_of_threads_is_the_share_of_a_process_in_the_cpus_that_it_may_use(quiet_environment):
    quiet_environment.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert [num_threads(None, processes=n) for n in (1, 2, 5, 99)] == [12, 6, 2, 1]
    assert num_threads(7, processes=4) == 7
    for stated, expected in (("3", 3), ("5,2", 5), ("0", 12), ("many", 12)):
        quiet_environment.setenv("OMP_NUM_THREADS", stated)
        assert num_threads(None) == expected


def test_openmp_waits_asleep_unless_the_user_says_otherwise(quiet_environment):
    quiet_environment.setenv("KMP_BLOCKTIME", "50")
    wait_asleep()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["KMP_BLOCKTIME"]) == ("PASSIVE", "50")


def test_a_command_says_so_before_torch_is_imported():
    code = """
import os, sys
from medssl.config import main
def run(config): print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
main("pretrain", run, arguments=[])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "PASSIVE False\n"


def test_torch_computes_with_the_stated_threads_and_started_processes_get_their_share(quiet_environment):
    before = torch.get_num_threads()
    try:
        config = freeze(compose("pretrain", ["threads=3"]))
        assert with_threads(config, processes=1).threads == torch.get_num_threads() == 3
        assert "OMP_NUM_THREADS" not in os.environ
        with_threads(config, processes=2)
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert config.threads == 3
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS", None)
