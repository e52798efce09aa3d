import os
import subprocess
import sys

import pytest
from volume_files import image

from medssl.data.workers import WorkerDiedError, num_cores, run_all


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_for_every_item(num_workers):
    assert sorted(run_all(abs, [-1, 2, -3, 4, -5, 6, -7], num_workers=num_workers, progress=False)) == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]
    assert list(run_all(abs, [], num_workers=num_workers, progress=False)) == []


def test_a_worker_that_is_killed_is_said_so():
    with pytest.raises(WorkerDiedError, match="start again with fewer than num_workers=2"):
        list(run_all(os._exit, [9, 9, 9], num_workers=2, progress=False))


def test_the_items_under_way_are_named_when_a_worker_is_killed():
    with pytest.raises(WorkerDiedError) as caught:
        list(run_all(os._exit, [77, 78, 79, 80, 81], num_workers=1, progress=False))
    assert "\n  77\n" in str(caught.value)
    assert "78" not in str(caught.value)


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(ValueError, match=r"num_workers takes null .* got -1"):
        list(run_all(abs, [1], num_workers=-1, progress=False))


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(TypeError, match="bad operand"):
        list(run_all(abs, ["text"], num_workers=1, progress=False))


def test_a_worker_uses_one_thread_and_there_is_at_least_one_core():
    assert list(run_all(os.getenv, ["OPENBLAS_NUM_THREADS"], num_workers=1, progress=False)) == ["1"]
    assert num_cores() >= 1


def test_the_bar_counts_what_was_done_before(capfd):
    list(run_all(abs, [1, 2], num_workers=0, description="deriving", num_done=3))
    assert "5/5" in capfd.readouterr().err


SCRIPT = """
from pathlib import Path
from medssl.data.prepare import prepare_store
from medssl.data.sources import Folder
here = Path(__file__).parent
print(prepare_store(Folder(root=here / "in"), here / "store", num_workers=2, progress=False))
"""


def run_script(folder, text):
    """Run a script and return its exit code and what it says."""
    (folder / "script.py").write_text(text)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_script_without_a_guard_ends_with_one_line_that_names_it(tmp_path):
    for number in range(3):
        image(tmp_path / "in" / f"{number}.nii.gz", seed=number)
    code, said, complaint = run_script(tmp_path, SCRIPT)
    assert (code, said) == (1, "")
    assert complaint.splitlines()[-1].endswith("put the call below it, or give num_workers=0")
    assert complaint.count('needs the guard `if __name__ == "__main__":`') == 1
    assert "waiting for it" not in complaint


def test_a_script_without_a_guard_in_a_pool_of_its_own_is_told_so_too(tmp_path):
    (tmp_path / "store").mkdir()
    pool = "from concurrent.futures import ProcessPoolExecutor\nimport multiprocessing\nfrom pathlib import Path\n"
    lock = "from medssl.data.atomic import alone_in\nwith alone_in(Path('store')): pass\n"
    start = "context = multiprocessing.get_context('spawn')\nwith ProcessPoolExecutor(1, context) as pool:\n"
    code, _, complaint = run_script(tmp_path, pool + lock + start + "    pool.submit(abs, 1).result()\n")
    assert code == 1
    assert "ValueError: a script that starts worker processes needs the guard" in complaint


def test_a_worker_that_cannot_start_points_at_its_own_error(tmp_path):
    work = "from medssl.data.workers import run_all\n"
    fails = "if __name__ == '__mp_main__': raise RuntimeError('no luck here')\n"
    call = "if __name__ == '__main__': list(run_all(abs, [1], num_workers=1, progress=False))\n"
    code, _, complaint = run_script(tmp_path, work + fails + call)
    assert code == 1
    assert "RuntimeError: no luck here" in complaint
    assert "WorkerDiedError: a worker process could not start, its error stands above" in complaint
