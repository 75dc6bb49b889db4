# %% [markdown]
"""# Train, export, load with transformers

Train by the program, export, and load what it wrote with transformers alone: `python examples/export.py`.

The same as on the command line:

    sparsae train --preset demo --steps 40 --out RUN
    sparsae export RUN --to DIRECTORY
"""

# %%
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsae.cli import main as sparsae

# A model that takes seconds on one core, on the source of Python's standard library.
SMALL = [
    *("--set", "model={layers: 1, width: 32, heads: 2, context: 32}"),
    *("--set", "data={max_documents: 10, tokenizer_vocab: 300}"),
    *("--set", "training={batch_size: 4, validation_sequences: 8}"),
]

# %% [markdown]
# Commands of the program, as a shell would give them.


# %%
def command(*arguments: str) -> None:
    if code := sparsae(list(arguments)):
        sys.exit(code)


# %% [markdown]
# From the run's directory to one that transformers loads.


# %%
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, exported = f"{folder}/run", f"{folder}/model"
        command("train", "--preset", "demo", "--steps", "40", *SMALL, "--out", run)
        command("export", run, "--to", exported)

        # From here on nothing is Sparsae's: zeros stand where there is no connection.
        model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
        tokens = tokenizer("import ", return_tensors="pt")
        with torch.no_grad():
            print(tokenizer.decode(model.generate(**tokens, max_new_tokens=8, do_sample=False)[0]))
        weight = model.transformer.h[0].mlp.c_fc.weight
        zeros = (weight == 0).float().mean()
        print(f"{zeros:.0%} of a layer is zero; files: {', '.join(sorted(f.name for f in Path(exported).iterdir()))}")
        assert zeros > 0.5


# %%
if __name__ == "__main__":
    main()
