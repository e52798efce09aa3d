"""What the launcher of this process (torchrun, SLURM, Lightning) tells it in environment variables."""

import os

GLOBAL_RANKS = ("RANK", "SLURM_PROCID")
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", *RESTARTS)
"""Environment variables that are the same for all ranks of one launch."""


def process_rank() -> int:
    """The rank of this process among all; 0 for a process on its own."""
    for name in GLOBAL_RANKS:
        if os.environ.get(name):
            return int(os.environ[name])
    return local_rank() + _number("NODE_RANK")  # 0 on one process alone


def local_rank() -> int:
    """The rank of this process among those of its machine."""
    return _number("LOCAL_RANK")


def is_launched() -> bool:
    """Whether a launcher started this process; else it is alone, or will start the others itself."""
    return bool(os.environ.keys() & set(LAUNCH))


def is_started_by_trainer() -> bool:
    """Whether the trainer of another rank started this process, long after the start of the run."""
    return not set(GLOBAL_RANKS) & os.environ.keys() and local_rank() > 0


def was_restarted() -> bool:
    """Whether a scheduler started this very job again after it was stopped."""
    return any(_number(name) > 0 for name in RESTARTS)


def launch_key() -> str:
    """A text that all ranks of this launch have in common, and others have not."""
    launch = [os.environ.get(name, "") for name in LAUNCH]
    if os.environ.get("LOCAL_WORLD_SIZE", "0") == os.environ.get("WORLD_SIZE", "1"):
        launch.append(str(os.getppid()))  # one machine: all ranks have the same parent
    return "|".join(launch)


def _number(name: str) -> int:
    return int(os.environ.get(name) or 0)
