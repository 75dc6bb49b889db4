"""Where the oldest torch that pyproject.toml admits is not as the one that most tests run with."""

from __future__ import annotations

import torch

IS_OLD = torch.__version__ < (2, 13)
