"""What it costs: kernels, whole training steps and topology updates, beside dense layers and beside other libraries."""
