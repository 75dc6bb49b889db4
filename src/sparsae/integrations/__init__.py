"""Sparsae inside other people's trainers: the Trainer of transformers, Lightning, accelerate."""
