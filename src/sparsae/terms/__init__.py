"""Terms of a score, by which topologies are compared. A term is one file here, or in an installed package.

Each file registers a `sparsae.score.Term` with its settings; nothing else names it.
"""
