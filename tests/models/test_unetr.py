import pytest
import torch
from monai.networks.nets import UNETR
from torch import nn

from medssl.models.segmenter import build_segmenter
from medssl.models.unetr import UNETRDecoder

VIT = "medssl.models.vit.VisionTransformer"
OUR_NAMES = {  # module of MONAI's UNETR -> ours
    "encoder1": "decoder.image_level",
    "encoder2": "decoder.projections.0",
    "encoder3": "decoder.projections.1",
    "encoder4": "decoder.projections.2",
    "decoder2": "decoder.ups.0",
    "decoder3": "decoder.ups.1",
    "decoder4": "decoder.ups.2",
    "decoder5": "decoder.ups.3",
    "out.conv.conv": "head.0",
}


def num_weights(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parity
def test_the_paper_s_network_has_the_card_s_parameter_counts():
    with torch.device("meta"):
        network, _ = build_segmenter({"_target_": VIT, "size_voxel": 96}, None, num_classes=14, in_channels=1)
    assert network.encoder.feature_depths == (4, 7, 10, 12)
    assert num_weights(network.encoder) == 88_368_384
    assert num_weights(network.decoder) + num_weights(network.head) == 27_009_518
    assert num_weights(network) == 115_377_902


class Rearrange(nn.Module):
    """The two patterns in MONAI's attention, for machines without einops."""

    def __init__(self, pattern, **sizes):
        super().__init__()
        self.split, self.sizes = pattern.startswith("b h (qkv"), sizes

    def forward(self, x):
        if self.split:
            return x.unflatten(2, (self.sizes["qkv"], self.sizes["l"], -1)).permute(2, 0, 3, 1, 4)
        return x.transpose(1, 2).flatten(2)


def paired_with_monai():
    """A tiny network of ours and MONAI's UNETR with the same weights."""
    torch.manual_seed(0)
    recipe = {"_target_": VIT, "size_voxel": 32, "dim": 24, "depth": 12, "num_heads": 2, "mlp_ratio": 2.0}
    ours, _ = build_segmenter(
        recipe, {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 4}, num_classes=3, in_channels=2
    )
    theirs = UNETR(
        in_channels=2,
        out_channels=3,
        img_size=32,
        feature_size=4,
        hidden_size=24,
        mlp_dim=48,
        num_heads=2,
        proj_type="conv",
        norm_name="instance",
        conv_block=True,
        res_block=True,
        qkv_bias=True,
    )
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    state = dict(theirs.state_dict())
    mapped = {}
    for key, tensor in ours.encoder.state_dict().items():
        name = {"pos_embed": "patch_embedding.position_embeddings"}.get(key, key)
        name = name.replace("patch_embed.proj", "patch_embedding.patch_embeddings")
        name = name.replace("attn.proj", "attn.out_proj").replace("mlp.fc", "mlp.linear")
        mapped[f"vit.{name}"] = tensor
    for theirs_name, ours_name in OUR_NAMES.items():
        ours_module = ours.get_submodule(ours_name)
        mapped |= {f"{theirs_name}.{key}": tensor for key, tensor in ours_module.state_dict().items()}
    unused = {key for key in state if "cross_attn" in key}
    assert mapped.keys() == state.keys() - unused
    theirs.load_state_dict({**{key: state[key] for key in unused}, **mapped})
    return ours.eval(), theirs.eval()


@pytest.mark.parity
def test_logits_are_those_of_monai_s_unetr_with_the_same_weights(monkeypatch):
    monkeypatch.setattr("monai.networks.blocks.selfattention.Rearrange", Rearrange)
    ours, theirs = paired_with_monai()
    image = torch.randn(2, 2, 32, 32, 32)
    with torch.no_grad():
        expected, logits = theirs(image), ours(image)
    assert logits.shape == (2, 3, 32, 32, 32)
    assert expected.std() > 0.1
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((8, 8, 8), [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        ((4, 4, 4), [(1, 1, 1), (2, 2, 2)]),
        ((2, 2, 2), [(1, 1, 1)]),
        ((16, 8, 4), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 4, 2)]),
        ((1, 4, 4), [(1, 1, 1), (1, 2, 2)]),
    ],
)
def test_other_patches_take_as_many_steps_as_their_longest_side_has_halvings(patch, strides):
    depth = len(strides)
    recipe = {"_target_": VIT, "size_voxel": 16, "patch_voxel": patch, "dim": 12, "depth": 2 * depth, "num_heads": 2}
    network, _ = build_segmenter(
        recipe, {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 4}, num_classes=2, in_channels=1
    )
    assert len(network.encoder.feature_depths) == depth
    image = torch.randn(1, 1, 16, 16, 32)
    decoded = network.decoder(image, network.encoder(image))
    assert list(network.decoder.strides) == strides
    for level, stride, width in zip(decoded, strides, network.decoder.channels, strict=True):
        assert level.shape == (1, width, *(side // step for side, step in zip((16, 16, 32), stride, strict=True)))
    assert network.decoder.channels == tuple(4 << level for level in range(depth))
    network(image).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_only_the_last_maps_are_used_where_there_are_more_than_steps():
    decoder = UNETRDecoder(
        in_channels=1, encoder_channels=[6] * 4, encoder_strides=[(4, 4, 4)] * 4, feature_size=4
    ).eval()
    image, maps = torch.randn(1, 1, 8, 8, 8), [torch.randn(1, 6, 2, 2, 2) for _ in range(4)]
    full = decoder(image, maps)[0]
    assert torch.equal(decoder(image, [torch.zeros_like(maps[0])] * 2 + maps[2:])[0], full)
    assert not torch.equal(decoder(image, [*maps[:2], maps[0], maps[3]])[0], full)


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        decoder = UNETRDecoder(
            in_channels=1,
            encoder_channels=[6] * 2,
            encoder_strides=[(4, 4, 4)] * 2,
            feature_size=4,
            checkpoint_activations=checkpointed,
        )
        torch.manual_seed(1)
        decoder(torch.randn(1, 1, 8, 8, 8), [torch.randn(1, 6, 2, 2, 2)] * 2)[0].square().mean().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("channels", "strides", "message"),
    [
        ([6, 6], [(2, 2, 2), (4, 4, 4)], r"takes maps of one stride, these have \[\(2, 2, 2\), \(4, 4, 4\)\]"),
        ([6, 6], [(8, 8, 8)] * 2, r"patches of \(8, 8, 8\) voxels uses 3 maps of the encoder, it gives 2"),
        ([6], [(12, 12, 12)], r"strides of \(12, 12, 12\) voxels cannot be undone by doubling"),
        ([6], [(1, 1, 1)], "uses 0 maps of the encoder"),
    ],
)
def test_maps_that_it_cannot_decode_are_refused(channels, strides, message):
    with pytest.raises(ValueError, match=message):
        UNETRDecoder(in_channels=1, encoder_channels=channels, encoder_strides=strides)
