"""What a run leaves on disk: its directory, manifest, checkpoints and the rows of its metrics."""
