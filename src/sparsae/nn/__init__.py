"""Sparse layers, and the way of a model into them and out again."""
