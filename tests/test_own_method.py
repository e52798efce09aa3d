"""The method of docs/your-own-method.md learns, and its file is read only by those who trust it."""

import sys

import pytest
import torch
from pages import steps

import medssl
from medssl.config import main
from medssl.pretrain import run


def test_the_documented_method_trains_from_outside_and_its_encoder_loads(tmp_path, monkeypatch, capsys):
    for step in steps("your-own-method.md"):
        if step.kind == "file":
            path = tmp_path / step.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    small = ["data=phantoms", "data.num_cases=2", "data.size_voxel=48", "trainer.max_steps=12", "validate_every=null"]
    main("pretrain", run, arguments=["--config-dir", "conf", "method=inpaint", *small, "output_dir=out"])

    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,erased,kept,")
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])
    assert "medssl.load_encoder(\"out/encoder.safetensors\", allow_modules=['inpaint'])" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"allow_modules=\['inpaint'\]"):
        medssl.load_encoder(tmp_path / "out" / "encoder.safetensors")
    encoder = medssl.load_encoder(tmp_path / "out" / "encoder.safetensors", allow_modules=["inpaint"])
    shapes = [tuple(features.shape) for features in encoder(torch.zeros(1, 1, 16, 24, 32))]
    assert shapes == [(1, 8, 16, 24, 32), (1, 16, 8, 12, 16)]
    card = medssl.read_card(tmp_path / "out" / "encoder.safetensors")
    assert card["reading"]["normalisations"] == ["medssl.data.augment.ByModality"]
