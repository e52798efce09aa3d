"""Instance discrimination by loops over queries and keys, in plain numbers."""

import math


def cross_entropies(queries, keys, queues, *, rings, own, temperature):
    """The loss of each query: its key against its ring, without entries whose subject is the query's own."""
    losses = []
    for n, (query, key) in enumerate(zip(queries, keys, strict=True)):
        positive = math.exp(dot(query, key) / temperature)
        total = positive
        for entry, subject in queues[rings[n]]:
            if subject != own[n]:
                total += math.exp(dot(query, entry) / temperature)
        losses.append(math.log(total) - math.log(positive))
    return losses


def summed(neighbours):
    """The sum of each query's unit vectors of neighbours."""
    return [[sum(vector[d] for vector in vectors) for d in range(len(vectors[0]))] for vectors in neighbours]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))
