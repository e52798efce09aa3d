import json
import math
from pathlib import Path

import pytest
import torch

from medssl.models.heads import ProjectionHead

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glmae.json").read_text())


@pytest.mark.parity
@pytest.mark.parametrize("num_prototypes", [65536, 4096])
def test_the_paper_s_head_has_the_card_s_parameter_counts(num_prototypes):
    with torch.device("meta"):
        head = ProjectionHead(num_prototypes=num_prototypes)
    golden = GOLDEN["parameters"][f"head_{num_prototypes}"]
    assert sum(p.numel() for p in head.parameters()) == golden["total"]
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == golden["trained"]


@pytest.mark.parity
def test_the_head_has_the_published_key_layout():
    head = ProjectionHead(in_dim=8, hidden_dim=6, bottleneck_dim=4, num_prototypes=5)
    shapes = {key: tuple(tensor.shape) for key, tensor in head.state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (6, 8),
        "mlp.0.bias": (6,),
        "mlp.2.weight": (6, 6),
        "mlp.2.bias": (6,),
        "mlp.4.weight": (4, 6),
        "mlp.4.bias": (4,),
        "last_layer.weight_g": (5, 1),
        "last_layer.weight_v": (5, 4),
    }


@pytest.mark.parity
def test_logits_are_scaled_cosines_of_an_mlp_written_out():
    torch.manual_seed(0)
    head = ProjectionHead(in_dim=8, hidden_dim=6, bottleneck_dim=4, num_prototypes=5, init_std=0.5).double()
    state = head.state_dict()
    state["last_layer.weight_g"].mul_(3.0)  # a published file may hold another length
    features = torch.randn(10, 8, dtype=torch.float64)
    for row, logits in zip(features, head(features), strict=True):
        for layer in (0, 2, 4):
            row = state[f"mlp.{layer}.weight"] @ row + state[f"mlp.{layer}.bias"]
            if layer < 4:
                row = torch.tensor([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row.tolist()]).double()
        expected = [3 * torch.cosine_similarity(row, v, dim=0).item() for v in state["last_layer.weight_v"]]
        assert logits.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parity
def test_initial_logits_are_as_spread_as_unit_vectors_in_256_dimensions():
    torch.manual_seed(0)
    head = ProjectionHead(num_prototypes=4096)
    with torch.no_grad():
        logits = head(torch.randn(64, 768))
    assert logits.std().item() == pytest.approx(GOLDEN["initial_logit_std"], rel=0.02)
    teacher = (logits / 0.04).softmax(1)
    entropy = -(teacher * (logits / 0.1).log_softmax(1)).sum(1).mean().item()
    assert entropy == pytest.approx(GOLDEN["initial_cross_entropy"]["4096"], abs=0.03)


def test_the_lengths_of_the_prototypes_are_fixed_and_their_directions_trained():
    head = ProjectionHead(in_dim=8, hidden_dim=6, bottleneck_dim=4, num_prototypes=5)
    head(torch.randn(3, 8)).square().sum().backward()
    assert head.last_layer.weight_g.grad is None
    assert head.last_layer.weight_g.flatten().tolist() == [1.0] * 5
    gradient, direction = head.last_layer.weight_v.grad, head.last_layer.weight_v
    assert gradient.abs().max() > 0
    assert (gradient * direction).sum(1).abs().max() < 1e-6  # a length cannot be learned


def test_a_zero_feature_gives_finite_logits_and_gradients():
    head = ProjectionHead(in_dim=8, hidden_dim=6, bottleneck_dim=4, num_prototypes=5)
    head(torch.zeros(2, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)
