import json
from pathlib import Path

import pytest
import torch
from oracles import alignment as oracle

from medssl.models.cafa import CAFA

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "alice.json").read_text())
NAMES = {"query": "w_qs", "key": "w_ks", "value": "w_vs", "output": "fc", "norm1": "layer_norm"}
FEED_FORWARD = {"fc1": "w_1", "fc2": "w_2", "norm2": "layer_norm"}


def wave(shape, step):
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)


def filled(parameter, number, *, is_gain):
    index = torch.arange(parameter.numel(), dtype=torch.float64)
    return (0.05 * torch.sin(0.37 * index + 0.1 * number) + is_gain).reshape(parameter.shape)


def small(**options):
    torch.manual_seed(0)
    return CAFA(**{"dim": 12, "hidden_dim": 20, "num_heads": 3, "head_dim": 5, **options})


@pytest.mark.parity
def test_the_output_has_the_card_s_values():
    """The fill follows the names in the released code: Cross_Att.pos_ffn.*, and the attention whose name counts 40.

    The card names the prefix alone; of the 97 x 97 ways to count both blocks, this is the one that gives its numbers.
    """
    cafa = CAFA(dim=128, hidden_dim=256, num_heads=4, head_dim=32).double().eval()
    blocks = ((NAMES, 40), (FEED_FORWARD, sum(map(ord, "Cross_Att.pos_ffn."))))
    with torch.no_grad():
        for names, number in blocks:
            for ours, theirs in names.items():
                for name, parameter in cafa.get_submodule(ours).named_parameters():
                    count = (number + sum(map(ord, f"{theirs}.{name}"))) % 97
                    parameter.copy_(filled(parameter, count, is_gain=parameter.ndim == 1 and name == "weight"))
        found = cafa(wave((2, 8, 128), 0.01), wave((2, 64, 128), 0.02))
    assert found.sum().item() == pytest.approx(GOLDEN["cafa"]["sum"], rel=1e-4)
    assert found.abs().sum().item() == pytest.approx(GOLDEN["cafa"]["absolute_sum"], rel=1e-6)
    assert found.flatten()[:2].tolist() == pytest.approx(GOLDEN["cafa"]["first"], rel=1e-6)


@pytest.mark.parity
def test_sizes_are_those_of_the_card():
    with torch.device("meta"):
        found = [CAFA(), CAFA(dim=128, hidden_dim=256, num_heads=4, head_dim=32)]
    counts = [sum(p.numel() for p in cafa.parameters()) for cafa in found]
    assert counts == [GOLDEN["parameters"]["cafa"], GOLDEN["parameters"]["cafa_tiny"]]


def test_the_output_equals_a_loop_over_heads_and_tokens():
    cafa = small().double().eval()
    queries, context = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        found = cafa(queries, context)
    for row, query, source in zip(found, queries, context, strict=True):
        assert torch.allclose(row, oracle.cross_attention(query, source, cafa.state_dict(), num_heads=3), atol=1e-10)


def test_the_order_of_the_context_does_not_matter():
    cafa, queries, context = small().eval(), torch.randn(2, 3, 12), torch.randn(2, 7, 12)
    assert torch.allclose(cafa(queries, context), cafa(queries, context[:, torch.randperm(7)]), atol=1e-6)
    assert not torch.allclose(cafa(queries, context), cafa(queries, context + 1))


def test_dropout_acts_while_training_alone():
    cafa, queries, context = small(), torch.randn(2, 3, 12), torch.randn(2, 7, 12)
    assert not torch.equal(cafa(queries, context), cafa(queries, context))
    cafa.eval()
    assert torch.equal(cafa(queries, context), cafa(queries, context))
    still = small(dropout=0.0)
    assert torch.equal(still(queries, context), still(queries, context))


def test_gradient_flows_to_queries_and_context_and_every_weight():
    cafa = small()
    queries, context = torch.randn(2, 3, 12, requires_grad=True), torch.randn(2, 7, 12, requires_grad=True)
    cafa(queries, context).square().sum().backward()
    assert queries.grad.abs().max() > 0
    assert context.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in cafa.parameters())
