"""Shards read as one sequence, whatever their number and type."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.data.shards import ShardedTokens, ShardWriter, digest, map_shards, token_dtype


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 60000), max_size=6), max_size=5), st.data())
def test_slices_are_those_of_the_whole(shards, data):
    whole = [token for shard in shards for token in shard]
    tokens = ShardedTokens([np.array(shard, dtype="<u2") for shard in shards])
    index = st.one_of(st.none(), st.integers(-40, 40))
    start, stop = data.draw(index), data.draw(index)
    assert len(tokens) == len(whole)
    part = tokens[start:stop]
    assert part.dtype == np.int64
    assert part.tolist() == whole[start:stop]
    if whole:
        assert tokens[-1] == whole[-1]
    with pytest.raises(IndexError):
        tokens[len(whole)]
    with pytest.raises(ValueError, match="step 1"):
        tokens[::2]


@pytest.mark.parametrize(("vocab_size", "size"), [(65536, 2), (65537, 4)])
def test_written_tokens_come_back(tmp_path, vocab_size, size):
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == size
    writer = ShardWriter(tmp_path, "train", dtype, vocab_size, shard_tokens=10)
    parts = [np.arange(vocab_size - n, vocab_size) for n in (3, 0, 20, 2, 5)]
    for part in parts:
        writer.write(part, 1, len(part) * 2)
    writer.close()
    whole = np.concatenate(parts)
    assert writer.summary() == {
        "documents": 5,
        "tokens": 30,
        "bytes": 60,
        "shards": [f"train-0000{n}.bin" for n in range(3)],
    }
    assert map_shards(tmp_path, writer.names, dtype)[:].tolist() == whole.tolist()
    assert writer.counts.tolist() == np.bincount(whole, minlength=vocab_size).tolist()


def test_the_digest_sees_changes_and_cuts_of_small_and_large_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    known = digest(path)
    path.write_bytes(bytes(999))
    assert digest(path) != known
    path.write_bytes(bytes(999) + b"\1")
    assert digest(path) != known
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    known = digest(path)
    for place in (0, 100 * 2**20 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        assert digest(path) != known
        known = digest(path)
