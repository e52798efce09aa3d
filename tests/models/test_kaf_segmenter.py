"""KAF's U-Net as a segmenter: keypoints are found on every crop and window."""

from types import SimpleNamespace

import pytest
import torch

from medssl.models.kaf_unet import KAFDecoder
from medssl.models.segmenter import build_segmenter
from medssl.segmentation.sliding_window import SlidingWindow
from medssl.weights import load_segmenter, save_weights

ENCODER = {
    "_target_": "medssl.models.kaf_unet.KAFEncoder",
    **{"base_channels": 4, "num_layers": 1, "dim": 16, "hidden": 8, "position_widths": [8, 8], "max_points": 6},
}


class Brightest:
    """Stands for a detector: the brightest voxels above 1."""

    def __init__(self):
        self.calls = []

    def detect(self, image, *, max_points, detector):
        self.calls.append((tuple(image.shape), max_points))
        assert not torch.is_grad_enabled() or not image.requires_grad
        response, index = image.mean(1).flatten(1).topk(max_points)
        points = torch.stack(torch.unravel_index(index, image.shape[2:]), dim=-1).float()
        return SimpleNamespace(points=points, valid=response > 1, scale=None, response=response)


@pytest.fixture
def brightest(monkeypatch):
    found = Brightest()
    monkeypatch.setattr("medssl.models.kaf_unet.detect", found.detect)
    return found


def segmenter(**options):
    torch.manual_seed(0)
    return build_segmenter({**ENCODER, **options}, None, num_classes=3, in_channels=2)


def test_keypoints_of_the_image_are_used_where_none_are_given(brightest):
    network, _ = segmenter()
    image = torch.randn(2, 2, 16, 16, 16)
    maps = network.encoder.eval()(image)
    assert brightest.calls == [((2, 2, 16, 16, 16), 6)]
    found = brightest.detect(image, max_points=6, detector=None)
    assert found.valid.any()
    given = network.encoder(image, points=found.points, valid=found.valid)
    assert all(torch.equal(a, b) for a, b in zip(maps, given, strict=True))
    without = network.encoder(image, points=found.points, valid=torch.zeros_like(found.valid))
    assert not torch.allclose(maps[-1], without[-1])


def test_a_segmenter_passes_given_keypoints_to_its_encoder(brightest):
    network, _ = segmenter()
    network.eval()
    image = torch.randn(2, 2, 16, 16, 16)
    found = brightest.detect(image, max_points=6, detector=None)
    brightest.calls.clear()
    given = {"points": found.points, "valid": found.valid}
    logits, outputs = network(image, **given), network.outputs(image, **given)
    assert brightest.calls == [], "nothing is looked for where keypoints are given"
    assert torch.equal(logits, network(image))
    assert torch.equal(outputs[0], logits)
    without = network(image, points=found.points, valid=torch.zeros_like(found.valid))
    assert not torch.allclose(logits, without)


def test_keypoints_for_an_encoder_without_any_are_refused():
    encoder = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8], "strides": [1, 2]}
    network, _ = build_segmenter(encoder, None, num_classes=3, in_channels=2)
    with pytest.raises(ValueError, match="UNetEncoder takes no keypoints; leave points out"):
        network(torch.randn(1, 2, 16, 16, 16), points=torch.zeros(1, 1, 3))


@pytest.mark.parametrize("name", ["DifferenceOfGaussians", "Foerstner"])
def test_recipes_name_the_detector(name):
    network, recipes = segmenter(detector={"_target_": f"medssl.models.keypoints.{name}"})
    assert type(network.encoder.detector).__name__ == name
    assert recipes["encoder"]["detector"]["_target_"].endswith(name)
    distance = torch.cdist(torch.cartesian_prod(*[torch.arange(32.0)] * 3), torch.tensor([[14.0, 15.0, 17.0]]))
    blob = (-distance.square() / 8).exp().view(1, 1, 32, 32, 32).expand(1, 2, -1, -1, -1)
    points, valid = network.encoder.find(blob)
    assert valid.any()
    assert (points[0, 0] - torch.tensor([14, 15, 17])).abs().max() < 2


def test_a_segmenter_trains_on_crops_some_of_which_have_no_keypoints(brightest):
    network, recipes = segmenter()
    assert isinstance(network.decoder, KAFDecoder)
    assert recipes["decoder"] == {"_target_": "medssl.models.kaf_unet.KAFDecoder", "norm": "batch"}
    image = torch.cat([torch.randn(1, 2, 16, 16, 16), torch.zeros(1, 2, 16, 16, 16)])
    outputs = network.outputs(image)
    assert outputs[0].shape == (2, 3, 16, 16, 16)
    sum(output.square().mean() for output in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("mode", ["use", "duplicate", "zero"])
def test_windows_of_air_and_of_tissue_are_predicted(brightest, mode):
    network, _ = segmenter(mode=mode)
    network.eval()
    image = torch.zeros(2, 32, 16, 16)
    image[:, 16:] = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = SlidingWindow((16, 16, 16), 0.0, batch_size=2)(image, lambda x: network(x).softmax(1))
        alone = network(image[None, :, :16]).softmax(1)[0]
    assert predicted.sum(0).allclose(torch.ones(32, 16, 16))
    assert torch.allclose(predicted[:, :16], alone, atol=1e-5)
    assert [shape for shape, _ in brightest.calls] == (
        [(2, 2, 16, 16, 16), (1, 2, 16, 16, 16)] if mode == "use" else []
    )


def test_a_segmenter_file_builds_the_same_network_again(brightest, tmp_path):
    network, recipes = segmenter(mode="use", levels=[1, 0, 1, 1])
    card = {**recipes, "kind": "segmenter", "classes": {"0": "background", "1": "a", "2": "b"}}
    save_weights(tmp_path / "segmenter.safetensors", network.parts(), card)
    again, _ = load_segmenter(tmp_path / "segmenter.safetensors")
    image = torch.randn(1, 2, 16, 16, 16)
    assert torch.equal(again(image), network.eval()(image))
