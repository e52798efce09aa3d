"""Scripts that tests run as the processes of one group: each is `work(rank, world, *arguments) -> what to compare`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(script: Path, folder: Path, *arguments: str, world: int = 2) -> list[dict[str, Any]]:
    """What `world` processes of a script end with, in the order of their ranks; all have to succeed."""
    import torch

    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    name = "-".join([script.stem, str(world), *arguments])
    outs = [folder / f"{name}-{rank}.pt" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(folder / f"{name}-meet"), str(out), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        for rank, out in enumerate(outs)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, errors
    return [torch.load(out, weights_only=True) for out in outs]


def as_rank(work: Callable[..., dict[str, Any]]) -> None:
    """Join the other processes, work, and save: the last line of a script for `run_ranks`."""
    import torch
    import torch.distributed as dist

    rank, world, rendezvous, out, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world))
    torch.save(work(int(rank), int(world), *arguments), out)
    dist.destroy_process_group()
