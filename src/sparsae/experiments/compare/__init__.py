"""Comparisons of methods at the same cost, and what is a comparison too: ablations, sensitivity."""
