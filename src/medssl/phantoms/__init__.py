"""Procedural torso CTs, so that everything can be tried without data; all of it is synthetic."""
