"""The contrast of anatomical embeddings, voxel by voxel in plain numbers."""

import math
from dataclasses import replace


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def apart(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def cross_entropy(positive, negatives, temperature):
    return math.log(sum(math.exp((n - positive) / temperature) for n in negatives) + 1)


def drawn(numbers, noise, count):
    """The `count` members with the largest noise."""
    return sorted(numbers, key=lambda number: -noise[number])[:count]


def negatives(scores, ignored, noise, rules):
    """Numbers of the random part of the hardest voxels of one row."""
    if rules.mask_value == "zero":
        ranked = sorted(range(len(scores)), key=lambda v: -(0 if ignored[v] else scores[v]))[: rules.num_hard]
    else:
        ranked = sorted((v for v in range(len(scores)) if not ignored[v]), key=lambda v: -scores[v])[: rules.num_hard]
    return [ranked[rank] for rank in drawn(range(len(ranked)), noise, rules.num_negatives)]


def fine_rows(fine, context, place, valid, rules, draws):
    """(view, voxel, other view, positive voxel, [(view, voxel) of negatives]) of every query; lists throughout."""
    n = len(fine[0])
    inside = [[p for p, ok in zip(place[v], valid[v], strict=True) if ok] for v in (0, 1)]
    common = [[], []]
    if all(inside):
        low = [max(min(p[a] for p in inside[v]) for v in (0, 1)) for a in range(3)]
        high = [min(max(p[a] for p in inside[v]) for v in (0, 1)) for a in range(3)]
        for v in (0, 1):
            for u in range(n):
                if valid[v][u] and all(low[a] <= place[v][u][a] <= high[a] for a in range(3)):
                    common[v].append(u)
    if not all(common):
        rows = []
        for u in drawn(range(n), draws.query[0], rules.num_queries):
            scores = [dot(fine[0][u], fine[0][w]) for w in range(n)]
            ignored = [apart(place[0][u], place[0][w]) < rules.ignore_mm for w in range(n)]
            ranked = negatives(scores, ignored, [0.0] * n, replace(rules, num_hard=rules.num_negatives))
            rows.append((0, u, 0, u, [(0, w) for w in ranked]))
        return rows
    nearest = [{}, {}]
    for v in (0, 1):
        for u in drawn(common[v], draws.candidate[v], rules.num_candidates):
            distances = [apart(place[v][u], p) for p in place[1 - v]]
            w = min(range(n), key=lambda w: distances[w])
            nearest[v][u] = (w, distances[w])
    limit = rules.positive_mm
    if all(distance >= limit for _, distance in nearest[0].values()):
        limit = min(distance for _, distance in nearest[0].values()) + 0.5
    rows = []
    for v in (0, 1):
        near = [u for u, (_, distance) in nearest[v].items() if distance < limit]
        for u in drawn(near, draws.query[v], rules.num_queries):
            everything = [(view, w) for view in (0, 1) for w in range(n)]
            scores = [dot(fine[v][u], fine[a][w]) + dot(context[v][u], context[a][w]) for a, w in everything]
            ignored = [apart(place[v][u], place[a][w]) < rules.ignore_mm for a, w in everything]
            chosen = negatives(scores, ignored, draws.negative[len(rows)], rules)
            rows.append((v, u, 1 - v, nearest[v][u][0], [everything[c] for c in chosen]))
    return rows


def fine_loss(fine, context, place, valid, rules, draws):
    total, rows = 0.0, fine_rows(fine, context, place, valid, rules, draws)
    for v, u, a, w, others in rows:
        scores = [dot(fine[v][u], fine[b][o]) for b, o in others]
        total += cross_entropy(dot(fine[v][u], fine[a][w]), scores, rules.temperature)
    return total / len(rows)


def coarse_loss(coarse, place, rules, draws):
    """`coarse` and `place` are lists (volume, 2, voxel, ...)."""
    total, n = 0.0, len(coarse[0][0])
    for i in range(len(coarse)):
        everything = [(v, u) for v in (0, 1) for u in range(n)]
        foreign = [vector for j in range(len(coarse)) if j != i for view in coarse[j] for vector in view]
        queries = [[], []]
        for v in (0, 1):
            for u in range(n):
                distances = [apart(place[i][v][u], p) for p in place[i][1 - v]]
                w = min(range(n), key=lambda w: distances[w])
                height = abs(place[i][v][u][2] - place[i][1 - v][w][2])
                if distances[w] < rules.positive_mm and height < rules.height_mm[v]:
                    queries[v].append((u, w))
        alone = not queries[0]
        if alone:
            queries = [[(u, u) for u in range(n)]] * 2
        terms = []
        for v in (0, 1):
            beyond = drawn(range(len(foreign)), draws.foreign[i][v], rules.num_global)
            for u, w in queries[v]:
                here = coarse[i][v][u]
                scores = [dot(here, coarse[i][a][o]) for a, o in everything]
                if alone:
                    positive = dot(here, here)
                    others = sorted(s for e, s in zip(everything, scores, strict=True) if e != (v, u))
                    others = others[::-1][: rules.num_negatives]
                else:
                    positive = dot(here, coarse[i][1 - v][w])
                    ignored = [apart(place[i][v][u], place[i][a][o]) < rules.ignore_mm for a, o in everything]
                    chosen = negatives(scores, ignored, draws.negative[i][len(terms)], rules)
                    others = [scores[c] for c in chosen]
                    if rules.mask_value == "zero":
                        others = [0.0 if ignored[c] else scores[c] for c in chosen]
                        others += [0.0] * (rules.num_negatives - len(others))
                others += [dot(here, foreign[c]) for c in beyond]
                terms.append(cross_entropy(positive, others, rules.temperature))
        total += sum(terms) / len(terms)
    return total / len(coarse)
