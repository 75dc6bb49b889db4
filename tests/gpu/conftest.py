"""Without a GPU, simulated or not, there is nothing to collect here."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
