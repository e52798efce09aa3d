"""Segmentation: fine-tuning, evaluation and prediction."""
