"""Training: the loop, its state and the directory of a run."""
