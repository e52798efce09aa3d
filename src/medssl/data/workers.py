"""A process pool for work case by case: its processes are spawned, watched, and end with their parent."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


GUARD = (
    'a script that starts worker processes needs the guard `if __name__ == "__main__":` above the call, because each '
    "worker imports the script; put the call below it, or give num_workers=0"
)
UNGUARDED = 78
"""The exit code of a worker that found the call again while it imported the script."""
POOL = "MEDSSL_POOL"
"""The environment variable that tells a process that it is a worker of `run_all`."""


class WorkerDiedError(ValueError):
    """A worker process ended without an error message."""


def check_guard() -> None:
    """Check that the caller is not being imported by a worker process, as a script without a guard is.

    Raises:
        ValueError: It is.
        SystemExit: It is, and the process that started the worker says so.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # while it prepares to run anything
        if POOL in os.environ:
            raise SystemExit(UNGUARDED)
        raise ValueError(GUARD)


def run_all(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_workers: int | None = None,
    progress: bool = True,
    description: str = "",
    num_done: int = 0,
) -> Iterator[Result]:
    """Yield the results of `function` on all items as they come, with a progress bar (rate, remaining time).

    Args:
        function: Function that is importable by name. It runs on one item at a time in each process.
        items: Picklable arguments of the function.
        num_workers: Number of processes; None means one per core, 0 works in this process.
        progress: Whether to show the bar.
        description: Text of the bar.
        num_done: Number of items that were finished before, for the bar.

    Raises:
        WorkerDiedError: A process was killed, most often because memory ran out; its text names the items under way.
            Or it could not start, as for a script without a guard.
        ValueError: The number of workers is negative.
    """
    check_num_workers(num_workers)
    from tqdm import tqdm

    bar = tqdm(
        total=num_done + len(items),
        initial=num_done,
        desc=description,
        unit="volume",
        disable=not progress or not items,
        dynamic_ncols=True,
    )
    with bar:
        results = map(function, items) if num_workers == 0 else _in_processes(function, items, num_workers)
        for result in results:
            bar.update()
            yield result


def check_num_workers(num_workers: int | None) -> None:
    """Raise a ValueError for a negative number of processes."""
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers takes null (one a core), 0 (no other process) or more, got {num_workers}")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int | None
) -> Iterator[Result]:
    workers = min(num_workers or num_cores(), len(items))
    if workers == 0:
        return
    check_guard()
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    before = set(multiprocessing.active_children())
    started: set[multiprocessing.process.BaseProcess] = set()
    os.environ[POOL] = str(os.getpid())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        waiting = iter(items)
        running: dict[Future[Any], Item] = {}  # in the order in which the processes take them
        while True:
            while len(running) < 2 * workers and (item := next(waiting, _END)) is not _END:
                running[pool.submit(function, item)] = item
            started |= set(multiprocessing.active_children()) - before
            if not running:
                return
            finished = wait(running, return_when=FIRST_COMPLETED).done
            for future in sorted(finished, key=lambda f: isinstance(f.exception(), BrokenProcessPool)):
                if isinstance(future.exception(), BrokenProcessPool):  # sorted: all results were taken before
                    raise _died(list(running.values())[:workers], workers, started) from None
                del running[future]
                yield future.result()
    except BrokenProcessPool as error:  # it broke while an item was handed over
        raise _died(list(running.values())[:workers], workers, started) from error
    except BaseException:  # stopped: a case takes up to minutes, and unfinished cases are repeated anyway
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        os.environ.pop(POOL, None)
        pool.shutdown(wait=True, cancel_futures=True)


_END: Any = object()
SECONDS_TO_END = 5


def _died(
    items: Sequence[Any], workers: int, processes: Iterable[multiprocessing.process.BaseProcess]
) -> WorkerDiedError:
    for process in processes:
        process.join(SECONDS_TO_END)
    codes = {process.exitcode for process in processes}
    if UNGUARDED in codes:
        return WorkerDiedError(GUARD)
    if 1 in codes:  # Python's code for an error before the first item
        return WorkerDiedError(f"a worker process could not start, its error stands above; {GUARD}")
    ways = f"start again with fewer than num_workers={workers}" if workers > 1 else "leave it out or find more memory"
    under_way = "\n".join(f"  {item}" for item in items)
    return WorkerDiedError(
        "a worker process was killed, most often because memory ran out; what is finished is kept. "
        f"Under way were, one of them the cause:\n{under_way}\n{ways}"
    )


def _begin_worker() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before numpy is imported here: one core a process, the same sums on any machine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
