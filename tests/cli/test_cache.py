"""What is kept is listed; it goes only when it is told twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsae.cli import main
from sparsae.config.data import DataConfig
from sparsae.data import prepare


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"some lines of {name}\n" * 300)
        prepare(
            DataConfig(
                source=str(tmp_path / f"{name}.txt"), cache=str(tmp_path / "cache"), tokenizer_vocab=300,
                validation_share=0.1,
            )
        )  # fmt: skip
    (tmp_path / "cache" / "somebody's").mkdir()
    (tmp_path / "cache" / "somebody's" / "manifest.json").write_text("{}")
    return tmp_path / "cache"


def listed(cache: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    assert main(["cache", "--cache", str(cache), "--json", "-", *more]) == 0
    found: dict[str, dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_entries_are_listed_and_go_when_they_may(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(cache, capsys=capsys)
    assert sorted(str(one["text"]) for one in found.values()) == [
        f"['{cache.parent}/a.txt']", f"['{cache.parent}/b.txt']",
    ]  # fmt: skip
    first, other = found
    for one in found:
        files = [file for file in (cache / one).rglob("*") if file.is_file()]
        assert found[one]["bytes"] == sum(file.stat().st_size for file in files)
    command = ["cache", "--cache", str(cache), "--remove"]
    for wrong, words in (
        ([first], "would remove 1 entry"),
        (["--all"], "would remove 2 entries"),
        ([], "or give --all"),
        (["zz", "--yes"], "no entry has this name"),
        (["", "--yes"], "2 entries begin so"),
    ):
        assert main([*command, *wrong]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert main(["cache", "--cache", str(cache), "--yes"]) == 2
    assert listed(cache, capsys=capsys) == found
    assert main([*command, first[:8], "--yes"]) == 0
    assert list(listed(cache, capsys=capsys)) == [other]
    (cache / other / "manifest.json").write_text("no longer what it was")
    assert main(["cache", "--cache", str(cache)]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main([*command, "--all", "--yes"]) == 0
    assert [path.name for path in cache.iterdir()] == ["somebody's"]


@pytest.mark.parametrize("command", ["presets", "methods", "rules"])
def test_what_there_is_is_listed_with_a_line_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"presets": "demo", "methods": "sparsae", "rules": "rigl"}[command] in found
    assert all(found.values())


def test_a_shell_completes_commands_and_names(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, at, expected in (
        ("sparsae pres", 1, {"presets"}),
        ("sparsae train --preset gpt2", 3, {"gpt2-small", "gpt2-medium"}),
    ):
        monkeypatch.setenv("_SPARSAE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(at))
        with pytest.raises(SystemExit) as ended:
            main([])
        assert ended.value.code == 0
        assert set(capfd.readouterr().out.split()) == expected
