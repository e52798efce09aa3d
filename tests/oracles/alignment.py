"""The losses and the cross attention of Alice, one crop, token and head at a time."""

import math

import torch
from oracles.self_distillation import softmax


def cross_entropy(student, teacher, centre, *, student_temperature, teacher_temperature):
    """Cross-entropy of two rows of logits."""
    target = softmax([(t - c) / teacher_temperature for t, c in zip(teacher.tolist(), centre.tolist(), strict=True)])
    predicted = softmax([s / student_temperature for s in student.tolist()])
    return -sum(t * math.log(p) for t, p in zip(target, predicted, strict=True))


def inter_volume(student, teacher, centre, **temperatures):
    """Rows are (view, batch, prototype); views 0 and 1 meet each other's teacher."""
    num_samples = student.shape[1]
    total = 0.0
    for n in range(num_samples):
        total += cross_entropy(student[0, n], teacher[1, n], centre, **temperatures)
        total += cross_entropy(student[1, n], teacher[0, n], centre, **temperatures)
    return 0.5 * total / num_samples


def intra_volume(student, teacher, centre, **temperatures):
    """Rows are (crop, token, prototype), first the queries, then the keys; half the sum of both views' means."""
    half = len(student) // 2
    total = 0.0
    for crops in (range(half), range(half, 2 * half)):
        terms = [
            cross_entropy(student[n, token], teacher[n, token], centre, **temperatures)
            for n in crops
            for token in range(student.shape[1])
        ]
        total += sum(terms) / len(terms)
    return 0.5 * total


def halved_mse(reconstruction, image):
    """Voxel by voxel."""
    pairs = list(zip(reconstruction.flatten().tolist(), image.flatten().tolist(), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / (2 * len(pairs))


def layer_norm(x, weight, bias):
    """With the epsilon 1e-6."""
    mean = x.mean()
    return (x - mean) / ((x - mean).square().mean() + 1e-6).sqrt() * weight + bias


def cross_attention(queries, context, state, *, num_heads):
    """One sample: (token, dim) and (source, dim), head by head and token by token."""
    size = len(state["query.weight"]) // num_heads
    rows = []
    for query in queries:
        mixed = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            q = state["query.weight"][part] @ query
            scores = [(q @ (state["key.weight"][part] @ c)).item() / math.sqrt(size) for c in context]
            values = [state["value.weight"][part] @ c for c in context]
            mixed.append(sum(w * value for w, value in zip(softmax(scores), values, strict=True)))
        x = query + state["output.weight"] @ torch.cat(mixed)
        x = layer_norm(x, state["norm1.weight"], state["norm1.bias"])
        hidden = torch.relu(state["fc1.weight"] @ x + state["fc1.bias"])
        y = x + state["fc2.weight"] @ hidden + state["fc2.bias"]
        rows.append(layer_norm(y, state["norm2.weight"], state["norm2.bias"]))
    return torch.stack(rows)
