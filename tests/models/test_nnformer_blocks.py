import pytest
import torch
from oracles.nnformer import windowed

from medssl.models.nnformer_blocks import SelfAttention, SkipAttention


def randomised(attention):
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return attention.eval()


def filled_up(tokens, window):
    size = [-(-side // step) * step for side, step in zip(tokens.shape[:3], window, strict=True)]
    whole = torch.zeros(*size, tokens.shape[-1])
    whole[: tokens.shape[0], : tokens.shape[1], : tokens.shape[2]] = tokens
    return whole


@pytest.mark.parametrize("rule", ["published", "correct"])
@pytest.mark.parametrize(
    ("size", "window", "shifted", "shift"),
    [
        ((4, 6, 4), (2, 2, 2), False, (0, 0, 0)),
        ((4, 6, 4), (2, 2, 2), True, (1, 1, 1)),
        ((5, 2, 3), (2, 2, 2), True, (1, 0, 1)),  # filled up along x and z; one window spans y
        ((6, 3, 2), (3, 3, 2), True, (1, 0, 0)),
    ],
)
def test_self_attention_is_that_of_a_slow_loop(size, window, shifted, shift, rule):
    attention = randomised(SelfAttention(6, 2, window=window, rule=rule, shifted=shifted))
    tokens = torch.randn(1, *size, 6, generator=torch.Generator().manual_seed(2))
    q, k, v = (attention.qkv(filled_up(tokens[0], window))).detach().unflatten(-1, (3, 2, 3)).unbind(3)
    table, published = attention.relative_position_bias_table.detach(), rule == "published"
    mixed = windowed(q, k, v, table, window=window, shift=shift, published=published).flatten(3)
    wanted = attention.proj(mixed)[: size[0], : size[1], : size[2]]
    assert torch.allclose(attention(tokens)[0], wanted, atol=1e-5)


def test_skip_attention_asks_with_the_decoder_s_tokens_as_they_are():
    attention = randomised(SkipAttention(6, 2, window=(2, 2, 2), rule="published"))
    tokens, skip = torch.randn(2, 1, 4, 3, 2, 6, generator=torch.Generator().manual_seed(2))
    k, v = attention.kv(filled_up(skip[0], (2, 2, 2))).detach().unflatten(-1, (2, 2, 3)).unbind(3)
    q = filled_up(tokens[0], (2, 2, 2)).unflatten(-1, (2, 3))
    table = attention.relative_position_bias_table.detach()
    mixed = windowed(q, k, v, table, window=(2, 2, 2), shift=(0, 0, 0), published=True).flatten(3)
    assert torch.allclose(attention(tokens, skip)[0], attention.proj(mixed)[:, :3], atol=1e-5)
