import math

import pytest
import torch

from medssl.models.attention_unet import AttentionGate, AttentionUNetDecoder
from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder


def networks(dims=3, **options):
    torch.manual_seed(0)
    encoder = MACLUNetEncoder(spatial_dims=dims, base_channels=4, num_levels=2)
    fitted = {"in_channels": 1, "encoder_channels": encoder.channels, "encoder_strides": encoder.strides}
    return encoder, AttentionUNetDecoder(**fitted, **options), MACLUNetDecoder(**fitted, **options)


@torch.no_grad()
@pytest.mark.parametrize("train", [True, False])
def test_a_gate_is_its_sums_written_out(train):
    torch.manual_seed(0)
    gate = AttentionGate(4, spatial_dims=2, norm="batch").double().train(train)
    for tensor in (*gate.parameters(), gate.to_weight.norm.running_mean):
        tensor.data += 0.3 * torch.randn(tensor.shape)
    up, skip = torch.randn(2, 2, 4, 3, 2, dtype=torch.float64)

    def project(layers, x):
        weight, bias, norm = layers.conv.weight[:, :, 0, 0], layers.conv.bias, layers.norm
        channels = []
        for row in range(len(weight)):
            values = bias[row] + sum(weight[row, c] * x[:, c] for c in range(x.shape[1]))
            mean = values.mean() if train else norm.running_mean[row]
            var = values.var(correction=0) if train else norm.running_var[row]
            channels.append((values - mean) / (var + norm.eps) ** 0.5 * norm.weight[row] + norm.bias[row])
        return torch.stack(channels, 1)

    score = project(gate.to_weight, (project(gate.from_up, up) + project(gate.from_skip, skip)).clamp(min=0))
    wanted = torch.empty_like(skip)
    for sample, channel, i, j in torch.cartesian_prod(*(torch.arange(side) for side in skip.shape)).tolist():
        weight = 1 / (1 + math.exp(-score[sample, 0, i, j]))
        wanted[sample, channel, i, j] = weight * skip[sample, channel, i, j]
    assert torch.allclose(gate(up, skip), wanted, atol=1e-12, rtol=0)


def test_open_gates_leave_the_decoder_of_the_plain_network_and_closed_ones_no_skips():
    encoder, gated, plain = networks()
    plain.load_state_dict({key: tensor for key, tensor in gated.state_dict().items() if not key.startswith("gates.")})
    image = torch.randn(2, 1, 8, 8, 8)
    maps = encoder(image)
    for bias, features in ((100.0, maps), (-100.0, [*(torch.zeros_like(skip) for skip in maps[:-1]), maps[-1]])):
        for gate in gated.gates:
            gate.to_weight.norm.bias.data.fill_(bias)
        for ours, wanted in zip(gated(image, maps), plain(image, features), strict=True):
            assert torch.allclose(ours, wanted, atol=1e-5)


def test_gates_have_the_weights_of_their_layers_and_learn():
    encoder, gated, plain = networks()
    counts = [sum(p.numel() for p in network.parameters()) for network in (gated, plain)]
    wanted = sum(2 * (width * width // 2 + 3 * width // 2) + width // 2 + 3 for width in (4, 8))
    assert counts[0] - counts[1] == wanted
    image = torch.randn(2, 1, 8, 8, 8)
    gated(image, encoder(image))[0].square().mean().backward()
    for gate in gated.gates:
        assert gate.from_up.conv.weight.grad.abs().sum() > 0
        assert gate.from_skip.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_gates_take_the_norm_of_the_decoder(norm):
    encoder, gated, _ = networks(dims=2, norm=norm)
    image = torch.randn(1, 1, 8, 8)
    assert gated(image, encoder(image))[0].isfinite().all()
    assert "gates.0.from_up.norm.running_mean" not in gated.state_dict()


def test_inflated_gates_see_equal_planes_as_that_slice():
    encoder, flat, _ = networks(dims=2)
    deep_encoder, deep, _ = networks()
    deep_encoder.load_state_dict(deep_encoder.adapt(encoder.state_dict()))
    deep.load_state_dict(deep.adapt(flat.state_dict()))
    image = torch.randn(2, 1, 8, 8)
    volume = image[..., None].expand(-1, -1, -1, -1, 4)
    wanted = flat.eval()(image, encoder.eval()(image))[0]
    ours = deep.eval()(volume, deep_encoder.eval()(volume))[0]
    assert torch.allclose(ours, wanted[..., None].expand_as(ours), atol=1e-5)
