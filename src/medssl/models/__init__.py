"""Encoders, decoders and heads, one family in each file."""
