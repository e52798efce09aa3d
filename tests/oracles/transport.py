"""Transport with a dustbin in plain numbers, in the probability domain, for one sample without padding."""

import math


def plan(scores, dustbin, *, num_iterations):
    """The plan times the number of points, by scaling rows and columns in turn."""
    m, n = len(scores), len(scores[0]) if scores else 0
    kernel = [[math.exp(s) for s in row] + [math.exp(dustbin)] for row in scores]
    kernel.append([math.exp(dustbin)] * (n + 1))
    rows = [1.0] * m + [float(n)]
    columns = [1.0] * n + [float(m)]
    v = [1.0] * (n + 1)
    u = [1.0] * (m + 1)
    for _ in range(num_iterations):
        u = [rows[i] / sum(kernel[i][j] * v[j] for j in range(n + 1)) for i in range(m + 1)]
        v = [columns[j] / sum(kernel[i][j] * u[i] for i in range(m + 1)) for j in range(n + 1)]
    return [[u[i] * kernel[i][j] * v[j] for j in range(n + 1)] for i in range(m + 1)]


def matching(plans, pairs, *, is_sum):
    """Minus the logarithms of the true entries: summed, or 0.45 times matched means plus unmatched means."""
    terms = {"matched": {}, "unmatched": {}}
    for sample, first, second in pairs:
        kind = "matched" if first >= 0 and second >= 0 else "unmatched"
        terms[kind].setdefault(sample, []).append(min(100.0, max(0.0, -math.log(plans[sample][first][second]))))
    if is_sum:
        return sum(sum(some) for by_sample in terms.values() for some in by_sample.values())
    mean = {kind: sum(sum(s) / len(s) for s in found.values()) / len(plans) for kind, found in terms.items()}
    return 0.45 * mean["matched"] + mean["unmatched"]


def positive_contrast(vectors, positives, *, temperature, base_temperature, ignored=None):
    """Mean over rows with positives of minus the mean log-share of these among all but the ignored ones."""
    losses = []
    for a, row in enumerate(vectors):
        others = [b for b in range(len(vectors)) if b != a and not (ignored and ignored[a][b])]
        chosen = [b for b in others if positives[a][b]]
        if not chosen:
            continue
        weight = {b: math.exp(cosine(row, vectors[b]) / temperature) for b in others}
        total = sum(weight.values())
        losses.append(-temperature / base_temperature * sum(math.log(weight[b] / total) for b in chosen) / len(chosen))
    return sum(losses) / len(losses) if losses else 0.0


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
