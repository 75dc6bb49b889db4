"""The CPU's kernels: all that belongs to them alone, from their C++ sources to the densities at which they pay."""
