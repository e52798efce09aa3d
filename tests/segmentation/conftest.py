"""A segmenter in a file and an image, for the tests of prediction."""

from functools import partial

import pytest
from tiny_segmenter import save_segmenter, write_scan


@pytest.fixture
def save(tmp_path):
    """Writes a tiny segmenter with random weights; what differs from the usual reading may be given."""
    return partial(save_segmenter, tmp_path)


@pytest.fixture
def scan(tmp_path):
    """Writes a grey-value image of 20 x 18 x 16 voxels in LPS order."""
    return partial(write_scan, tmp_path / "scans")
