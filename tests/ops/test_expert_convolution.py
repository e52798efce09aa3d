"""Convolutions with experts' kernels against plain loops (tests/oracles/conditioned.py)."""

import pytest
import torch
import torch.nn.functional as F
from oracles.conditioned import conditional_convolution, voxelwise_convolution

from medssl.ops.expert_convolution import IMPLEMENTATIONS, convolve, convolve_voxelwise, fastest, gate, synthesise

EXPERTS, INPUT, WIDTH = 8, 8, 16
NAMES = ("auto", *IMPLEMENTATIONS)


def layer(dtype=torch.float64, *, experts=EXPERTS, channels=INPUT, width=WIDTH):
    """Kernels, bias, router weight and router bias."""
    torch.manual_seed(0)
    shapes = ((experts, width, channels, 3, 3, 3), (width,), (experts, 3), (experts,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def run(x, places, counts, tensors, *, stride, impl):
    weight, bias, *router = tensors
    return convolve(x, weight, bias=bias, gates=gate(places, *router), counts=counts, stride=stride, impl=impl)


def gradients(y, *inputs):
    torch.manual_seed(1)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), inputs)


def samples(dtype):
    """Five samples at four places, of which the first is that of two."""
    torch.manual_seed(2)
    x = torch.randn(5, INPUT, 9, 9, 9, dtype=dtype, requires_grad=True)
    return x, torch.rand(4, 3, dtype=dtype) * 2 - 1, [2, 1, 1, 1]


@pytest.mark.parity
@pytest.mark.parametrize("impl", NAMES)
def test_every_implementation_equals_the_loop_over_samples(impl):
    x, places, counts = samples(torch.float64)
    tensors = layer()
    with torch.no_grad():
        expected = conditional_convolution(x, places[[0, 0, 1, 2, 3]], *tensors, stride=2)
    y = run(x, places, counts, tensors, stride=2, impl=impl)
    assert y.shape == (5, WIDTH, 5, 5, 5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("impl", [name for name in NAMES if name != "loop"])
def test_values_and_gradients_agree_between_implementations(impl, dtype, tolerance):
    x, places, counts = samples(dtype)
    tensors = layer(dtype)
    y, expected = (run(x, places, counts, tensors, stride=2, impl=name) for name in (impl, "loop"))
    pairs = [(y, expected), *zip(gradients(y, x, *tensors), gradients(expected, x, *tensors), strict=True)]
    for found, wanted in pairs:
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_the_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    shapes = ((2, 3, 2, 3, 3, 3), (3,), (2, 3), (2,))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x = torch.randn(2, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    places = torch.rand(2, 3, dtype=torch.float64)
    for impl in ("grouped", "mixture", "plain"):
        assert torch.autograd.gradcheck(
            lambda x, *tensors, impl=impl: run(x, places, [1, 1], tensors, stride=1, impl=impl), (x, *tensors)
        )


@pytest.mark.parametrize("stride", [1, 2])
def test_every_voxel_may_have_a_place_of_its_own(stride):
    tensors = layer(experts=3, channels=2, width=3)
    torch.manual_seed(3)
    x = torch.randn(2, 2, 5, 4, 3, dtype=torch.float64)
    places = torch.rand(2, 3, *(-(-side // stride) for side in (5, 4, 3)), dtype=torch.float64) * 2 - 1
    weight, bias, *router = tensors
    options = {"bias": bias, "router_weight": router[0], "router_bias": router[1], "coordinate": places}
    with torch.no_grad():
        expected = voxelwise_convolution(x, places, *tensors, stride=stride)
        without = convolve_voxelwise(x, weight, stride=stride, **options)
    torch.testing.assert_close(without, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        convolve_voxelwise(x, weight, stride=stride, **options), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_place_at_every_voxel_is_one_place_for_the_sample(dtype, tolerance):
    x, places, _ = samples(dtype)
    tensors = layer(dtype)
    weight, bias, *router = tensors
    at_voxels = places[[0, 0, 1, 2, 3]][:, :, None, None, None].expand(-1, -1, 5, 5, 5)
    options = {"bias": bias, "router_weight": router[0], "router_bias": router[1], "coordinate": at_voxels}
    y = convolve_voxelwise(x, weight, stride=2, **options)
    expected = run(x, places, [2, 1, 1, 1], tensors, stride=2, impl="loop")
    pairs = [(y, expected), *zip(gradients(y, x, *tensors), gradients(expected, x, *tensors), strict=True)]
    for found, wanted in pairs:
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_places_of_voxels_keep_no_map_of_an_expert_for_the_gradient():
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def voxelwise(experts):
        kept.clear()
        weight, bias, *router = layer(torch.float32, experts=experts)
        coordinate = torch.zeros(1, 3, 16, 16, 16)
        options = {"bias": bias, "router_weight": router[0], "router_bias": router[1], "coordinate": coordinate}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = convolve_voxelwise(torch.zeros(1, INPUT, 16, 16, 16), weight, stride=1, **options)
        return y, sum(kept.values())

    (_, few), (y, many) = voxelwise(2), voxelwise(8)
    one_map = y.numel() * y.element_size()
    assert many - few < one_map, "six experts more keep their kernels only"


def test_one_expert_with_an_open_gate_is_a_plain_convolution():
    torch.manual_seed(0)
    weight, bias = torch.randn(1, 4, 2, 3, 3, 3), torch.randn(4)
    x, expected = (x := torch.randn(3, 2, 6, 6, 6)), F.conv3d(x, weight[0], bias, 1, 1)
    router = (torch.randn(1, 3), torch.full((1,), 1e4))
    places = torch.rand(3, 3)
    for impl in NAMES:
        y = run(x, places, [1, 1, 1], (weight, bias, *router), stride=1, impl=impl)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    options = {"bias": bias, "router_weight": router[0], "router_bias": router[1]}
    y = convolve_voxelwise(x, weight, coordinate=torch.rand(3, 3, 6, 6, 6), stride=1, **options)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", NAMES)
def test_gates_and_kernels_stay_in_single_precision_under_autocast(impl):
    x, places, counts = samples(torch.float32)
    tensors = layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = gate(places, *tensors[2:])
        kernels = synthesise(tensors[0], gates)
        y = run(x, places, counts, tensors, stride=2, impl=impl)
    assert gates.dtype == kernels.dtype == torch.float32
    assert y.dtype == torch.bfloat16, "the convolution itself is not"
    torch.testing.assert_close(gates, gate(places, *tensors[2:]))
    torch.testing.assert_close(kernels, synthesise(tensors[0], gates))
    expected = run(x, places, counts, tensors, stride=2, impl="loop")
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 1)])
@pytest.mark.parametrize("impl", [*NAMES, "voxelwise"])
def test_gradients_of_single_voxels_are_defined_in_half_precision(impl, size):
    tensors, places = layer(torch.float32, channels=64, width=64), torch.rand(4, 3)
    x, found = torch.randn(4, 64, *size), []
    for enabled in (True, False):
        for _ in range(2):
            freed = [torch.full((8 * 64, 64, 3, 3, 3), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
            del freed  # what a gradient that is not written would hold
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            if impl == "voxelwise":
                weight, bias, *router = tensors
                options = {"bias": bias, "router_weight": router[0], "router_bias": router[1]}
                coordinate = places[:, :, None, None, None]
                y = convolve_voxelwise(x, weight, coordinate=coordinate, stride=2, **options)
            else:
                y = run(x, places, [1] * 4, tensors, stride=2, impl=impl)
        assert y.shape == (4, 64, 1, 1, 1)
        found.append(gradients(y.float(), tensors[0])[0])
    assert (found[0] - found[1]).abs().max() < 0.03 * found[1].abs().max()


def test_gates_of_every_voxel_stay_in_single_precision_under_autocast():
    x, places, _ = samples(torch.float32)
    weight, bias, *router = layer(torch.float32)
    at_voxels = places[[0, 0, 1, 2, 3]][:, :, None, None, None].expand(-1, -1, 9, 9, 9)
    options = {"bias": bias, "router_weight": router[0], "router_bias": router[1], "coordinate": at_voxels}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = convolve_voxelwise(x, weight, stride=1, **options)
    expected = convolve_voxelwise(x, weight, stride=1, **options)
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    y.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (weight, bias, *router))


def test_the_choice_depends_on_how_many_samples_share_a_place():
    x = torch.zeros(32, 8, 9, 9, 9)
    assert [fastest(x, counts=[32 // u] * u) for u in (1, 2, 8, 16, 32)] == ["plain"] * 3 + ["grouped"] * 2
    assert fastest(x[:, :1], counts=[1] * 32) == "plain", "groups of one channel are slow"
    assert fastest(x[:, :, :2, :2, :2], counts=[1] * 32) == "mixture"
    assert fastest(x[:1], counts=[1]) == "plain"
