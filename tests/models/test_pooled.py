"""Means of an encoder's maps and the projector of contrastive methods."""

import pytest
import torch

from medssl.models.pooled import BatchStandardise, PooledProjector, RowNorm
from medssl.models.resenc import ResidualEncoder
from medssl.models.unet import UNetEncoder
from medssl.models.vit import VisionTransformer


def projector(encoder, **options):
    return PooledProjector(encoder.channels, encoder.strides, **{"hidden_dim": 12, "out_dim": 6, **options})


@pytest.mark.parity
@pytest.mark.parametrize(
    ("channels", "strides", "in_dim", "weights"),
    [
        ((32, 64, 128, 256, 320, 320), (1, 2, 4, 8, 16, 32), 1120, 10_688_512),
        ((864,) * 4, (8,) * 4, 864, 10_164_224),  # Primus-M
    ],
)
def test_the_published_projectors_have_the_known_numbers_of_weights(channels, strides, in_dim, weights):
    """References card, section 4."""
    with torch.device("meta"):
        found = PooledProjector(channels, strides)
    assert (found.in_dim, sum(p.numel() for p in found.parameters())) == (in_dim, weights)


def test_every_map_of_a_pyramid_is_averaged_or_the_last_alone():
    torch.manual_seed(0)
    encoder = UNetEncoder(widths=(4, 6, 8))
    maps = encoder(torch.randn(2, 1, 16, 8, 12))
    means = [level.mean((2, 3, 4)) for level in maps]
    torch.testing.assert_close(projector(encoder).pooled(maps), torch.cat(means, dim=1))
    torch.testing.assert_close(projector(encoder, maps="last").pooled(maps), means[-1])


def test_the_tokens_of_a_transformer_are_averaged_after_its_last_block_without_the_class_token():
    torch.manual_seed(0)
    encoder = VisionTransformer(size_voxel=16, patch_voxel=4, dim=12, depth=4, num_heads=2)
    image = torch.randn(2, 1, 16, 16, 16)
    head = projector(encoder)
    assert head.in_dim == 12
    torch.testing.assert_close(head.pooled(encoder(image)), encoder.tokens(image)[:, 1:].mean(1))


def test_rows_are_standardised_over_channels_or_over_the_batch():
    rows = torch.randn(5, 7, dtype=torch.float64) * 3 + 2
    spread = rows.var(1, correction=0, keepdim=True)
    torch.testing.assert_close(RowNorm()(rows), (rows - rows.mean(1, keepdim=True)) / (spread + 1e-5).sqrt())
    norm = BatchStandardise().eval()
    expected = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(norm(rows), expected)
    assert not list(norm.state_dict())
    with pytest.raises(ValueError, match="at least 2 rows in each process; raise batch_size or take norm=layer"):
        norm(rows[:1])


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_every_weight_learns(norm):
    torch.manual_seed(0)
    encoder = ResidualEncoder(widths=(4, 8), blocks=(1, 1))
    head = projector(encoder, norm=norm)
    vectors = head(encoder(torch.randn(3, 1, 8, 8, 8)))
    assert vectors.shape == (3, 6)
    vectors[:, 0].square().sum().backward()
    names = {name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()}
    assert names <= {"mlp.0.bias", "mlp.3.bias"} if norm == "batch" else not names  # batch norm takes a shift away
    assert encoder.stem.conv.weight.grad.any()


def test_unknown_choices_are_refused():
    encoder = ResidualEncoder(widths=(4, 8, 8), blocks=(1, 1, 1))
    for name, value in (("norm", "instance"), ("maps", "first")):
        with pytest.raises(ValueError, match=f"{name} is '{value}', allowed are"):
            projector(encoder, **{name: value})


@pytest.mark.parametrize("name", ["hidden_dim", "out_dim"])
@pytest.mark.parametrize("width", [0, -1])
def test_a_width_below_one_is_refused(name, width):
    message = rf"method\.projector\.{name} must be a whole number from 1 up; got {width}"
    with pytest.raises(ValueError, match=message):
        PooledProjector((4, 8), (1, 2), **{name: width})
