"""Evaluation: scores of segmentations, and comparisons of the scores of several runs."""
