"""Scripts that tests run as the processes of one group: each is `work(rank, world, *arguments) -> what to compare`.

The processes stay for the next script, since importing torch and Lightning takes longer than most scripts.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

SECONDS = 300


def run_ranks(script: Path, folder: Path, *arguments: str, world: int = 2) -> list[dict[str, Any]]:
    """What `world` processes of a script end with, in the order of their ranks; all have to succeed."""
    import torch

    name = "-".join([script.stem, str(world), *arguments])
    outs = [folder / f"{name}-{rank}.pt" for rank in range(world)]
    processes = [_process(rank) for rank in range(world)]
    for rank, (process, out) in enumerate(zip(processes, outs, strict=True)):
        words = [str(script), str(rank), str(world), str(folder / f"{name}-meet"), str(out), *arguments]
        print(json.dumps(words), file=process.stdin, flush=True)
    timer = threading.Timer(SECONDS, lambda: [process.kill() for process in processes])
    timer.start()
    errors = [json.loads(process.stdout.readline() or '"the process ended"') for process in processes]
    timer.cancel()
    if errors != [""] * world:
        _process.cache_clear()  # the next script gets new processes
        raise AssertionError("\n".join(errors))
    return [torch.load(out, weights_only=True) for out in outs]


def as_rank(work: Callable[..., dict[str, Any]]) -> None:
    """Join the other processes, work, and save: the last line of a script for `run_ranks`."""
    import torch
    import torch.distributed as dist

    rank, world, rendezvous, out, *arguments = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world))
    try:
        torch.save(work(int(rank), int(world), *arguments), out)
    finally:
        dist.destroy_process_group()


@cache
def _process(rank: int) -> subprocess.Popen:
    """A process that runs one script after the other; it ends when its input is closed, as this process ends."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


def _serve() -> None:
    """Run each script that a line of the input names, and answer with its traceback, or with nothing."""
    import runpy
    import traceback

    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.argv = json.loads(line)
        sys.path[0] = str(Path(sys.argv[0]).parent)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            error = ""
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    _serve()
