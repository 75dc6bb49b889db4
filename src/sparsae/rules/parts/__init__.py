"""What rules are made of: when, what is dropped, what is grown; and the evolution strategy's proposals."""
