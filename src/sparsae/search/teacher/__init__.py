"""The teacher: an exponential moving average of the student, over active weights only.

    W_T <- beta W_T + (1 - beta) (W_S * M)          over all positions,

so that a dropped connection fades instead of vanishing. With "union" storage this is exact without a dense matrix: the
teacher's topology is the student's and what was dropped and has not yet faded below a tolerance. "masked" forgets
what the student drops; "dense" keeps every position.

A teacher costs a forward pass of what it teaches: a share of the sequences, at every n-th step.
"""

from sparsae.search.teacher.average import Teacher
from sparsae.search.teacher.storages import STORAGES, Storage
from sparsae.search.teacher.warm_up import WarmUp

__all__ = ["STORAGES", "Storage", "Teacher", "WarmUp"]
