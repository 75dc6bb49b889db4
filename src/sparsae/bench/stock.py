"""The dense model trained with transformers and torch as they come: what people have without Sparsae."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from sparsae.bench.clock import synchronize
from sparsae.config.schema import Config
from sparsae.core.randomness import generator
from sparsae.models import quiet_import, transformers_config
from sparsae.train.model import choose_device


class Stock:
    """transformers' model with its own loss and attention, torch's AdamW and clipping, on the same random tokens.

    Model, batches, precision, accumulation and compilation are those of the settings; parameterization is not.
    """

    def __init__(self, config: Config) -> None:
        settings, vocabulary = config.training, config.model.vocab_size or config.data.tokenizer_vocab
        self._device, self._settings = choose_device(settings.device), settings
        shape = (settings.accumulation, settings.batch_size, config.model.context + 1)
        rng = generator(config.seed, "bench tokens")
        self.tokens_ABT = torch.randint(vocabulary, shape, generator=rng, device="cpu").to(self._device)
        self.seconds: list[float] = []
        from transformers import AutoModelForCausalLM

        with quiet_import(), torch.device(self._device):
            self.model: Any = AutoModelForCausalLM.from_config(transformers_config(config.model, vocabulary, 0)).train()
        self.model.loss_type = "ForCausalLM"  # which it takes anyway, and says so
        self._called = torch.compile(self.model, mode=settings.compile_mode) if settings.compile else self.model
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )

    def step(self, counts: bool) -> float:
        """One optimizer step, whose seconds are kept where it counts; its loss."""
        start, losses = time.perf_counter(), []
        narrow = self._settings.precision == "bfloat16"
        for batch_BT in self.tokens_ABT:
            targets_BT = batch_BT[:, 1:].contiguous()
            with torch.autocast(self._device.type, torch.bfloat16, enabled=narrow):
                found = self._called(input_ids=batch_BT[:, :-1], labels=targets_BT, shift_labels=targets_BT)
            loss = found.loss / len(self.tokens_ABT)
            loss.backward()
            losses.append(loss.detach())
        if self._settings.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        synchronize(self._device)
        if counts:
            self.seconds.append(time.perf_counter() - start)
        return float(sum(losses))
