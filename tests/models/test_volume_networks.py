"""What the methods of volumes need of an encoder."""

import pytest
from torch import nn

from medssl.models.conditioned import ConditionedEncoder
from medssl.models.kaf_unet import KAFEncoder
from medssl.models.macl_unet import MACLUNetEncoder
from medssl.models.volume_networks import check_encoder

NARROW = {"base_channels": 2, "num_levels": 2}
KAF = {"base_channels": 2, "dim": 12, "num_heads": 2, "num_layers": 1, "hidden": 2, "position_widths": (4,)}


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (nn.Linear(2, 2), "Linear does not describe its maps by `channels` and `strides`, which X needs"),
        (MACLUNetEncoder(spatial_dims=2, **NARROW), "MACLUNetEncoder takes slices, X trains on volumes"),
        (KAFEncoder(**KAF), "KAFEncoder reads keypoints beside the image, which X does not give it"),
        (ConditionedEncoder(), "ConditionedEncoder reads coordinates beside the image, which X does not give it"),
    ],
    ids=["no maps", "slices", "keypoints", "coordinates"],
)
def test_what_an_encoder_lacks_is_named_with_the_networks_that_fit(encoder, message):
    fits = "networks that fit: model=unet | resenc | resenc_l | swinunetr | unetr | nnformer | macl_unet | attention"
    with pytest.raises(ValueError) as refused:
        check_encoder(encoder, method="X")
    assert str(refused.value).startswith(message)
    assert fits in str(refused.value)


def test_slices_are_taken_where_the_method_has_them():
    check_encoder(MACLUNetEncoder(spatial_dims=2, **NARROW), method="X", axes=(2, 3))
    check_encoder(MACLUNetEncoder(**NARROW), method="X")
