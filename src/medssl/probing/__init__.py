"""Probes: how well frozen features predict a target, with intervals."""
