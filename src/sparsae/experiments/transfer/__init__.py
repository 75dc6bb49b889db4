"""Where the best learning rate lies over widths and sparsities, under each parameterization."""
