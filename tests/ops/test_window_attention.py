import pytest
import torch
from oracles.nnformer import plain_attention

from medssl.models.nnformer_blocks import blocked_pairs, pattern_numbers, relative_index
from medssl.ops import window_attention as fused
from medssl.ops.window_attention import WindowMask, window_attention


def entries(*, heads=2, windows=8, tokens=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, windows, heads, tokens, 4)] * 3 + [(heads, tokens, tokens)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def mask():
    number = pattern_numbers((2, 2, 2), (1, 0, 1), device=torch.device("cpu"))
    assert number.tolist() == [0, 1, 0, 1, 4, 5, 4, 5]
    return WindowMask(blocked_pairs((2, 2, 2)), number)


@pytest.mark.parametrize("chunk", [1, 150, 1 << 18])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_plain_composition(monkeypatch, masked, chunk):
    monkeypatch.setattr(fused, "CHUNK", chunk)
    inputs, weights = entries(), torch.linspace(-3, 3, 2 * 8 * 2 * 8 * 4).sin().reshape(2, 8, 2, 8, 4)
    results = []
    for attend in (window_attention, plain_attention):
        mixed = attend(*inputs, mask() if masked else None)
        results.append([mixed, *torch.autograd.grad((mixed * weights).sum(), inputs)])
    with torch.no_grad():
        results[0].append(window_attention(*inputs, mask() if masked else None))
    results[1].append(results[1][0])
    assert all(torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6) for ours, wanted in zip(*results, strict=True))


def test_gradients_agree_with_differences():
    inputs = entries(heads=1, windows=2, tokens=8, dtype=torch.float64)
    assert torch.autograd.gradcheck(window_attention, tuple(inputs))


def test_half_precision_keeps_its_kind():
    inputs = [entry.detach().bfloat16().requires_grad_() for entry in entries()]
    mixed = window_attention(*inputs[:3], entries()[3])
    mixed.float().square().sum().backward()
    assert mixed.dtype == inputs[0].grad.dtype == torch.bfloat16
    assert torch.allclose(mixed.float(), plain_attention(*entries()), atol=0.05)


@pytest.mark.parametrize(("window", "reached", "rows"), [(4, 115, 343), (8, 547, 3375), (2, 19, 27)])
def test_the_published_index_reaches_few_rows_and_the_correct_one_all(window, reached, rows):
    published, correct = (relative_index((window,) * 3, rule=rule) for rule in ("published", "correct"))
    assert len(published.unique()) == reached
    assert correct.unique().tolist() == list(range(rows))
    assert published.max() < rows


def test_flat_windows_stay_inside_their_tables():
    for window in ((1, 1, 1), (2, 2, 1), (1, 4, 4), (4, 4, 2)):
        rows = (2 * torch.tensor(window) - 1).prod()
        assert relative_index(window).max() < rows
        assert len(relative_index(window, rule="correct").unique()) == rows
