import torch
from torch import nn

from medssl.ops.clipping import clip_each


def made():
    """Parameters with gradients of the norms 5 and 0.5, and one without."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    return parameters


def test_each_gradient_is_clipped_by_its_own_norm():
    parameters = made()
    clip_each(parameters, 2.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.2, 1.6]), rtol=1e-6, atol=0)
    assert parameters[1].grad.tolist() == torch.tensor([0.3, 0.4]).tolist()
    assert parameters[2].grad is None


def test_without_a_norm_or_gradients_nothing_is_clipped():
    parameters = made()
    clip_each(parameters, None)
    assert parameters[0].grad.tolist() == [3, 4]
    clip_each(parameters[2:], 1.0)
    assert parameters[2].grad is None
