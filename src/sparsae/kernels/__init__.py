"""The three numerical primitives of a sparse layer, the backends that compute them, and their place in autograd."""
