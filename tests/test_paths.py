"""Paths in settings: a variable of the environment stands for a folder, wherever a path of the data is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsae.config.load import resolve, with_absolute_paths
from sparsae.data.entry import cache_root
from sparsae.data.sources import documents
from sparsae.data.tokenizer import load_tokenizer
from sparsae.errors import InputError
from sparsae.files import expanded, refuse_unwritable


def test_only_a_variable_in_braces_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOKS", "/books")
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("${BOOKS}/part-*.txt") == "/books/part-*.txt"
    assert expanded("~/${BOOKS}") == "/home/me//books"
    for literal in ("$BOOKS/x", "a$.txt", "${}", "${a-b}", "plain"):
        assert expanded(literal) == literal


def test_every_path_of_the_data_may_begin_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text")
    assert list(documents("${PLACE}/*.txt")) == ["some text"]
    assert cache_root("${PLACE}/cache") == tmp_path / "cache"
    with pytest.raises(InputError, match=f"{tmp_path}/none: no such tokenizer"):
        load_tokenizer("${PLACE}/none")
    # A run can be resumed where the variable is not set any more.
    keys = ("source", "validation_source", "tokenizer", "cache")
    data = with_absolute_paths(resolve(overrides=[f"data.{key}=${{PLACE}}/{key}" for key in keys])).data
    assert [getattr(data, key) for key in keys] == [str(tmp_path / key) for key in keys]


@pytest.mark.parametrize("value", [None, ""])
def test_one_that_is_not_set_is_told(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOOKS", raising=False)
    if value is not None:
        monkeypatch.setenv("BOOKS", value)
    with pytest.raises(InputError) as refused:
        list(documents("${BOOKS}/a.txt"))
    assert str(refused.value) == "${BOOKS}/a.txt: the environment has no BOOKS; set it: export BOOKS=DIRECTORY"


def test_a_relative_pattern_is_found_below_a_directory_with_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "proj[1]" / "books"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("some text")
    monkeypatch.chdir(folder.parent)
    for source, found in (("books/*.txt", ["some text"]), ("books", ["some text"]), ("books/a.txt", ["some text"])):
        absolute = with_absolute_paths(resolve(overrides=[f"data.source={source}"])).data.source
        assert Path(absolute).is_absolute()
        assert list(documents(absolute)) == found
    data = with_absolute_paths(resolve(overrides=["data.cache='cache[2]'"])).data
    assert data.cache == str(folder.parent / "cache[2]")


def test_a_device_is_written_to_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: str(path) == "/dev/null")
    refuse_unwritable("--json", "/dev/null")
    with pytest.raises(InputError, match=f"no permission to write in {tmp_path}"):
        refuse_unwritable("--json", str(tmp_path / "rows.json"))
    with pytest.raises(InputError, match="no permission to write to /dev/zero"):
        refuse_unwritable("--json", "/dev/zero")
