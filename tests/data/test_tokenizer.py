"""Tokenizers trained, loaded and saved encode the same, here and in transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.data.tokenizer import END_OF_TEXT, load_tokenizer, pieces, train_tokenizer
from sparsae.errors import InputError

GPT2 = Path("/work/shared/data/gpt2_bpe")
TEXTS = ["def walk(tree):\n    for child in tree:\n        yield child\n", "the walker walks, the talker talks\n"] * 3


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 290)


def test_training_is_a_function_of_the_text(trained):
    assert train_tokenizer(iter(TEXTS), 290).hash == trained.hash
    assert train_tokenizer(TEXTS[:1], 290).hash != trained.hash
    assert trained.vocab_size == 290
    assert trained.eos_id == trained.raw.token_to_id(END_OF_TEXT)


def test_little_text_gives_fewer_entries():
    assert train_tokenizer(["aa"], 4096).vocab_size == 258


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_every_text_survives(trained, text):
    assert trained.decode(trained.encode(text)) == text
    assert trained.encode_batch([text]) == [trained.encode(text)]


def test_special_tokens_cannot_be_written_in_a_text(trained):
    ids = trained.encode(f"a{END_OF_TEXT}b")
    assert trained.eos_id not in ids
    assert trained.decode([*ids, trained.eos_id]) == f"a{END_OF_TEXT}b"


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab  \n\t.'1é", max_size=80), st.integers(1, 20))
def test_pieces_encode_to_the_same_ids_as_the_whole(trained, text, size):
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 2 * size
    if all(piece.startswith(" ") and not piece[1:2].isspace() for piece in cut[1:]):
        assert [i for ids in trained.encode_batch(cut) for i in ids] == trained.encode(text)


def test_saved_and_loaded_again_it_is_the_same(trained, tmp_path):
    trained.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.hash, loaded.eos_id, loaded.vocab_size) == (trained.hash, trained.eos_id, 290)


def test_transformers_reads_what_is_saved(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    read, wrapped = AutoTokenizer.from_pretrained(tmp_path), trained.to_transformers()
    for other in (read, wrapped):
        assert (other.eos_token_id, other.bos_token_id, len(other)) == (trained.eos_id, trained.eos_id, 290)
        for text in (*TEXTS, "  ünïcode\t\n\n x's"):
            ids = trained.encode(text)
            assert other(text)["input_ids"] == ids
            assert other.decode(ids) == text


def test_the_configuration_beside_a_tokenizer_names_the_end(trained, tmp_path):
    trained.save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 290, "content": "<stop>"})
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"eos_token": {"content": "<stop>"}, "bos_token": None}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.bos_token, loaded.vocab_size) == (290, loaded.eos_token, 291)
    assert loaded.encode(TEXTS[0]) == trained.encode(TEXTS[0])
    settings_file.write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json: not readable JSON"):
        load_tokenizer(tmp_path)


def test_bad_tokenizers_are_named(trained, tmp_path):
    with pytest.raises(InputError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer.json of the tokenizers library"):
        load_tokenizer(tmp_path)
    trained.save(tmp_path)
    raw = (tmp_path / "tokenizer.json").read_text().replace(END_OF_TEXT, "<other>")
    (tmp_path / "tokenizer.json").write_text(raw)
    with pytest.raises(InputError, match="no token marks the end of a document"):
        load_tokenizer(tmp_path)
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "vocab.json").write_text('{"a": 0}')
    (gpt2 / "merges.txt").write_text("#version: 0.2\nb c\n")
    with pytest.raises(InputError, match="are no byte-level BPE"):
        load_tokenizer(gpt2)


@pytest.mark.parametrize("largest", [2**22, 2**32 - 1, 2**32, -1])
def test_one_entry_cannot_ask_for_a_place_for_billions(trained, tmp_path, largest):
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["far"] = largest
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError) as refusal:
        load_tokenizer(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"\0" * 2000])
def test_files_of_another_kind_are_named(trained, tmp_path, monkeypatch, name, content):
    trained.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: not"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("sparsae.data.tokenizer._LARGEST_FILE", 1000)
    if len(content) > 1000:
        with pytest.raises(InputError, match=r"too long for a tokenizer; it may have 1,000 bytes"):
            load_tokenizer(tmp_path / "tokenizer.json" if name == "tokenizer.json" else tmp_path)


def test_marks_that_are_no_text_are_passed_over(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": [1], "bos_token": {"content": 3}}))
    assert load_tokenizer(tmp_path).eos_token == END_OF_TEXT


def test_a_text_that_a_tokenizer_cannot_encode_is_one_line(tmp_path):
    from tokenizers import models

    raw = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "known": 1}, unk_token="<absent>"))
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="the tokenizer cannot encode the text"):
        load_tokenizer(tmp_path).encode("unknown")


@pytest.mark.skipif(not GPT2.exists(), reason="GPT-2's vocabulary is not on this machine")
def test_gpt2():
    tokenizer = load_tokenizer(GPT2)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_token) == (50257, 50256, tokenizer.eos_token)
    assert tokenizer.decode([15496, 995, 50256]) == "Hello world"
