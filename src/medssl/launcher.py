"""What torchrun, SLURM or Lightning told this process in environment variables when it started it."""

import os

GLOBAL_RANKS = ("RANK", "SLURM_PROCID")
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", *RESTARTS)
"""Environment variables that are the same for all ranks of one launch."""


def process_rank() -> int:
    """Return the rank that the launcher gave this process; 0 for a single process."""
    for name in GLOBAL_RANKS:
        if os.environ.get(name):
            return int(os.environ[name])
    return local_rank() + _number("NODE_RANK")  # 0 on one process alone


def local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return _number("LOCAL_RANK")


def is_launched() -> bool:
    """Return whether a launcher started this process; if not, it is alone or will start the others itself."""
    return bool(os.environ.keys() & set(LAUNCH))


def is_started_by_trainer() -> bool:
    """Return whether the trainer of another rank started this process, long after the start of the run."""
    return not set(GLOBAL_RANKS) & os.environ.keys() and local_rank() > 0


def was_restarted() -> bool:
    """Return whether a scheduler started this job again after it was stopped."""
    return any(_number(name) > 0 for name in RESTARTS)


def launch_key() -> str:
    """Return a text that is the same for all ranks of this launch and differs between launches."""
    launch = [os.environ.get(name, "") for name in LAUNCH]
    if os.environ.get("LOCAL_WORLD_SIZE", "0") == os.environ.get("WORLD_SIZE", "1"):
        launch.append(str(os.getppid()))  # one machine: all ranks have the same parent
    return "|".join(launch)


def _number(name: str) -> int:
    return int(os.environ.get(name) or 0)
