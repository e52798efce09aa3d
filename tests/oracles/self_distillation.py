"""Consistency between views, written as loops over views, samples and prototypes."""

import math

import torch


def softmax(values):
    """Softmax of a list of floats."""
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def cross_entropy(student, teacher, *, temperature, pairs):
    """Mean cross-entropy over pairs of views and samples; both arguments are (view, batch, prototype)."""
    terms = []
    for i, probabilities in enumerate(teacher):
        for j, logits in enumerate(student):
            if (pairs == "same" and i != j) or (pairs == "cross" and i == j):
                continue
            for target, row in zip(probabilities, logits, strict=True):
                predicted = softmax([value / temperature for value in row.tolist()])
                terms.append(-sum(t * math.log(p) for t, p in zip(target.tolist(), predicted, strict=True)))
    return sum(terms) / len(terms) if terms else 0.0


def sinkhorn(logits, *, temperature, rounds):
    """Alternate normalisation of the (prototype, row) matrix, on the whole batch at once."""
    weights = torch.exp(logits / temperature).T
    weights = weights / weights.sum()
    num_prototypes, num_rows = weights.shape
    for _ in range(rounds):
        weights = weights / weights.sum(1, keepdim=True) / num_prototypes
        weights = weights / weights.sum(0, keepdim=True) / num_rows
    return (weights * num_rows).T


def masked_mse(prediction, target, masked, *, norm_pix):
    """Reconstruction loss, patch by patch."""
    total, count = 0.0, 0
    for n in range(len(target)):
        for token in range(target.shape[1]):
            if not masked[n, token]:
                continue
            values = target[n, token].tolist()
            if norm_pix:
                mean = sum(values) / len(values)
                variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
                values = [(value - mean) / math.sqrt(variance + 1e-6) for value in values]
            total += sum((p - v) ** 2 for p, v in zip(prediction[n, token].tolist(), values, strict=True)) / len(values)
            count += 1
    return total / count
