"""What belongs to CUDA: Triton kernels around dense products and for blocks, and when which of them is used."""
