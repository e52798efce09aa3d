"""The matching loss of KAF: optimal transport between two sets of points, with a dustbin for unmatched points."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from medssl.checks import choice

Reduction = Literal["weighted_mean", "sum"]
REDUCTIONS = ("weighted_mean", "sum")
NEVER = -1e9
MATCHED_WEIGHT, UNMATCHED_WEIGHT = 0.45, 1.0
LEAST_LOG = -100.0


def log_transport(
    scores: Float[Tensor, "b m n"],
    dustbin: Float[Tensor, ""] | float,
    *,
    num_iterations: int = 50,
    row_valid: Bool[Tensor, "b m"] | None = None,
    column_valid: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b m+1 n+1"]:
    """Return the logarithm of the transport plan, scaled so that valid rows and columns sum to 1.

    The last row and column are the dustbins: every entry there has the score `dustbin`, and they take what is left.
    Padded rows and columns get nothing. Differentiable; call it in float32.

    Args:
        scores: Score of each pair of points.
        dustbin: Score of having no partner; a number is not learnt.
        num_iterations: Iterations of Sinkhorn's algorithm; 50 are within 1e-5 of its limit for scores of a few units.
        row_valid: Which rows are points of the first set; None for all.
        column_valid: Which columns are points of the second set; None for all.

    Source: arXiv:1911.11763, section 3.2; arXiv:1306.0895.
    """
    b, m, n = scores.shape
    rows = scores.new_ones(b, m, dtype=torch.bool) if row_valid is None else row_valid
    columns = scores.new_ones(b, n, dtype=torch.bool) if column_valid is None else column_valid
    always = rows.new_ones(b, 1)
    rows, columns = torch.cat([rows, always], dim=1), torch.cat([columns, always], dim=1)
    couplings = torch.nn.functional.pad(scores, (0, 1, 0, 1))
    is_bin = torch.zeros_like(couplings, dtype=torch.bool)
    is_bin[:, -1], is_bin[:, :, -1] = True, True
    couplings = torch.where(is_bin, torch.as_tensor(dustbin, dtype=scores.dtype, device=scores.device), couplings)
    couplings = couplings.masked_fill(~(rows[:, :, None] & columns[:, None]), NEVER)

    num_rows, num_columns = (valid[:, :-1].sum(1, keepdim=True).to(scores) for valid in (rows, columns))
    total = (num_rows + num_columns).clamp(min=1).log()
    log_rows = _marginal(num_rows, num_columns, total, rows)
    log_columns = _marginal(num_columns, num_rows, total, columns)
    u, v = torch.zeros_like(log_rows), torch.zeros_like(log_columns)
    for _ in range(num_iterations):
        u = log_rows - torch.logsumexp(couplings + v[:, None], dim=2)
        v = log_columns - torch.logsumexp(couplings + u[:, :, None], dim=1)
    return couplings + u[:, :, None] + v[:, None] + total[:, :, None]


def _marginal(own: Tensor, other: Tensor, total: Tensor, valid: Tensor) -> Tensor:
    """Return logarithms of the masses of points (one each) and of the dustbin (one for each point of the other set)."""
    points = (-total).expand(-1, valid.shape[1] - 1)
    bin_mass = other.log().clamp(min=NEVER) - total  # a dustbin without anything to take gets nothing
    return torch.cat([points, bin_mass], dim=1).masked_fill(~valid, NEVER)


def matching_loss(
    log_plan: Float[Tensor, "b rows columns"],
    pairs: Int64[Tensor, "pair 3"],
    *,
    reduction: Reduction = "weighted_mean",
) -> Float[Tensor, ""]:
    """Return minus the log-probability of the true partners; the partner of an unmatched point is the dustbin.

    In nats; single terms are at most 100.

    Args:
        log_plan: Result of `log_transport`.
        pairs: Rows (sample, point of the first set, point of the second set); -1 is the dustbin.
        reduction: `weighted_mean` is 0.45 times the mean over matched pairs plus the mean over unmatched points. Both
            means are taken within each sample and then over the samples; a sample without terms of a kind counts as
            zero. `sum` is the sum over all terms, as in the paper.

    Source: arXiv:2310.01680, eq. 2; repository zshyang/kaf, network/superglue.py.
    """
    choice("reduction", reduction, REDUCTIONS)
    sample, first, second = pairs.unbind(1)
    terms = -log_plan[sample, first, second].clamp(LEAST_LOG, 0.0)
    if reduction == "sum":
        return terms.sum()
    is_matched = (first >= 0) & (second >= 0)
    matched = _mean_of_means(terms, sample, is_matched, len(log_plan))
    unmatched = _mean_of_means(terms, sample, ~is_matched, len(log_plan))
    return MATCHED_WEIGHT * matched + UNMATCHED_WEIGHT * unmatched


def matching_accuracy(log_plan: Float[Tensor, "b rows columns"], pairs: Int64[Tensor, "pair 3"]) -> Float[Tensor, ""]:
    """Return the share of points of the first set whose likeliest partner or dustbin is the true one; no gradient."""
    sample, first, second = pairs[pairs[:, 1] >= 0].unbind(1)
    if not len(sample):
        return log_plan.new_zeros(())
    dustbin = log_plan.shape[2] - 1
    found = log_plan.detach()[sample, first].argmax(1)
    return (found == torch.where(second < 0, dustbin, second)).to(log_plan).mean()


def _mean_of_means(
    terms: Float[Tensor, " pair"], sample: Int64[Tensor, " pair"], chosen: Bool[Tensor, " pair"], num_samples: int
) -> Float[Tensor, ""]:
    total = terms.new_zeros(num_samples).index_add(0, sample, terms * chosen)
    number = terms.new_zeros(num_samples).index_add(0, sample, chosen.to(terms))
    return (total / number.clamp(min=1)).mean()
