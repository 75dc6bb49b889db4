"""A run's trained body under a new head: transformers' own class for sequence classification of its family."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsae.core.randomness import generator
from sparsae.evaluate.loading import LoadedRun
from sparsae.models import INITIAL_STD, quiet_import
from sparsae.tasks.catalogue import Task
from sparsae.tasks.encoding import Collator, Encoded, by_length


class ChoiceModel(nn.Module):
    """Chooses by the scores that a model with one class gives each choice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids: (B, choices, T). Returns `logits` (B, choices), and `loss` where there are labels (B,)."""
        scores = self.model(input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1)).logits
        logits = scores.view(input_ids.shape[:2])
        return (
            {"logits": logits}
            if labels is None
            else {"loss": functional.cross_entropy(logits, labels), "logits": logits}
        )


def classifier(loaded: LoadedRun, task: Task, seed: int) -> nn.Module:
    """The run's model with its causal head replaced by one of the task's classes, on the last token's hidden state.

    The body is the run's own, with its sparse layers: it is taken over and trains from now on.
    """
    from transformers import AutoModelForSequenceClassification

    body: Any = loaded.model
    config = copy.deepcopy(body.config)
    config.num_labels = 1 if task.chooses else len(task.labels)
    config.problem_type = "single_label_classification"
    with quiet_import(), torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config)  # attends as the body
    setattr(model, model.base_model_prefix, body.base_model)
    shape = model.score.weight.shape
    drawn = generator(seed, "head", task.name)
    head = torch.randn(shape, generator=drawn, dtype=torch.float32, device="cpu") * INITIAL_STD
    model.score.weight = nn.Parameter(head.to(loaded.device))
    # Only now: an embedding that knew of it before would not train the entry that pads.
    model.config.pad_token_id = loaded.tokenizer.pad_id
    model.requires_grad_(True)
    return ChoiceModel(model) if task.chooses else model


@torch.no_grad()
def predict(
    model: nn.Module, encoded: Sequence[Encoded], collator: Collator, batch_size: int, bfloat16: bool = False
) -> list[int]:
    """The class of each example, in evaluation mode; the model is left in the mode that it was in.

    bfloat16: of the arithmetic, by autocast.
    """
    before, device = model.training, next(model.parameters()).device
    model.eval()
    found = [0] * len(encoded)
    for places in by_length(encoded, batch_size):
        batch = {name: part.to(device) for name, part in collator([encoded[place] for place in places]).items()}
        del batch["labels"]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            labels = model(**batch)["logits"].argmax(-1).tolist()
        for place, label in zip(places, labels, strict=True):
            found[place] = label
    model.train(before)
    return found
