"""How large activations, gradients and updates are over widths and densities, in the first steps of training."""
