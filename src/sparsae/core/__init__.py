"""What everything above is made of: values and pure functions, without `torch.nn` and without input or output."""
