"""The model card of an export: what the model is and what was measured of it, from the run's own records."""

from __future__ import annotations

import math
from pathlib import PurePath

from sparsae import __version__
from sparsae.config.data import STDLIB, SourceConfig
from sparsae.config.schema import Config
from sparsae.evaluate.loading import LoadedRun
from sparsae.families import FAMILIES
from sparsae.nn.linear import sparse_layers
from sparsae.runs.rows import ValidationRow, perplexity
from sparsae.runs.summary import Origin
from sparsae.train.progress import readable_perplexity

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

A {family} language model of {parameters:,} weights. {what}. It was trained {from_what} with
Sparsae {version}. It follows no instructions: it continues text like that which it read.

| | |
|---|---|
{facts}

## Training text

{text}

## Measured

{measured}

Nothing else was measured: neither what it knows nor what harm its text could do.

## Loading

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={new_tokens})[0]))
```

{storage}
"""


# By the form of an export.
_STORAGE = {
    "dense": "The zeros are stored and multiplied like any weight. `topology.safetensors` has the flat indices of the "
    "active units of each sparse layer, for tools that can use them.",
    "sparse": "Only weights that exist are stored, and multiplied: import `sparsae` before loading. Without it "
    "transformers looks for a file that is not there, and stops.",
}


def model_card(loaded: LoadedRun, teacher: bool, form: str) -> str:
    """The README.md of an export of the run's student or teacher, whose model is still sparse, in a form."""
    config, layers = loaded.config, sparse_layers(loaded.model)
    is_sparse = bool(layers) and form == "sparse"
    active = sum(layer.topology.nnz for layer in layers.values())
    others = "not there" if is_sparse else "zero"
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    exist = f"{active:,} of their {weights:,} weights exist, the others are {others}"
    sparse = f"{len(layers)} of its layers are sparse: {exist}"
    facts = {
        "architecture": f"{config.model.layers} blocks of width {config.model.width}, {config.model.heads} heads",
        "context": f"{config.model.context:,} tokens",
        "vocabulary": f"{loaded.tokenizer.vocab_size:,} entries",
        "sparsity": f"{1 - active / weights:.2%} of the sparse layers{_by_quota(config)}" if layers else "none",
        "method": config.method + (", the average of the trained model (its teacher)" if teacher else ""),
        "steps": f"{loaded.step:,} of {config.training.steps:,}, of {config.tokens_per_step:,} tokens each",
        "seed": str(config.seed),
    }
    return (
        _CARD.format(
            tags="\n".join(f"- {tag}" for tag in ("sparsae", *(["sparse"] if layers else []))),
            name=loaded.run.path.resolve().name,
            family=FAMILIES[config.model.family].title,
            parameters=sum(parameter.numel() for parameter in loaded.model.parameters()) + weights - active,
            what=sparse if layers else "All of them exist",
            version=__version__,
            from_what=_began_with(loaded),
            facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
            text="\n".join(map(_weighed, config.data.texts)) if config.data.sources else _named(config.data.source),
            measured=_measured(loaded, teacher),
            prompt="def " if config.data.texts[0].source == STDLIB else "The ",
            new_tokens=max(1, min(40, config.model.context - 4)),  # the prompt has four bytes, so at most four tokens
            imports="import sparsae  # whose form of files this is\n" if is_sparse else "",
            storage=_STORAGE[form] if layers else "",
        ).rstrip()
        + "\n"
    )


def _began_with(loaded: LoadedRun) -> str:
    manifest = loaded.run.manifest()
    if manifest is None or not manifest.started_from:
        return "from scratch"
    source = Origin(**manifest.started_from)
    return f"from {'another run' if source.run else 'another model'}'s weights ({PurePath(source.path).name})"


def _by_quota(config: Config) -> str:
    quota = config.sparsity.quota
    return "" if quota is None else f", {quota}: of every {quota.of} weights of a row in turn {quota.active} exist"


def _weighed(text: SourceConfig) -> str:
    return f"- weight {text.weight:g}: {_named(text.source)}"


def _named(source: str) -> str:
    """The name of a source alone: where it lay is nobody's business."""
    if source == STDLIB:
        return "The source code of Python's own standard library."
    if source.startswith("hf:"):
        return f"The dataset `{source.removeprefix('hf:')}` of the Hugging Face Hub."
    return f"Text that was given as `{PurePath(source).name}`; the run knows nothing else of it."


def _measured(loaded: LoadedRun, teacher: bool) -> str:
    """The last validation up to the exported step, and what the run's summary has to hold against it."""
    rows = [row for row in loaded.run.read_metrics(ValidationRow) if row.step <= loaded.step]
    found = [(row.step, row.teacher_loss if teacher else row.loss) for row in rows]
    measured = [(step, loss) for step, loss in found if loss is not None and not math.isnan(loss)]
    if not measured:
        return "No validation loss was measured."
    step, loss = measured[-1]
    lines = [
        ("validation loss, nats a token", f"{loss:.4f}"),
        ("validation perplexity", readable_perplexity(perplexity(loss))),
    ]
    if summary := loaded.run.read_summary():
        others = {"of a unigram model": summary.unigram_perplexity, "before training": summary.untrained_perplexity}
        known = {label: value for label, value in others.items() if not math.isnan(value)}
        lines += [(f"perplexity {label}", readable_perplexity(value)) for label, value in known.items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in lines)
    other = loaded.config.data.validation_source
    held_out = "held-out text of the same source" if other is None else f"other text. {_named(other)}"
    return f"At step {step:,}, on {held_out}\n\n| | |\n|---|---|\n{table}"
