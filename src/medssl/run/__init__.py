"""A run of a command: its start, its folder, its signals, its ranks and its store."""
