"""Threads of a process: how they wait for work, and how many there are."""

import os

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Settings of GNU's and of LLVM's OpenMP under which a thread sleeps until there is work.

Threads that spin instead hold the CPUs that another process needs, and wait for each other.
"""


def wait_asleep() -> None:
    """Let the threads of OpenMP sleep while they wait; settings of the user stay.

    OpenMP reads the settings when torch is imported.
    """
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)


def num_threads(stated: int | None, *, processes: int = 1) -> int:
    """Return the number of threads that a process computes with.

    Args:
        stated: The number that the user chose; None for that of `OMP_NUM_THREADS`, or else the share of a process in
            the CPUs that it may use. It does not follow the load: sums depend on it.
        processes: Processes of this machine that compute side by side.
    """
    if stated is not None:
        return stated
    of_openmp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if of_openmp.isdecimal() and int(of_openmp) > 0:
        return int(of_openmp)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // processes)
