"""Published checkpoints: one file a layout says how its tensors are named, built and fed."""
