"""Extraction: features of subjects, locations and points by a trained encoder, and the matching of points."""
