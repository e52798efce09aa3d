"""Training of a method: loop, optimiser, and the files of a run."""
