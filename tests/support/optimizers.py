"""Optimizers of torch and of other libraries, with what is known of their states."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsae.optim import AdamW

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def of(module: str, name: str, **settings: Any) -> Make:
    """An optimizer of a package that may be absent."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(module.partition(".")[0])
            optimizer: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(parameters, **settings)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def lookahead(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    pytest.importorskip("pytorch_optimizer")
    from pytorch_optimizer import Lookahead

    wrapped: torch.optim.Optimizer = Lookahead(torch.optim.AdamW(parameters, lr=0.01), k=2)
    return wrapped


def zero(parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=0.01, **settings)


TORCH: dict[str, Make] = {
    name: of("torch.optim", name, lr=0.01)
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
VARIANTS: dict[str, Make] = {
    "sparsae.AdamW": lambda parameters: AdamW(parameters, lr=0.01),
    "sparsae.AdamW, a step a weight": lambda parameters: AdamW(parameters, lr=0.01, per_weight_step=True),
    "AdamW, amsgrad": of("torch.optim", "AdamW", lr=0.01, amsgrad=True),
    "AdamW, fused": of("torch.optim", "AdamW", lr=0.01, fused=True),
    "AdamW, foreach": of("torch.optim", "AdamW", lr=0.01, foreach=True),
    "AdamW, a tensor as rate": of("torch.optim", "AdamW", lr=torch.tensor(0.01)),
    "SGD, momentum": of("torch.optim", "SGD", lr=0.01, momentum=0.9),
    "Adagrad, not from zero": of("torch.optim", "Adagrad", lr=0.01, initial_accumulator_value=0.5),
    "RMSprop, all": of("torch.optim", "RMSprop", lr=0.01, momentum=0.5, centered=True),
    "transformers Adafactor": of("transformers.optimization", "Adafactor", lr=0.01, relative_step=False, beta1=0.9),
    "transformers Adafactor, relative": of("transformers.optimization", "Adafactor"),
    "AdamW8bit": of("torchao.optim", "AdamW8bit", lr=0.01),
    "AdamW4bit": of("torchao.optim", "AdamW4bit", lr=0.01),
    "AdamWFp8": of("torchao.optim", "AdamWFp8", lr=0.01),
    "Lookahead": lookahead,
    "ZeroRedundancyOptimizer": zero,
    "ZeroRedundancyOptimizer, buckets": lambda parameters: zero(parameters, parameters_as_bucket_view=True),
    **{
        name: of("pytorch_optimizer", name, lr=0.01)
        for name in (
            *("Lion", "Adan", "CAME", "AdaFactor", "SOAP", "Shampoo", "ScalableShampoo", "Kron", "SM3", "AccSGD"),
            *("Prodigy", "ScheduleFreeAdamW", "ScheduleFreeSGD", "MADGRAD"),
        )
    },
    "Ranger21": of("pytorch_optimizer", "Ranger21", lr=0.01, num_iterations=100),
}
# By unit: the name that the refusal has.
REFUSED = {
    "weights": {
        **{name: name for name in ("LBFGS", "SparseAdam", "Muon", "Shampoo", "ScalableShampoo", "Kron", "AccSGD")},
        "ZeroRedundancyOptimizer, buckets": "ZeroRedundancyOptimizer",
    }
}
REFUSED["blocks"] = REFUSED["weights"] | {"SOAP": "SOAP"}
WEIGHT_COPIES = {"z", "ax", "p0", "x0", "slow_params", "lookahead_params"}
UNITS = {"weights": (1, 1), "blocks": (4, 4)}
# What torchao may be off by where it quantizes again: half a step of its code, of the largest in a block.
STEPS = {"AdamW8bit": 1 / 64, "AdamW4bit": 1 / 4, "AdamWFp8": 1 / 16}
# What a new weight's entry starts from, where it is not zero.
STARTS = {("Rprop", "step_size"): 0.01, ("Adagrad, not from zero", "sum"): 0.5}
