"""The transformers that predict hidden patches, and the mask token of the encoder."""

import pytest
import torch

from medssl.models.masked_transformer import MaskedAutoencoder, SimMIM
from medssl.models.vit import MaskedDecoder, VisionTransformer
from medssl.ops.masking import random_mask
from medssl.ops.patches import patchify

HOME = {"size_voxel": 12, "patch_voxel": 4}


def encoder(**options):
    torch.manual_seed(0)
    return VisionTransformer(**HOME, dim=24, depth=2, num_heads=4, in_channels=2, **options)


def image_and_mask():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, 12, 12, 12, generator=generator)
    return image, random_mask(torch.rand(2, 27, generator=generator), ratio=0.75)


def test_a_hidden_patch_is_the_mask_token_before_its_position_is_added():
    network, (image, mask) = encoder(mask_token=True), image_and_mask()
    embedded = network._embed(image, None, mask.masked)[:, 1:]
    expected = torch.where(mask.masked[..., None], network.mask_token, network.patch_embed(patchify(image, 4)))
    assert torch.equal(embedded, expected + network.pos_embed[:, 1:])


def test_without_the_option_there_is_no_mask_token_and_nothing_can_be_masked():
    (image, mask), plain, masking = image_and_mask(), encoder(), encoder(mask_token=True)
    assert masking.state_dict().keys() - plain.state_dict().keys() == {"mask_token"}
    assert torch.equal(masking.tokens(image), plain.tokens(image))
    assert masking.mask_token.std().item() == pytest.approx(0.02, rel=0.4)
    with pytest.raises(ValueError, match="has no mask token; build it with mask_token=true"):
        plain.tokens(image, masked=mask.masked)


def test_a_segmenter_has_no_mask_token_and_leaves_out_that_of_a_file():
    stored = encoder(mask_token=True).state_dict()
    recipe = {**HOME, "dim": 24, "depth": 2, "num_heads": 4, "in_channels": 2, "mask_token": True}
    completed = VisionTransformer.segmentation_recipe(recipe, None)
    assert completed["mask_token"] is False
    network = VisionTransformer(**completed)
    assert "mask_token" in stored
    assert network.adapt(stored).keys() == network.state_dict().keys()
    assert "mask_token" not in VisionTransformer.segmentation_recipe({**HOME, "depth": 2}, None)


@pytest.mark.parametrize("class_token", [True, False])
def test_simmim_predicts_each_patch_from_its_own_token(class_token):
    network, (image, mask) = SimMIM(encoder(mask_token=True, class_token=class_token)), image_and_mask()
    prediction = network(image, mask)
    tokens = network.encoder.tokens(image, masked=mask.masked)[:, int(class_token) :]
    assert torch.equal(patchify(prediction, 4), network.head(tokens))
    prediction.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert network.encoder.mask_token.grad.abs().sum() > 0


def test_the_masked_autoencoder_computes_visible_patches_alone():
    decoder = MaskedDecoder(**HOME, encoder_dim=24, dim=12, depth=1, num_heads=3, out_channels=2)
    network, (image, mask) = MaskedAutoencoder(encoder(), decoder), image_and_mask()
    seen = []
    network.encoder.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    prediction = network(image, mask)
    assert seen == [1 + 6]  # CLS and a quarter of 27
    expected = decoder(network.encoder.tokens(image, mask.keep), mask.keep, grid=(3, 3, 3))
    assert torch.equal(patchify(prediction, 4), expected)


def test_an_encoder_with_the_wrong_tokens_is_refused():
    decoder = MaskedDecoder(**HOME, encoder_dim=24, dim=12, depth=1, num_heads=3, out_channels=2)
    for options in ({"class_token": False}, {"mask_token": True}):
        with pytest.raises(ValueError, match="needs an encoder with class_token=true and mask_token=false"):
            MaskedAutoencoder(encoder(**options), decoder)
    with pytest.raises(ValueError, match="SimMIM needs an encoder with mask_token=true"):
        SimMIM(encoder())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_dim": 12}, r"method\.decoder\.encoder_dim=12 must be that of the encoder, 24"),
        ({"patch_voxel": 2}, r"predicts 16 values for each patch, which has 128: .* patch_voxel .* \[4, 4, 4\]"),
        ({"out_channels": 1}, r"predicts 64 values for each patch, which has 128: .* and its 2 out_channels"),
    ],
)
def test_a_decoder_that_does_not_fit_the_encoder_is_refused(options, message):
    sizes = {**HOME, "encoder_dim": 24, "dim": 12, "depth": 1, "num_heads": 3, "out_channels": 2}
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(encoder(), MaskedDecoder(**{**sizes, **options}))
