import pytest

from medssl.data.atomic import clear_partial, whole_file, whole_folder, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with whole_file(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert (names(tmp_path), path.read_text()) == (["a.txt"], "after")


def test_a_file_whose_writing_fails_leaves_the_one_before_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(TypeError), whole_file(path) as partial, partial.open("w") as file:
        print("half", file=file, flush=True, end=0)
    assert (names(tmp_path), path.read_text()) == (["a.txt"], "before")


def test_a_folder_appears_when_it_is_whole_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "made" / "case"
    for number in (1, 2):
        with whole_folder(path) as partial:
            (partial / f"{number}.txt").write_text("whole")
            assert path.exists() is (number == 2)
    assert (names(path.parent), names(path)) == (["case"], ["2.txt"])
    with pytest.raises(IsADirectoryError), whole_folder(path) as partial:
        partial.write_text("a folder is no file")
    assert (names(path.parent), names(path)) == (["case"], ["2.txt"])


def test_what_killed_processes_left_is_cleared_by_name_or_altogether(tmp_path):
    (tmp_path / ".a.txt.1.partial").touch()
    (tmp_path / ".b.7.partial").mkdir()
    (tmp_path / ".b.7.partial" / "in it").touch()
    (tmp_path / "c.partial").touch()
    clear_partial(tmp_path, "a.txt")
    assert names(tmp_path) == [".b.7.partial", "c.partial"]
    clear_partial(tmp_path)
    assert names(tmp_path) == ["c.partial"]


def test_a_text_that_stands_there_already_is_not_written_again(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "{}")
    before = path.stat().st_ino
    write_text(path, "{}")
    assert path.stat().st_ino == before
    write_text(path, "[]")
    assert path.stat().st_ino != before
    assert path.read_text() == "[]"
