"""The match command, from two files to lines and a picture."""

import re

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medssl.config import main
from medssl.match import run
from medssl.models.vit import VisionTransformer
from medssl.weights import save_weights

SPACING = np.array([2.0, 2.0, 4.0])


@pytest.fixture
def scan(tmp_path):
    """Write a smooth CT of 40 x 36 x 20 voxels in LPS order."""

    def written(name, *, seed=0):
        noise = gaussian_filter(np.random.default_rng(seed).standard_normal((40, 36, 20)), (2, 2, 1))
        array = (900 * noise / np.abs(noise).max()).astype(np.int16)
        affine = np.diag([*SPACING * [-1, -1, 1], 1.0])
        affine[:3, 3] = [50.0, 30.0, -200.0]
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / name)
        return tmp_path / name

    return written


def match(capsys, *words, **keys):
    """Run the command; its exit code, and what it printed."""
    try:
        main("match", run, arguments=[*words, *(f"{key.replace('__', '.')}={value}" for key, value in keys.items())])
    except SystemExit as stop:
        captured = capsys.readouterr()
        return stop.code, captured.err
    return 0, capsys.readouterr().out


def test_a_point_of_a_scan_is_found_at_the_same_place_of_that_scan(tmp_path, capsys, scan, embedding_weights):
    query = scan("query.nii.gz")
    image = tmp_path / "new" / "where.png"
    code, out = match(
        capsys, weights=embedding_weights, query=query, reference=query, point_mm="[11.0,-8.5,-150.0]", output=image
    )
    assert code == 0, out
    line, last, caution = out.splitlines()
    found = re.fullmatch(r"\[11.0, -8.5, -150.0\] mm -> \[(.*)\] mm, voxel \[(.*)\], score (.*)", line)
    place = np.array([float(v) for v in found[1].split(",")])
    assert np.abs(place - [11.0, -8.5, -150.0]).max() <= 2.0
    voxel = np.array([int(v) for v in found[2].split(",")])
    assert np.all(np.abs(np.array([50.0, 30.0, -200.0]) + voxel * SPACING * [-1, -1, 1] - place) <= SPACING / 2 + 0.1)
    assert float(found[3]) == pytest.approx(1, abs=2e-3)
    assert re.fullmatch(rf"1 point of {query} in {query}, [\d.]+ s -> {image}", last)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert caution.startswith("scores compare places under this network alone; they are no probabilities")


def test_a_grid_is_nine_points_and_a_list_is_taken_whole(tmp_path, capsys, scan, embedding_weights):
    files = {"query": scan("a.nii.gz"), "reference": scan("b.nii.gz", seed=1), "output": tmp_path / "m.png"}
    code, out = match(capsys, weights=embedding_weights, grid="true", **files)
    assert code == 0, out
    assert out.count(" mm -> ") == 9
    assert "9 points of" in out
    points = re.findall(r"^\[(.*)\] mm ->", out, flags=re.M)
    assert len(set(points)) == 9
    code, out = match(capsys, weights=embedding_weights, point_mm="[[0,0,-150],[10,-20,-160]]", tile_voxel=16, **files)
    assert code == 0, out
    assert out.count(" mm -> ") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"point_mm": "[90,0,-150]"},
            r"\[90.0, 0.0, -150.0\] lies outside of .*q.nii.gz, which covers x -29 to",
        ),
        ({"point_mm": "[1,2]"}, r"point_mm=\[1, 2\]: give \[x,y,z\]"),
        ({"point_mm": "null"}, "either point_mm="),
        ({"grid": "true"}, "either point_mm="),
        ({"weights": "null"}, "weights is missing"),
        ({"weights": "nowhere.safetensors"}, "there is no weight file nowhere.safetensors"),
        ({"query": "nowhere.nii.gz"}, "query: there is no image nowhere.nii.gz"),
        ({"output": "match.txt"}, "output=match.txt is no picture"),
        ({"device": "tpu"}, "device is 'tpu', allowed are auto, cpu, cuda"),
        ({"tile_voxel": "0"}, "tile_voxel must be a whole number from 1 up"),
        (
            {"data__modality": "xray"},
            "data.modality: 'xray' is no modality; allowed are ct, mr, pet, us, unknown",
        ),
    ],
)
def test_mistakes_are_named_in_one_line_with_exit_code_two(tmp_path, capsys, scan, embedding_weights, change, message):
    query = scan("q.nii.gz")
    settings = {"weights": embedding_weights, "query": query, "reference": query, "point_mm": "[0,0,-150]"}
    code, error = match(capsys, **{**settings, "output": tmp_path / "m.png", **change})
    assert code == 2
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "m.png").exists()


@pytest.mark.parametrize(("output", "reason"), [("q.nii.gz/m.png", "File exists"), ("folder.png", "it is a folder")])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_embedded(
    tmp_path, capsys, scan, embedding_weights, monkeypatch, output, reason
):
    monkeypatch.setattr("medssl.extraction.match.Embedder.load", None)
    query = scan("q.nii.gz")
    (tmp_path / "folder.png").mkdir()
    settings = {"weights": embedding_weights, "query": query, "reference": query, "point_mm": "[0,0,-150]"}
    code, error = match(capsys, **settings, output=tmp_path / output)
    assert code == 2
    assert error.startswith(f"error: output={tmp_path / output} cannot be written: ")
    assert reason in error
    assert error.count("\n") == 1


def test_an_encoder_of_another_method_is_refused_with_what_is_needed(tmp_path, capsys, scan):
    encoder = {"_target_": "medssl.models.vit.VisionTransformer", "size_voxel": [16] * 3, "patch_voxel": [8] * 3}
    encoder |= {"in_channels": 1, "dim": 12, "depth": 1, "num_heads": 2}
    view = {"size": [16] * 3, "augment": []}
    card = {"method": "medssl.methods.glmae.GLMAE", "encoder": encoder, "reading": {"views": {"groups": {"g": view}}}}
    settings = {key: value for key, value in encoder.items() if key != "_target_"}
    save_weights(tmp_path / "mae.safetensors", {"encoder": VisionTransformer(**settings)}, card)
    query = scan("q.nii.gz")
    code, error = match(capsys, weights=tmp_path / "mae.safetensors", query=query, reference=query, grid="true")
    assert code == 2
    assert "holds an encoder of GLMAE" in error
    assert "method=sam_embed, or a published SAM checkpoint with weights.layout=sam" in error


def test_published_weights_are_read_by_their_layout(tmp_path, capsys, scan):
    from medssl.models.sam_resnet import SamResNet

    torch.save({"state_dict": SamResNet(base_channels=2, emb_dim=4).state_dict()}, tmp_path / "SAM.pth")
    query, picture = scan("q.nii.gz"), tmp_path / "m.png"
    settings = {"query": query, "reference": query, "point_mm": "[0,0,-150]", "output": picture}
    code, out = match(capsys, weights=tmp_path / "SAM.pth", weights__layout="sam", **settings)
    assert code == 0, out
    assert picture.is_file()
