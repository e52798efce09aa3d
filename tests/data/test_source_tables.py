from pathlib import Path

import pytest
from volume_files import image, label, names, reasons

from medssl.data.modality import ALLOWED
from medssl.data.sources import Csv


def test_words_for_sequences_are_modalities_and_lines_count_those_without_entries(tmp_path):
    for name in "ab":
        image(tmp_path / f"{name}.nii.gz")
    (tmp_path / "cases.csv").write_text("image,modality\n\na.nii.gz,T1w\n\n\nb.nii.gz,FDG-PET+CT\nb.nii.gz,xray\n")
    scan = Csv(root=tmp_path).scan()
    assert [case.modality for case in scan.cases] == ["mr", "pet+ct"]
    assert reasons(scan) == {("b.nii.gz", f"line 7: modality 'xray' is no modality; {ALLOWED}")}


def test_a_table_gives_label_group_split_and_modality(tmp_path):
    image(tmp_path / "p1" / "ct.nii.gz")
    image(tmp_path / "p2" / "ct.nii.gz")
    image(tmp_path / "p2" / "pet.nii.gz")
    label(tmp_path / "p1" / "organs.nii.gz")
    (tmp_path / "cases.csv").write_text(
        "\ufeffimage;label;group;split;modality;age\n"
        "p1/ct.nii.gz;p1/organs.nii.gz;copd;train;CT;61\n"
        "p2/ct.nii.gz;;healthy;val;;58\n"
        "p2/none.nii.gz;;;;;\n"
        ";p1/organs.nii.gz;;;;\n"
        "p2/ct.nii.gz;;;sometimes;;\n"
        "p2/ct.nii.gz;;;;xray;\n"
        "p2/pet.nii.gz;;;;CT+pet;\n",
        encoding="utf-8",
    )
    scan = Csv(root=tmp_path).scan().checked()
    found = [(c.case, c.group, c.split, c.modality) for c in scan.cases]
    assert found == [
        ("p1__ct", "copd", "train", "ct"),
        ("p2__ct", "healthy", "validation", None),
        ("p2__pet", "", "", "ct+pet"),
    ]
    assert reasons(scan) == {
        ("none.nii.gz", "the image file does not exist"),
        ("organs.nii.gz", "line 5: a label without an image"),
        ("ct.nii.gz", "line 6: split 'sometimes' is not known (train, validation, test)"),
        (
            "ct.nii.gz",
            f"line 7: modality 'xray' is no modality; {ALLOWED}",
        ),
    }


def test_faulty_labels_of_a_table_are_named_before_work_starts(real_data, tmp_path):
    faulty = real_data / "faulty"
    rows = "".join(
        f"{faulty / 'good.nii.gz'},{faulty / f'{name}.nii.gz'},{name}\n"
        for name in ("label_wrong_shape", "label_fractional")
    )
    (tmp_path / "t.csv").write_text("image,label,case\n" + rows)
    scan = Csv(root=tmp_path / "t.csv").scan().checked()
    assert scan.cases == []
    assert reasons(scan) == {
        ("label_wrong_shape.nii.gz", "label of the wrong shape: 24 x 24 x 21, its image is 24 x 24 x 24"),
        ("label_fractional.nii.gz", "fractional labels: 13,824 voxels are no whole numbers (such as 0.5)"),
    }


def test_mistakes_in_a_table_are_named(tmp_path):
    table = tmp_path / "t.csv"
    for text, message in (
        ("image,lable\na.nii,b.nii\n", "column 'lable' is not known; is 'label' meant"),
        ("file,label\na.nii,b.nii\n", "needs the column image"),
        ("", "needs the column image"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            Csv(root=table).scan()
    for name in ("a.nii.gz", "b.nii.gz"):
        image(tmp_path / name)
    table.write_text("case,image\none,a.nii.gz\nONE,b.nii.gz\n")
    scan = Csv(root=table).scan().checked()
    assert names(scan) == ["one"]
    assert "the case name is taken by" in scan.problems[0]["reason"]
    (tmp_path / "u.csv").write_text("image\n")
    with pytest.raises(ValueError, match=r"holds 2 \.csv files"):
        Csv(root=tmp_path).scan()


def test_a_table_knows_the_home_folder_and_names_a_file_that_is_listed_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    image(tmp_path / "home" / "a.nii.gz")
    image(tmp_path / "b.nii.gz")
    (tmp_path / "t.csv").write_text("image\n~/a.nii.gz\nb.nii.gz\nb.nii.gz\n")
    scan = Csv(root=tmp_path / "t.csv").scan().checked()
    assert names(scan) == ["home__a", "b"]
    assert reasons(scan) == {("b.nii.gz", "listed twice; drop one of the entries")}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("image,group\na.nii,caf\u00e9\n".encode("latin-1"), "line 2: not UTF-8; save the table"),
        ("image\n".encode("utf-16"), "line 1: not UTF-8"),
        (b"image\n" + b"a" * 200_000 + b"\n", "is no table"),
    ],
)
def test_a_table_that_cannot_be_read_is_said_so(raw, message, tmp_path):
    (tmp_path / "t.csv").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        Csv(root=tmp_path / "t.csv").scan()


def test_images_that_a_table_does_not_name_are_noted(tmp_path):
    for name in ("in/a", "in/b", "in/more/c", "elsewhere/d"):
        image(tmp_path / f"{name}.nii.gz")
    (tmp_path / "t.csv").write_text("image\nin/a.nii.gz\n")

    def noted(root):
        return sorted(Path(row["file"]).name for row in Csv(root=root).scan().skipped)

    assert noted(tmp_path) == ["b.nii.gz", "c.nii.gz", "d.nii.gz"]
    assert noted(tmp_path / "t.csv") == ["b.nii.gz", "c.nii.gz"]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "t.csv").write_text(f"image\n{tmp_path}/in/a.nii.gz\n")
    assert noted(tmp_path / "lists" / "t.csv") == [], "a table of files elsewhere makes no claim on what lies there"


def test_images_that_a_table_names_through_a_link_are_no_unlisted_ones(tmp_path):
    for name in "abc":
        image(tmp_path / "real" / f"{name}.nii.gz")
    (tmp_path / "now").symlink_to("real")
    (tmp_path / "t.csv").write_text("image\nnow/a.nii.gz\nnow/b.nii.gz\n")
    for root in (tmp_path, tmp_path / "t.csv"):
        assert [Path(row["file"]).name for row in Csv(root=root).scan().skipped] == ["c.nii.gz"]
