"""Malformed inputs by the hundred: exit code 2, one line that names file and place, soon, and nothing written."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.config.text import dump
from sparsae.config.walk import settings_in
from tests.cli.test_bad_input import CASES

pytestmark = pytest.mark.soak

CONFIG = resolve(None, "demo", "sparsae-written", [])
# What a family of transformers takes is its own.
KEYS = sorted({keys for keys, *_ in settings_in(CONFIG)} - {("model", "transformers")})
# None of these is a value of any setting.
WRONG: list[Any] = [{"a": {"b": 1}}, [{"a": 1}], [[["x"]]]]
_TALLY: Counter[str] = Counter()


def refused(arguments: list[str], place: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    began = time.monotonic()
    code = main(arguments)
    took = time.monotonic() - began
    out, err = capsys.readouterr()
    assert code == 2, (arguments, out, err)
    assert err.startswith("sparsae: error: "), err
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err, (word, err)
    assert took < 2, took
    assert sorted(place.rglob("*")) == before
    _TALLY["inputs"] += 1
    _TALLY["slowest, ms"] = max(_TALLY["slowest, ms"], round(1000 * took))


@pytest.mark.parametrize("keys", KEYS, ids=".".join)
def test_a_setting_with_a_value_that_is_none(
    keys: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each setting three times: in a file, at the same place beside all others, and on the command line."""
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        wrong = WRONG[(len(keys[-1]) + number) % 3]
        tree = yaml.safe_load(dump(CONFIG))
        inner = tree
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = wrong
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
        refused(["train", "wrong.yaml"], tmp_path, ["wrong.yaml", keys[-1]], capsys)
    refused(
        ["train", "--method", "sparsae-written", "--set", f"{'.'.join(keys)}=[[{{a: 1}}]]"],
        tmp_path,
        ["--set", keys[-1]],
        capsys,
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_file_of_anything(data: st.DataObject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that were cut, flipped, or replaced by bytes, of which whatever is refused is refused well."""
    whole = bytearray(dump(CONFIG).encode())
    kind = data.draw(st.sampled_from(["bytes", "flip", "cut in", "tree"]))
    if kind == "bytes":
        content = data.draw(st.binary(min_size=1, max_size=200))
    elif kind == "flip":
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
        content = bytes(whole)
    elif kind == "cut in":
        at = data.draw(st.integers(0, len(whole)))
        content = bytes(whole[:at]) + data.draw(st.binary(min_size=1, max_size=9)) + bytes(whole[at:])
    else:
        leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
        tree = st.recursive(leaf, lambda inner: st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5)
        content = yaml.safe_dump(data.draw(tree), allow_unicode=True).encode(errors="surrogatepass")
    file = tmp_path / "any.yaml"
    file.write_bytes(content)
    if main(["train", str(file), "--print-config"]) == 0:
        capsys.readouterr()
        return
    capsys.readouterr()
    refused(["train", str(file), "--out", str(tmp_path / "run")], tmp_path, ["any.yaml"], capsys)


def test_three_hundred_were_refused() -> None:
    print(f"{_TALLY['inputs']} malformed inputs beside {len(CASES)} of tests/cli; slowest {_TALLY['slowest, ms']} ms")
    assert _TALLY["inputs"] + len(CASES) >= 300
