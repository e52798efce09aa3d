"""Encoders, decoders and heads, one family a file."""
