"""The losses of GL-MAE and DINO: agreement between the views of a student and of a teacher."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from medssl.checks import choice

PAIRS = ("all", "same", "cross")


def centred_softmax(
    logits: Float[Tensor, "*rows prototype"], centre: Float[Tensor, "1 prototype"], *, temperature: float
) -> Float[Tensor, "*rows prototype"]:
    """Return teacher probabilities `softmax((logits - centre) / temperature)`, no gradient, at least in float32.

    Source: arXiv:2104.14294, section 3.1.
    """
    return ((_wide(logits.detach()) - centre) / temperature).softmax(dim=-1)


def sinkhorn(
    logits: Float[Tensor, "row prototype"],
    *,
    temperature: float,
    num_iterations: int = 3,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Float[Tensor, "row prototype"]:
    """Return teacher probabilities whose prototypes are used about equally; every row sums to 1. No gradient.

    `total` turns the sums of this process into sums over all processes. It is the identity for a single process.

    Source: arXiv:2006.09882; the form of arXiv:2304.07193.
    """
    scores = _wide(logits.detach()) / temperature
    top = scores.amax()  # a constant factor cancels in the first normalisation, if it is the same on all ranks
    shift = total(top) / total(torch.ones_like(top))
    weights = (scores - shift).exp()
    rows = total(weights.new_tensor(float(len(weights))))
    for _ in range(num_iterations):
        weights = weights / (total(weights.sum(0)) * weights.shape[1])
        weights = weights / (weights.sum(1, keepdim=True) * rows)
    return weights * rows


def cross_entropy_of_views(
    student: Float[Tensor, "student_view batch prototype"],
    teacher: Float[Tensor, "teacher_view batch prototype"],
    *,
    temperature: float,
    pairs: str = "all",
) -> Float[Tensor, ""]:
    """Return the cross-entropy between teacher probabilities and student logits: mean over batch and view pairs.

    `pairs` is `all`, `same` (equal view numbers) or `cross` (different ones). An empty set gives zero with a gradient
    of zero. Gradient flows to `student` only. In nats.

    Source: arXiv:2104.14294, eq. 3.
    """
    log_student = (_wide(student) / temperature).log_softmax(dim=-1)
    return _mean_over_pairs(-log_student, _wide(teacher.detach()), pairs)


def cosine_distance_of_views(
    student: Float[Tensor, "student_view batch dim"],
    teacher: Float[Tensor, "teacher_view batch dim"],
    *,
    pairs: str = "all",
) -> Float[Tensor, ""]:
    """Return `2 - 2 cos` between student and teacher vectors, averaged over the batch and over pairs of views.

    Pairs, empty sets and gradient are those of `cross_entropy_of_views`.

    Source: arXiv:2006.07733, eq. 2.
    """
    student, teacher = (F.normalize(_wide(x), dim=-1) for x in (student, teacher.detach()))
    has_pairs = num_pairs(len(student), len(teacher), pairs=pairs) > 0
    return 2 * has_pairs - 2 * _mean_over_pairs(student, teacher, pairs)


def num_pairs(num_student: int, num_teacher: int, *, pairs: str) -> int:
    """Return the number of view pairs in a set.

    Raises:
        ValueError: The set is not known.
    """
    choice("pairs", pairs, PAIRS)
    same = min(num_student, num_teacher)
    return {"all": num_student * num_teacher, "same": same, "cross": num_student * num_teacher - same}[pairs]


def mean_entropy(probabilities: Float[Tensor, "*rows prototype"]) -> Float[Tensor, ""]:
    """Return the mean entropy of the rows, in nats; 0 log 0 counts as 0."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1).mean()


def direction_spread(vectors: Float[Tensor, "row dim"]) -> Float[Tensor, ""]:
    """Return the mean standard deviation of the rows' directions: 1 if they spread evenly, 0 if all are equal."""
    return F.normalize(_wide(vectors), dim=1).std(0, correction=0).mean() * vectors.shape[1] ** 0.5


def effective_rank(vectors: Float[Tensor, "row dim"]) -> Float[Tensor, ""]:
    """Return the exponential of the entropy of the singular values of the rows' directions: 1 if all are parallel.

    It is at most the number of rows or of columns. Source: arXiv:2210.02885, for directions instead of vectors.
    """
    rows = F.normalize(vectors.double(), dim=1)
    products = rows @ rows.mT if len(rows) <= rows.shape[1] else rows.mT @ rows
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    return mean_entropy((singular / singular.sum())[None]).exp().to(_wide(vectors))


def _mean_over_pairs(student: Tensor, teacher: Tensor, pairs: str) -> Tensor:
    # A sum over all pairs of products is the product of the sums: no tensor grows with the number of pairs, and no
    # matrix product is rounded by autocast or TF32.
    count, batch = num_pairs(len(student), len(teacher), pairs=pairs), student.shape[1]
    if count == 0 or batch == 0:
        return student.sum() * 0.0
    shared = min(len(student), len(teacher))
    same = (student[:shared] * teacher[:shared]).sum() if pairs != "all" else student.new_zeros(())
    every = (student.sum(0) * teacher.sum(0)).sum() if pairs != "same" else student.new_zeros(())
    return {"all": every, "same": same, "cross": every - same}[pairs] / (count * batch)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
