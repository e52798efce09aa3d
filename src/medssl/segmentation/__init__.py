"""Segmentation by a trained network: fine-tuning, evaluation and prediction."""
