"""What surrounds a method while it trains: loop, optimiser, files of a run."""
