import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sam_phantoms.py"


@pytest.mark.slow
@pytest.mark.parity
def test_places_are_found_in_other_subjects_with_less_than_half_the_error_of_the_copied_index(tmp_path):
    line = [sys.executable, SCRIPT, "--output", tmp_path, "--steps", "75"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
