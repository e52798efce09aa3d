"""Losses of MACL written out: a row, a place, a voxel at a time, with plain numbers."""

import math


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def contrast(rows, near, *, compared=None, temperature=0.1, base_temperature=0.07):
    """Mean over rows with positives; `near` and `compared` are lists of lists of truth values."""
    losses = []
    for a in range(len(rows)):
        others = [b for b in range(len(rows)) if b != a and (compared is None or compared[a][b])]
        scores = {b: cosine(rows[a], rows[b]) / temperature for b in others}
        positives = [b for b in others if near[a][b]]
        if positives:
            whole = math.log(sum(math.exp(score) for score in scores.values()))
            losses.append(sum(whole - scores[b] for b in positives) / len(positives))
    return temperature / base_temperature * sum(losses) / len(losses) if losses else 0.0


def dense(first, second, near, *, compared=None, **temperatures):
    """One contrast after another over the places of lists [sample][channel][place]."""
    places = range(len(first[0][0]))
    total = 0.0
    for place in places:
        rows = [[channel[place] for channel in sample] for sample in (*first, *second)]
        total += contrast(rows, near, compared=compared, **temperatures)
    return total / len(places)


def segments(first, second, segment, *, every, **temperatures):
    """One contrast of places a sample, those of the same segment being positives."""
    total = 0.0
    for one, other, numbers in zip(first, second, segment, strict=True):
        places = range(0, len(numbers), every)
        rows = [[channel[place] for channel in view] for view in (one, other) for place in places]
        owner = [numbers[place] for _ in range(2) for place in places]
        total += contrast(rows, [[m == n for n in owner] for m in owner], **temperatures)
    return total / len(first)


def near(positions, threshold):
    """Which positions (lists of lists of numbers) differ by less than the threshold along every axis."""
    return [[all(abs(x - y) < threshold for x, y in zip(p, q, strict=True)) for q in positions] for p in positions]


def equivariance(large, small):
    """Mean difference of planes: lists [sample][channel][row][column], with equal corners of both grids."""
    total, number = 0.0, 0
    for sample, other in zip(large, small, strict=True):
        for plane, expected in zip(sample, other, strict=True):
            for i, line in enumerate(expected):
                for j, value in enumerate(line):
                    y = i * (len(plane) - 1) / (len(expected) - 1)
                    x = j * (len(plane[0]) - 1) / (len(line) - 1)
                    total, number = total + abs(between(plane, y, x) - value), number + 1
    return total / number


def between(plane, y, x):
    """The value of a plane between its pixels."""
    top, left = min(int(y), len(plane) - 2), min(int(x), len(plane[0]) - 2)
    down, right = y - top, x - left
    upper = plane[top][left] * (1 - right) + plane[top][left + 1] * right
    lower = plane[top + 1][left] * (1 - right) + plane[top + 1][left + 1] * right
    return upper * (1 - down) + lower * down
