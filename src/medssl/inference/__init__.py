"""Inference: how images are read, drawn for a network, and written on their own grid."""
