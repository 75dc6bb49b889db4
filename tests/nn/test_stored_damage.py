"""A stored sparse model that was damaged, or that cannot be stored: one line that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsae import InputError
from sparsae.files import sha256_of, with_seal
from tests.support.hf import sparse_llama


def table(folder: Path, change: Callable[[dict[str, Any]], None], seal: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    entry = {key: value for key, value in config["quantization_config"].items() if key != "sha256"}
    change(entry)
    config["quantization_config"] = (
        with_seal(entry) if seal else entry | {"sha256": config["quantization_config"]["sha256"]}
    )
    (folder / "config.json").write_text(json.dumps(config))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Other tensors in the file, and told of as if they had been saved so."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    table(folder, lambda entry: entry["files"].update({path.name: sha256_of(path)}), seal=True)


def flipped(folder: Path, place: float) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[round(place * len(data))] ^= 1
    (folder / "model.safetensors").write_bytes(data)


LAYER = "model.layers.0.mlp.up_proj"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a value": (lambda f: flipped(f, 0.9), "was changed since it was saved"),
    "a bit of an index": (lambda f: flipped(f, 0.5), "was changed since it was saved"),
    "cut short": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "was changed since it was saved"),
    "a count": (
        lambda f: table(f, lambda entry: entry["layers"][LAYER].update(nnz=7), seal=False),
        "quantization_config was changed since it was saved",
    ),
    "a layer left out": (
        lambda f: table(f, lambda entry: entry["layers"].pop(LAYER), seal=False),
        "quantization_config was changed since it was saved",
    ),
    "another format": (lambda f: table(f, lambda entry: entry.update(format=9), seal=True), "has format 9"),
    "a unit that does not fit": (
        lambda f: table(f, lambda entry: entry["layers"][LAYER].update(unit=[7, 1]), seal=True),
        "does not hold .* in units of 7x1",
    ),
    "a file too few": (
        lambda f: table(f, lambda entry: entry["files"].update(other="0"), seal=True),
        "other: is only one of what was found and what config.json names",
    ),
    "indices out of order": (
        lambda f: rewritten(f, lambda t: t.update({f"{LAYER}.indices": t[f"{LAYER}.indices"].flip(0).contiguous()})),
        rf"layer {LAYER}: the indices .* are not sorted",
    ),
    "an index outside": (
        lambda f: rewritten(f, lambda t: t[f"{LAYER}.indices"].__setitem__(-1, 10**6)),
        rf"layer {LAYER}: the indices .* must lie in",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line(name: str, tmp_path: Path) -> None:
    sparse_llama().save_pretrained(tmp_path)
    damage, match = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(InputError, match=match) as caught:
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_gone_or_another_is_told(tmp_path: Path) -> None:
    for folder, seed in (("one", 0), ("two", 1)):
        model = sparse_llama()
        with torch.no_grad():
            model.lm_head.weight += seed
        model.save_pretrained(tmp_path / folder, max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    changed = [n for n in names if (tmp_path / "one" / n).read_bytes() != (tmp_path / "two" / n).read_bytes()]
    (tmp_path / "one" / changed[0]).write_bytes((tmp_path / "two" / changed[0]).read_bytes())
    for _ in range(2):
        with pytest.raises(InputError, match=f"{changed[0]}: is missing or was changed since it was saved"):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
        (tmp_path / "one" / changed[0]).unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; name a directory"):
        sparse_llama().save_pretrained(tmp_path / "file")
    with pytest.raises(InputError, match="not saved as a distributed checkpoint"):
        sparse_llama().save_pretrained(tmp_path / "dcp", distributed_checkpoint=True)
    model = sparse_llama()
    with pytest.raises(InputError, match=r"the weights of model\.layers\.0\S+ were not saved under this name"):
        model.save_pretrained(tmp_path / "part", state_dict={"lm_head.weight": model.lm_head.weight})
    model.model.layers[0] = torch.compile(model.model.layers[0])
    with pytest.raises(InputError, match=r"the weights of model\.layers\.0\S+ were not saved under this name"):
        model.save_pretrained(tmp_path / "compiled")
