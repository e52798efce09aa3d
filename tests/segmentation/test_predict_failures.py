"""Prediction that stops or fails: what is reported, what is kept."""

import errno
import re
import signal
from dataclasses import replace

import pytest
import torch
from tiny_segmenter import load, predict

from medssl.segmentation import predict as predicting
from medssl.weights import load_segmenter, save_weights


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_finished_results_and_no_half_ones(tmp_path, save, scan, monkeypatch, capsys, number):
    scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    written, write = [], predicting.write_nifti

    def interrupted(path, planes, **options):
        def cut():
            for z, plane in enumerate(planes):
                if written and z == 3:
                    signal.raise_signal(number)
                yield plane

        write(path, cut(), **options)
        written.append(path.name)

    monkeypatch.setattr(predicting, "write_nifti", interrupted)
    assert predict(weights=save(), input=tmp_path / "scans", output_dir=tmp_path / "o") == 130
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["a.nii.gz"]
    assert "the same command continues" in capsys.readouterr().err


def test_an_image_too_large_for_the_memory_is_reported_and_the_rest_is_done(tmp_path, save, scan, monkeypatch, capsys):
    scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    segment = predicting.segment

    def limited(members, fetch, record, **options):
        if record.case == "a":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return segment(members, fetch, record, **options)

    monkeypatch.setattr(predicting, "segment", limited)
    assert predict(weights=save(), input=tmp_path / "scans", output_dir=tmp_path / "o") == 1
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["b.nii.gz"]
    assert "does not fit into the memory of the cpu; window_batch=1 needs less" in capsys.readouterr().err


@pytest.mark.parametrize("probabilities", ["false", "true"])
def test_an_image_that_the_network_gives_nan_for_is_reported_and_the_rest_is_done(
    tmp_path, save, scan, monkeypatch, capsys, probabilities
):
    broken = scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    segment = predicting.segment

    def diverged(members, fetch, record, **options):
        predict = members[0].predict
        nan = torch.nan if record.case == "a" else 0
        return segment([replace(members[0], predict=lambda w: predict(w) + nan)], fetch, record, **options)

    monkeypatch.setattr(predicting, "segment", diverged)
    common = {"weights": save(), "input": broken.parent, "output_dir": tmp_path / "o"}
    assert predict(**common, probabilities=probabilities) == 1
    assert {p.name[0] for p in (tmp_path / "o").iterdir()} == {"b"}
    captured = capsys.readouterr()
    assert f"error: {broken}: the network's output is not finite" in captured.err
    assert captured.out.splitlines()[-1] == "1 predicted, 1 failed"


def test_weights_that_diverged_are_an_error_for_each_image(tmp_path, save, scan, capsys):
    weights = save()
    network, card = load_segmenter(weights)
    with torch.no_grad():
        next(network.decoder.parameters()).fill_(torch.nan)
    save_weights(weights, network.parts(), card)
    assert predict(weights=weights, input=scan(), output_dir=tmp_path / "o") == 1
    assert "its training diverged" in capsys.readouterr().err
    assert not list((tmp_path / "o").iterdir())


def test_a_result_that_cannot_be_written_is_reported_and_the_rest_is_done(tmp_path, save, scan, monkeypatch, capsys):
    for seed, name in enumerate(("a.nii.gz", "b.nii.gz", "c.nii.gz")):
        scan(name, seed=seed)
    (tmp_path / "o" / "a.nii.gz").mkdir(parents=True)
    write = predicting.write_nifti

    def refused(path, planes, **options):
        if path.name == "b.nii.gz":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        write(path, planes, **options)

    monkeypatch.setattr(predicting, "write_nifti", refused)
    assert predict(weights=save(), input=tmp_path / "scans", output_dir=tmp_path / "o", overwrite="true") == 1
    captured = capsys.readouterr()
    assert re.search(r"error: .*scans/a.nii.gz: .*o/a.nii.gz is a folder; remove it", captured.err)
    assert re.search(r"error: .*scans/b.nii.gz: .*Permission denied: .*o/b.nii.gz\n", captured.err)
    assert load(tmp_path / "o" / "c.nii.gz")[0].shape == (20, 18, 16)
    assert captured.out.splitlines()[-1] == "1 predicted, 2 failed"


@pytest.mark.parametrize("where", ["write_nifti", "os.posix_fallocate"])
def test_a_full_disk_ends_it_at_once(tmp_path, save, scan, monkeypatch, capsys, where):
    scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    tried = []

    def full(*arguments, **options):
        tried.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"medssl.segmentation.predict.{where}", full)
    keys = {"weights": save(), "input": tmp_path / "scans", "output_dir": tmp_path / "o", "probabilities": "true"}
    assert predict(**keys) == 2
    assert len(tried) == 1
    assert "o: the disk is full at a; finished results are kept; make room" in capsys.readouterr().err
