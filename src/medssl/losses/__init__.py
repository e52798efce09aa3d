"""Losses as pure functions, one family in each file."""
