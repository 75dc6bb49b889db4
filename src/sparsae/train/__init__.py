"""Training: the program around the search: objective, loop, observers, and the directory of a run."""
