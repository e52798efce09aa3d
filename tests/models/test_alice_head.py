import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles.nnformer import fill, published_shapes, wave

from medssl.layouts import alice as layout
from medssl.models.alice_head import AliceHead
from medssl.models.nnformer import NnFormer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "alice.json").read_text())


PUBLISHED = {
    "mlp": "projector.mlp",
    "last_layer": "projector.last_layer",
    "last_layer2": "token_layer",
    "mlp3": "bottleneck_layer",
    "mlp4": "decoded_layer",
}


def small(**options):
    torch.manual_seed(0)
    sizes = {"bottleneck_channels": 6, "decoded_channels": 4, "hidden_dim": 10, "bottleneck_dim": 5}
    return AliceHead(**sizes, num_prototypes=7, init_std=0.3, **options)


def maps():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, *shape, generator=generator) for shape in ((6,), (6, 1, 2, 3), (4, 2, 2, 2))]


@pytest.mark.parity
def test_sizes_are_those_of_the_card():
    tiny = {"bottleneck_channels": 192, "decoded_channels": 96, "hidden_dim": 256, "bottleneck_dim": 64}
    with torch.device("meta"):
        published = AliceHead(bottleneck_channels=384, decoded_channels=192)
        found = {"head": published, "head_tiny": AliceHead(**tiny, num_prototypes=128)}
        found["teacher_head"] = found["head"].teacher(shared=True)
    for name, head in found.items():
        assert sum(p.numel() for p in head.parameters()) == GOLDEN["parameters"][name], name


@pytest.fixture(scope="module")
def tokens_of_a_whole_crop():
    shapes = published_shapes(width=24, heads=(3, 6, 12, 24), windows=(4, 4, 4, 2))
    state = layout.alice({name: fill(name, shape) for name, shape in shapes.items()}, source="", branch="student")
    sizes = {"size_voxel": 32, "feature_size": 24, "num_heads": (3, 6, 12, 24), "window_tokens": (4, 4, 4, 2)}
    backbone = NnFormer(**sizes, ape="none").eval()
    backbone.load_state_dict(state)
    with torch.no_grad():
        return backbone(wave((1, 1, 32, 32, 32), 0.001))[:3]


@pytest.mark.parity
@pytest.mark.parametrize("shared", [False, True])
def test_the_output_for_a_filled_backbone_has_the_card_s_values(tokens_of_a_whole_crop, shared):
    tiny = {"bottleneck_channels": 192, "decoded_channels": 96, "hidden_dim": 256, "bottleneck_dim": 64}
    head = AliceHead(**tiny, num_prototypes=128, shared=shared)
    for theirs, ours in PUBLISHED.items():
        if shared and theirs == "last_layer2":
            continue
        for name, parameter in head.get_submodule(ours).named_parameters():
            if name != "weight_g":  # ones
                parameter.data.copy_(fill(f"{theirs}.{name}", parameter.shape))
    with torch.no_grad():
        found = head(*tokens_of_a_whole_crop)
    expected = GOLDEN["head"]["shared" if shared else "separate"]
    assert [logits.sum().item() for logits in found] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_the_output_equals_a_loop_over_tokens(shared):
    head, (pooled, bottleneck, decoded) = small(shared=shared), maps()
    found = head(pooled, bottleneck, decoded)
    assert [tuple(x.shape) for x in found] == [(2, 7), (2, 6, 7), (2, 8, 7)]

    def cosines(vector, layer):
        hidden = head.projector.mlp(vector)
        return torch.stack([F.cosine_similarity(hidden, row, dim=0) for row in layer.weight_v])

    tokens = head.projector.last_layer if shared else head.token_layer
    for n in range(2):
        assert torch.allclose(found.pooled[n], cosines(pooled[n], head.projector.last_layer), atol=1e-6)
        for source, layer, rows in (
            (bottleneck[n], head.bottleneck_layer, found.bottleneck[n]),
            (decoded[n], head.decoded_layer, found.decoded[n]),
        ):
            for token, row in zip(source.flatten(1).T, rows, strict=True):  # the last axis runs fastest
                assert torch.allclose(row, cosines(layer(token), tokens), atol=1e-6)


def test_a_shared_teacher_starts_with_the_prototypes_of_the_tokens_and_follows_those_of_the_crops():
    student = small()
    teacher = student.teacher(shared=True)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.token_layer is None
    assert torch.equal(teacher.projector.last_layer.weight_v, student.token_layer.weight_v)
    start = teacher.projector.last_layer.weight_v.clone()
    with torch.no_grad():
        student.projector.last_layer.weight_v.add_(1)
        student.bottleneck_layer.weight.add_(1)
    before = teacher.bottleneck_layer.weight.clone()
    teacher.follow(student, momentum=0.75)
    crops = student.projector.last_layer.weight_v
    assert torch.allclose(teacher.projector.last_layer.weight_v, 0.75 * start + 0.25 * crops, atol=1e-6)
    assert torch.allclose(teacher.bottleneck_layer.weight, before + 0.25, atol=1e-6)
    assert not torch.equal(student.projector.last_layer.weight_v, student.token_layer.weight_v)


def test_a_separate_teacher_is_a_copy_whose_layers_follow_their_own():
    student = small()
    teacher = student.teacher(shared=False)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    with torch.no_grad():
        student.token_layer.weight_v.add_(1)
    start = teacher.token_layer.weight_v.clone()
    teacher.follow(student, momentum=0.75)
    assert torch.allclose(teacher.token_layer.weight_v, start + 0.25, atol=1e-6)
    assert torch.equal(teacher.projector.last_layer.weight_v, student.projector.last_layer.weight_v)


def test_a_shared_student_has_a_shared_teacher_that_is_its_copy():
    student = small(shared=True)
    for shared in (True, False):
        teacher = student.teacher(shared=shared)
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


def test_every_trained_weight_gets_a_gradient_and_gains_are_fixed():
    head = small()
    found = head(*maps())
    sum(x.square().sum() for x in found).backward()
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    fixed = {name for name, p in head.named_parameters() if not p.requires_grad}
    assert fixed == {"projector.last_layer.weight_g", "token_layer.weight_g"}
    assert len(head.last_layers()) == 2
