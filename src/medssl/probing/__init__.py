"""Probes: what frozen features tell of a target, with intervals."""
