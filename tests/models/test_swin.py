import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer, SwinUNETR

from medssl.models.segmenter import build_segmenter
from medssl.models.swin import SwinEncoder

TINY = {"feature_size": 12, "num_heads": (2, 2, 4, 4), "window_voxel": 2}


def rearrange(x, pattern):
    """The two patterns in MONAI's encoder, for machines without einops."""
    before, after = (side.split() for side in pattern.split("->"))
    return x.permute([before.index(axis) for axis in after])


@pytest.mark.parity
@pytest.mark.parametrize("size", [(32, 32, 32), (32, 64, 32)])
def test_maps_are_those_of_monai_s_encoder_with_the_same_weights(monkeypatch, size):
    monkeypatch.setattr("monai.networks.nets.swin_unetr.rearrange", rearrange)
    torch.manual_seed(0)
    ours = SwinEncoder(in_channels=2, **TINY).eval()
    theirs = SwinTransformer(
        in_chans=2,
        embed_dim=12,
        window_size=(2, 2, 2),
        patch_size=(2, 2, 2),
        depths=(2, 2, 2, 2),
        num_heads=(2, 2, 4, 4),
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 2, *size)
    with torch.no_grad():
        maps, expected = ours(image), theirs(image)
    for level, wanted, width, stride in zip(maps, expected, ours.channels, ours.strides, strict=True):
        assert level.shape == (1, width, *(side // step for side, step in zip(size, stride, strict=True)))
        assert torch.allclose(level, wanted, atol=1e-5)


@pytest.mark.parity
def test_its_tensors_are_those_of_the_encoder_in_monai_s_swin_unetr():
    ours = SwinEncoder(feature_size=12)
    theirs = SwinUNETR(in_channels=1, out_channels=2, feature_size=12).swinViT
    shapes = [{key: tensor.shape for key, tensor in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert SwinEncoder().channels == (48, 96, 192, 384, 768)
    assert ours.strides == tuple((2**level,) * 3 for level in range(1, 6))


def test_it_makes_a_segmenter_whose_every_weight_learns():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        recipe = {"_target_": "medssl.models.swin.SwinEncoder", **TINY, "checkpoint_activations": checkpointed}
        network, _ = build_segmenter(recipe, None, num_classes=3, in_channels=1)
        logits = network(torch.linspace(-9, 9, 32**3).sin().reshape(1, 1, 32, 32, 32))
        assert logits.shape == (1, 3, 32, 32, 32)
        logits.square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert network.multiple_voxel == (32, 32, 32)
    assert network.decoder.channels == (12, 12, 24, 48, 96)
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_flat_tokens_give_flat_strides():
    network, _ = build_segmenter(
        {"_target_": "medssl.models.swin.SwinEncoder", **TINY, "patch_voxel": [2, 2, 1]},
        None,
        num_classes=2,
        in_channels=1,
    )
    assert network.multiple_voxel == (32, 32, 16)
    assert network.decoder.strides[:2] == ((1, 1, 1), (2, 2, 1))
    assert network(torch.randn(1, 1, 32, 32, 16)).shape == (1, 2, 32, 32, 16)


def test_a_stem_of_another_number_of_channels_is_fitted():
    one, four = SwinEncoder(**TINY).eval(), SwinEncoder(in_channels=4, **TINY).eval()
    four.load_state_dict(four.adapt(one.state_dict()))
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.allclose(four(image.expand(-1, 4, -1, -1, -1))[-1], one(image)[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [2, 2, 2]}, "depths and num_heads need four entries"),
        ({"feature_size": 10, "num_heads": (3, 6, 12, 24)}, "feature_size 10 cannot be split over 3 attention heads"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SwinEncoder(**{**TINY, **options})
