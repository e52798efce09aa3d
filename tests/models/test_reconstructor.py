"""Predictions of every voxel by any encoder and its decoder."""

import pytest
import torch

from medssl.models.reconstructor import Reconstructor
from medssl.models.resenc import ResidualEncoder
from medssl.models.unet import UNetDecoder, UNetEncoder


def small(**options):
    encoder = UNetEncoder(in_channels=2, widths=(4, 6, 8))
    return Reconstructor(encoder, None, out_channels=2, **options)


@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_the_prediction_is_as_large_as_the_image_and_every_weight_learns(output):
    torch.manual_seed(0)
    network = small(output=output)
    predicted = network(torch.randn(2, 2, 16, 8, 12))
    assert predicted.shape == (2, 2, 16, 8, 12)
    assert (output == "sigmoid") == bool((predicted > 0).all() and (predicted < 1).all())
    predicted.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match="output is 'tanh', allowed are linear, sigmoid"):
        small(output="tanh")


@pytest.mark.parity
def test_six_stages_have_the_weights_of_resenc_l():
    """References card, 0.3: 90,284,320 in the encoder and 12,050,784 in the decoder, without conv biases."""
    with torch.device("meta"):
        encoder = ResidualEncoder(
            widths=(32, 64, 128, 256, 320, 320), strides=(1, 2, 2, 2, 2, 2), blocks=(1, 3, 4, 6, 6, 6)
        )
        decoder = UNetDecoder(
            in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides, convs_per_stage=1
        )
    assert sum(p.numel() for p in encoder.parameters()) == 90_284_320
    assert sum(p.numel() for p in decoder.parameters()) == 12_050_784
