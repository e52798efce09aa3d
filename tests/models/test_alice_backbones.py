import pytest
import torch
from oracles.nnformer import wave

from medssl.building import build_network
from medssl.models.alice_backbones import Backbone
from medssl.models.nnformer import NnFormer

NNFORMER = {
    "_target_": "medssl.models.nnformer.NnFormerEncoder",
    **{"size_voxel": 32, "feature_size": 12, "num_heads": [2, 2, 4, 4], "window_tokens": [4, 4, 4, 2]},
}
NNFORMER_DECODER = {
    "_target_": "medssl.models.nnformer.NnFormerDecoder",
    **{"size_voxel": 32, "num_heads": [2, 2, 4], "window_tokens": [4, 4, 4]},
}
SWIN = {"_target_": "medssl.models.swin.SwinEncoder", "feature_size": 12, "num_heads": [2, 2, 4, 4], "window_voxel": 2}
UNET = {"_target_": "medssl.models.unet.UNetDecoder", "convs_per_stage": 1, "image_width": 4}
VIT = {
    "_target_": "medssl.models.vit.VisionTransformer",
    **{"size_voxel": 32, "patch_voxel": 8, "dim": 24, "depth": 3, "num_heads": 2, "in_channels": 2},
}
UNETR = {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 4}
NETWORKS = {  # recipes, channels and sides of bottleneck and first decoded map at 32 x 32 x 64 voxels
    "nnformer": (NNFORMER, NNFORMER_DECODER, (96, (2, 2, 4)), (48, (4, 4, 8))),
    "swinunetr": (SWIN, UNET, (192, (1, 1, 2)), (96, (2, 2, 4))),
    "unetr": (VIT, UNETR, (24, (4, 4, 8)), (16, (8, 8, 16))),
}


def recipe(encoder, decoder, **options):
    return {"_target_": "medssl.models.alice_backbones.Backbone", "encoder": encoder, "decoder": decoder, **options}


def backbone(name, **options):
    torch.manual_seed(0)
    encoder, decoder, *_ = NETWORKS[name]
    return build_network(recipe(encoder, decoder, **options)).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_of_two_depths_and_the_crop_come_out(name):
    network, (_, _, bottleneck, decoded) = backbone(name), NETWORKS[name]
    image = wave((2, network.in_channels, 32, 32, 64), 0.37)
    with torch.no_grad():
        output = network(image)
        maps = network.encoder(image)
    assert output.bottleneck.shape == (2, bottleneck[0], *bottleneck[1])
    assert output.decoded.shape == (2, decoded[0], *decoded[1])
    assert output.reconstruction.shape == image.shape
    assert (network.bottleneck_channels, network.decoded_channels) == (bottleneck[0], decoded[0])
    assert torch.equal(output.bottleneck, maps[-1])
    assert torch.allclose(output.pooled, output.bottleneck.flatten(2).mean(2), atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_masked_does_not_matter(name):
    network = backbone(name)
    image, other = (wave((2, network.in_channels, 32, 32, 32), step) for step in (0.37, 0.73))
    mask = torch.arange(2 * 64).reshape(2, 1, 4, 4, 4) % 3 == 0
    hidden = mask.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    with torch.no_grad():
        output = network(image, mask)
        assert all(
            torch.equal(a, b) for a, b in zip(output, network(torch.where(hidden, other, image), mask), strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(output, network(image * ~hidden), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(output, network(image, mask.float()), strict=True))
        one = network(image, mask[:1])  # one mask for the whole batch
        assert torch.allclose(one.pooled[0], output.pooled[0], atol=1e-5)
        assert not torch.allclose(one.pooled[1], output.pooled[1], atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_learns(name):
    network = backbone(name)
    image = wave((2, network.in_channels, 64, 32, 32), 0.37)
    output = network(image, torch.ones(1, 1, 4, 4, 4))
    (output.bottleneck.square().sum() + output.decoded.square().sum()).backward(retain_graph=True)
    output.reconstruction.sub(image).square().mean().backward()
    idle = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_the_mask_token_takes_the_place_of_masked_tokens():
    network, zero = backbone("nnformer", mask_mode="token"), backbone("nnformer")
    image, mask = wave((2, 1, 32, 32, 32), 0.37), torch.zeros(1, 1, 4, 4, 4)
    mask[0, 0, 1:3, 1:3, 1:3] = 1
    zero.load_state_dict(network.state_dict())
    assert (network.encoder.mask_token.requires_grad, zero.encoder.mask_token.requires_grad) == (True, False)
    output = network(image, mask)
    assert not torch.allclose(output.pooled, zero(image, mask).pooled, atol=1e-4)
    assert torch.equal(network(image).pooled, zero(image).pooled)
    output.pooled.sum().backward()
    assert network.encoder.mask_token.grad.abs().sum() > 0


def test_recipes_and_keywords_build_the_same_network():
    torch.manual_seed(0)
    options = {key: value for key, value in NNFORMER.items() if key != "_target_"}
    network, other = NnFormer(**options), backbone("nnformer")
    other.load_state_dict(network.state_dict())
    image = wave((1, 1, 32, 32, 32), 0.37)
    with torch.no_grad():
        assert torch.equal(network.eval()(image).reconstruction, other(image).reconstruction)
    assert list(network.parts()) == ["encoder", "decoder", "reconstruction"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="mask_mode is 'drop', allowed are zero, token"):
        backbone("nnformer", mask_mode="drop")
    with pytest.raises(ValueError, match="SwinEncoder has no mask token; use mask_mode=zero"):
        backbone("swinunetr", mask_mode="token")
    with pytest.raises(ValueError, match=r"a mask of \(5, 4, 4\) entries does not divide a crop of \(32, 32, 32\)"):
        backbone("nnformer")(torch.zeros(1, 1, 32, 32, 32), torch.zeros(1, 1, 5, 4, 4))
    with pytest.raises(ValueError, match=r"outside medssl\.models"):
        build_network(recipe({"_target_": "os.system"}, UNET))
    assert isinstance(backbone("nnformer"), Backbone)
