"""The search for a topology, in any training loop: the Sparsifier, its updates, what they see, and the teacher."""
