"""Examples as tokens.

An example is the mark of a document's end, which a text follows in training too, and then its texts with that mark
between them. The last token is one of the last text. What is too long loses the end of its longest text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor

from sparsae.data import Tokenizer
from sparsae.tasks.catalogue import Example


@dataclass(frozen=True)
class Encoded:
    """The tokens of each choice of an example (one, unless it is a multiple choice), and its class."""

    choices: tuple[tuple[int, ...], ...]
    label: int

    def __len__(self) -> int:
        return max(map(len, self.choices))


def encode(examples: Sequence[Example], tokenizer: Tokenizer, length: int) -> tuple[list[Encoded], int]:
    """The examples in at most `length` tokens each, and how many of them had to be shortened."""
    texts = list(dict.fromkeys(chain.from_iterable(chain.from_iterable(example.texts for example in examples))))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    encoded, shortened = [], 0
    for example in examples:
        parts = [[ids[text] for text in choice] for choice in example.texts]
        shortened += any(sum(map(len, choice)) + len(choice) > length for choice in parts)
        choices = tuple(_joined(choice, tokenizer.eos_id, length) for choice in parts)
        encoded.append(Encoded(choices, example.label))
    return encoded, shortened


def _joined(parts: Sequence[Sequence[int]], mark: int, length: int) -> tuple[int, ...]:
    sizes = [len(part) for part in parts]
    for _ in range(sum(sizes) + len(parts) - length):
        sizes[sizes.index(max(sizes))] -= 1
    return tuple(chain.from_iterable((mark, *part[:size]) for part, size in zip(parts, sizes, strict=True)))


@dataclass(frozen=True)
class Collator:
    """Examples as one batch, padded on the right.

    `input_ids` and `attention_mask` are (B, T), or (B, choices, T) of multiple choices; `labels` (B,).
    """

    pad: int
    chooses: bool

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        length = max(map(len, batch))
        ids = torch.full((len(batch), len(batch[0].choices), length), self.pad, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            for choice, tokens in enumerate(example.choices):
                ids[row, choice, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
                mask[row, choice, : len(tokens)] = 1
        if not self.chooses:
            ids, mask = ids.squeeze(1), mask.squeeze(1)
        labels = torch.tensor([example.label for example in batch], dtype=torch.int64, device="cpu")
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_length(encoded: Sequence[Encoded], size: int) -> list[list[int]]:
    """Batches of places of examples of like lengths, which need little padding."""
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    ends = [*range(0, len(order), size), len(order)]
    return [order[first:last] for first, last in pairwise(ends)]
