"""The checks that all other tests run under find what they are there for."""

from dataclasses import dataclass

import beartype
import pytest
import run_time_checks
import torch
from jaxtyping import Float
from torch import Tensor

from medssl.data.randomness import hash_normal
from medssl.models.vit import VisionTransformer

CHECKS = run_time_checks.checked(
    typechecker=beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
)


@CHECKS
def rows(count: int, *, of: str = "a") -> str:
    return of * count if count < 3 else None


@CHECKS
def product(a: Float[Tensor, "n k"], b: "Float[Tensor, 'k m']", *, keep: bool = True) -> Float[Tensor, "n m"]:
    return a @ b if keep else a


@CHECKS
def padded(a: Float[Tensor, " n"], width: int) -> Float[Tensor, " {width}"]:
    return torch.cat([a, a.new_zeros(max(width - len(a), 0))])


@CHECKS
@dataclass
class Pair:
    first: Float[Tensor, " n"]
    second: Float[Tensor, " n"]


def test_plain_types_are_checked_in_arguments_and_results():
    assert rows(2) == "aa"
    for call in (lambda: rows("2"), lambda: rows(1, of=3), lambda: rows(3)):
        with pytest.raises(TypeError):
            call()


def test_sizes_of_a_name_are_shared_by_arguments_and_result_and_by_one_call_alone():
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert product(torch.ones(5, 1), torch.ones(1, 6)).shape == (5, 6)
    wrong = [(torch.ones(2, 3), torch.ones(4, 3)), (torch.ones(2), torch.ones(2, 1)), (torch.ones(1, 1).int(),) * 2]
    for pair in wrong:
        with pytest.raises(TypeError, match="product"):
            product(*pair)
    with pytest.raises(TypeError, match="return"):
        product(torch.ones(2, 3), torch.ones(3, 4), keep=False)


def test_a_size_that_is_computed_from_arguments_is_checked():
    assert padded(torch.ones(2), 4).tolist() == [1, 1, 0, 0]
    with pytest.raises(TypeError):
        padded(torch.ones(5), 4)


def test_the_fields_of_a_dataclass_are_checked():
    assert len(Pair(torch.ones(2), torch.ones(2)).first) == 2
    with pytest.raises(TypeError):
        Pair(torch.ones(2), torch.ones(3))


def test_our_own_modules_are_checked():
    with pytest.raises(TypeError, match="hash_normal"):
        hash_normal(3, torch.zeros(2))
    network = VisionTransformer(size_voxel=8, patch_voxel=4, in_channels=1, dim=12, depth=1, num_heads=1)
    with pytest.raises(TypeError, match="forward"):
        network(torch.zeros(1, 8, 8, 8))


def test_the_function_without_checks_can_be_reached():
    with pytest.raises(TypeError, match="violates type hint"):
        rows("two")
    with pytest.raises(TypeError, match="'<' not supported"):
        rows.__wrapped__("two")
    with pytest.raises(TypeError, match="violates type hint"):
        product(torch.ones(3), torch.ones(3))
    assert product.__wrapped__(torch.ones(3), torch.ones(3)) == 3
