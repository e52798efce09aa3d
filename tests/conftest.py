"""What every test shares: one thread, the folder of real volumes, a headless matplotlib."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests run several small processes on two cores
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of small real volumes; the test is skipped where MEDSSL_TEST_DATA is unset."""
    folder = os.environ.get("MEDSSL_TEST_DATA")
    if not folder:
        pytest.skip("MEDSSL_TEST_DATA is unset: it names the folder with the small real volumes")
    return Path(folder)
