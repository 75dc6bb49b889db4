"""Training: the program around the search: objective, loop, observers, and how a run is put together."""
