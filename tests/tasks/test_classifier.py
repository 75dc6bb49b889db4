"""Examples as tokens, and a run's body under a new head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsae.evaluate.loading import LoadedRun, load_run
from sparsae.nn.linear import sparse_layers
from sparsae.tasks.catalogue import TASKS, Example
from sparsae.tasks.classifier import classifier, predict
from sparsae.tasks.encoding import Collator, Encoded, encode
from sparsae.train.run import start
from tests.support.runs import config_of, write_text

FAMILIES = ("gpt2", "llama", "qwen3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    start(config_of(write_text(folder / "text"), folder / "cache", "training.steps=2"), folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


def test_an_example_begins_with_the_mark_that_stands_between_its_texts(loaded: LoadedRun) -> None:
    tokenizer = loaded.tokenizer
    (encoded,), shortened = encode([Example((("list 1", "item"),), 1)], tokenizer, 16)
    mark = tokenizer.eos_id
    assert encoded.choices == ((mark, *tokenizer.encode("list 1"), mark, *tokenizer.encode("item")),)
    assert shortened == 0


def test_the_longest_text_loses_its_end(loaded: LoadedRun) -> None:
    tokenizer = loaded.tokenizer
    long = "item " * 30
    examples = [Example(((long, "list"),), 0), Example((("a", "b"),), 0)]
    (encoded, short), shortened = encode(examples, tokenizer, 12)
    last = tokenizer.encode("list")
    assert shortened == 1
    assert len(encoded.choices[0]) == 12
    assert encoded.choices[0][-len(last) :] == tuple(last)
    assert encoded.choices[0][: 12 - len(last) - 1] == (tokenizer.eos_id, *tokenizer.encode(long))[: 12 - len(last) - 1]
    assert len(short.choices[0]) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_is_the_runs_own_and_sparse(family: str, tmp_path: Path) -> None:
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", "training.steps=2", f"model.family={family}")
    start(config, tmp_path / "run", quiet=True)
    loaded = load_run(tmp_path / "run")
    layers = sparse_layers(loaded.model)
    tokens = torch.tensor([[3, 4, 5, 6]])
    hidden = loaded.model.base_model(tokens).last_hidden_state[0, -1]
    model = classifier(loaded, TASKS["mnli"], seed=0)
    assert {id(layer) for layer in sparse_layers(model).values()} == {id(layer) for layer in layers.values()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits[0], model.score.weight @ hidden)
    # The entry that pads, which is also the mark between texts, learns.
    mark = loaded.tokenizer.eos_id
    model.train()(torch.tensor([[mark, 4]]), labels=torch.tensor([1])).loss.backward()
    assert model.get_input_embeddings().weight.grad[mark].abs().sum() > 0


def test_padding_changes_nothing(loaded: LoadedRun) -> None:
    model = classifier(loaded, TASKS["sst2"], seed=0).eval()
    collator = Collator(loaded.tokenizer.pad_id, chooses=False)
    examples = [Encoded(((0, 5, 6),), 0), Encoded(((0, 7, 8, 9, 10, 11, 12),), 1), Encoded(((0, 3),), 0)]
    with torch.no_grad():
        together = model(**collator(examples)).logits
        alone = torch.cat([model(**collator([example])).logits for example in examples])
    torch.testing.assert_close(together, alone)


def test_predictions_stand_in_the_order_of_their_examples(loaded: LoadedRun) -> None:
    model = classifier(loaded, TASKS["mnli"], seed=1).train()
    collator = Collator(loaded.tokenizer.pad_id, chooses=False)
    examples = [Encoded((tuple(range(n % 7 + 2, 12)),), 0) for n in range(20)]
    alone = [predict(model, [example], collator, 1)[0] for example in examples]
    assert predict(model, examples, collator, 4) == alone
    assert len(set(alone)) > 1
    assert model.training


def test_a_choice_is_scored_by_itself(loaded: LoadedRun) -> None:
    model = classifier(loaded, TASKS["copa"], seed=0).eval()
    collator = Collator(loaded.tokenizer.pad_id, chooses=True)
    batch = collator([Encoded(((0, 5, 6, 7), (0, 8)), 1), Encoded(((0, 9), (0, 10)), 0)])
    assert batch["input_ids"].shape == (2, 2, 4)
    with torch.no_grad():
        found = model(**batch)
        scores = model.model(torch.tensor([[0, 8]])).logits
    torch.testing.assert_close(found["logits"][0, 1], scores[0, 0])
    expected = torch.nn.functional.cross_entropy(found["logits"], batch["labels"])
    torch.testing.assert_close(found["loss"], expected)


def test_heads_differ_by_seed_and_by_nothing_else(run: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        return classifier(load_run(run), TASKS["rte"], seed).score.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
