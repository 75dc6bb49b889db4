"""Many runs of equal shapes as one batched program.

An instrument: it gives the losses that the runs have one by one, and says nothing of their time and memory.
"""
