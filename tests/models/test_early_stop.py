"""Every decoder can end after its first blocks."""

import pytest
import torch

from medssl.models.segmenter import build_segmenter
from medssl.models.swin import SwinEncoder

NETWORKS = {  # encoder, decoder, side of the image
    "unet": ({"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 6, 8]}, None, 8),
    "resenc": (
        {
            "_target_": "medssl.models.resenc.ResidualEncoder",
            "widths": [4, 6, 8],
            "blocks": [1, 1, 1],
            "strides": [1, [2, 2, 1], 2],
        },
        None,
        8,
    ),
    "swin": (
        {
            "_target_": f"{SwinEncoder.__module__}.SwinEncoder",
            "feature_size": 6,
            "num_heads": [1, 2, 2, 2],
            "window_voxel": 2,
            "depths": [1, 1, 1, 1],
        },
        {"_target_": "medssl.models.unet.UNetDecoder", "image_width": 4},
        32,
    ),
    "coarse": ({"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8], "strides": [4, 2]}, None, 16),
    "unetr": (
        {
            "_target_": "medssl.models.vit.VisionTransformer",
            "size_voxel": 16,
            "patch_voxel": [8, 8, 8],
            "dim": 24,
            "depth": 3,
            "num_heads": 2,
        },
        {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 4},
        16,
    ),
    "nnformer": (
        {
            "_target_": "medssl.models.nnformer.NnFormerEncoder",
            "size_voxel": 32,
            "feature_size": 6,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_tokens": [2, 2, 2, 2],
        },
        {
            "_target_": "medssl.models.nnformer.NnFormerDecoder",
            "size_voxel": 32,
            "depths": [1, 1, 1],
            "num_heads": [1, 1, 2],
            "window_tokens": [2, 2, 2],
        },
        32,
    ),
    "macl": ({"_target_": "medssl.models.macl_unet.MACLUNetEncoder", "base_channels": 4, "num_levels": 3}, None, 8),
    "attention": (
        {"_target_": "medssl.models.macl_unet.MACLUNetEncoder", "base_channels": 4, "num_levels": 3},
        {"_target_": "medssl.models.attention_unet.AttentionUNetDecoder"},
        8,
    ),
    "kaf": (
        {"_target_": "medssl.models.kaf_unet.KAFEncoder", "base_channels": 4, "levels": [1, 1], "mode": "zero"},
        None,
        8,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_decoder_ends_after_its_first_blocks(name):
    torch.manual_seed(0)
    encoder_recipe, decoder_recipe, side = NETWORKS[name]
    network, _ = build_segmenter(encoder_recipe, decoder_recipe, num_classes=2, in_channels=1)
    encoder, decoder = network.encoder, network.decoder
    image = torch.randn(2, 1, side, side, side)
    features = [level.detach() for level in encoder.eval()(image)]
    whole = decoder.eval()(image, features)
    for num_blocks in range(1, len(whole) + 1):
        decoded = decoder(image, features, num_blocks=num_blocks)
        assert len(decoded) == num_blocks
        assert all(torch.equal(a, b) for a, b in zip(decoded, whole[-num_blocks:], strict=True))
        assert decoded[0].shape[1] == decoder.channels[-num_blocks]
        assert tuple(side // step for step in decoder.strides[-num_blocks]) == tuple(decoded[0].shape[2:])
    decoder.train()(image, features, num_blocks=1)[0].square().mean().backward()
    trained = [parameter.grad is not None for parameter in decoder.parameters()]
    assert any(trained)
    assert not all(trained)
    with pytest.raises(ValueError, match=rf"num_blocks is {len(whole) + 1}, this decoder has {len(whole)} blocks"):
        decoder(image, features, num_blocks=len(whole) + 1)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        decoder(image, features, num_blocks=0)


def test_steps_to_full_resolution_that_are_not_run_do_not_look_at_the_image():
    network, _ = build_segmenter(*NETWORKS["coarse"][:2], num_classes=2, in_channels=1)
    encoder, decoder = network.encoder, network.decoder
    features = encoder(torch.randn(1, 1, 16, 16, 16))
    (coarse,) = decoder(torch.full((1, 1, 16, 16, 16), torch.nan), features, num_blocks=1)
    assert coarse.isfinite().all()
    coarse.sum().backward()
    assert all(parameter.grad is None for parameter in decoder.image_levels.parameters())
