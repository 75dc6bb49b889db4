"""The documentation holds: its code runs, its links lead somewhere, its tables say what the code does."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from sparsae.cli import app, main
from sparsae.config.load import resolve, setting_names
from sparsae.config.schema import Config
from sparsae.config.shipped import methods, presets
from sparsae.config.text import inline
from sparsae.core.record import field_names
from sparsae.registry import RULES
from sparsae.rules import StrategyConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("[A-Z]*.md"), *(ROOT / "docs").rglob("*.md")])
SETTINGS = re.compile(r"^\| symbol \| meaning \| setting \|(.+)\|$", re.MULTILINE)

# What the project promised that summary.json carries at least.
PROMISED = """
preset method seed steps tokens parameters_dense sparsity nnz nnz_target validation_loss validation_perplexity
unigram_perplexity untrained_perplexity train_flops train_flops_by_part train_flops_dense_equivalent
state_bytes_sparse_layers state_bytes_sparse_layers_dense_equivalent peak_memory_bytes tokens_per_second
topology_updates topology_updates_accepted seconds
"""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path) -> list[tuple[int, str]]:
    """(line number, text) of each Python block of a page."""
    text = page.read_text("utf-8")
    return [
        (text.count("\n", 0, block.start(2)), block[2])
        for block in re.finditer(r"^```(python|py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def table_rows(text: str, header: str) -> list[list[str]]:
    """The cells of all tables whose header row begins with `header`."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines(keepends=True):
        if line.startswith(header):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows


def first_code(cell: str) -> str:
    found = re.match(r"`([^`]+)`", cell)
    assert found, f"no `...` at the start of the cell {cell!r}"
    return found[1]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Markdown's toc make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# What these pages make known, or set for all of accelerate, would be met by the tests that follow in this process.
REGISTERS = ("register(", "register_backend(", ".register\n", "import Accelerator", "sparsae.integrations")
RUN = """
import json, sys
page, blocks = json.load(sys.stdin)
namespace = {"__name__": "__docs__"}
for source in blocks:
    exec(compile(source, page, "exec"), namespace)
"""


# The rule of that page is for processes of its own: see test_own_rule.py.
@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p) and p.name != "own-rule.md"], ids=name_of)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blank lines in front give errors the line numbers of the page.
    blocks = ["\n" * line + source for line, source in code_blocks(page)]
    if any(word in source for source in blocks for word in REGISTERS):
        told = json.dumps([str(page), blocks])
        done = subprocess.run([sys.executable, "-c", RUN], input=told, text=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for source in blocks:
        exec(compile(source, str(page), "exec", dont_inherit=True), namespace)


def test_the_api_page_has_code() -> None:
    assert len(code_blocks(ROOT / "docs" / "api.md")) >= 8


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for link in links:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name_of(page)}: {link}: no such heading"


def test_every_field_of_a_row_of_tasks_is_explained() -> None:
    from sparsae.tasks.record import TaskRow

    table = (ROOT / "docs/tasks.md").read_text("utf-8").partition("| field | what it is |")[2].partition("\n\n")[0]
    told = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert told == set(field_names(TaskRow))


def test_the_summary_table_is_the_summary() -> None:
    from sparsae.runs.summary import Summary

    written = set(field_names(Summary))
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    documented = [first_code(row[0]) for row in table_rows(text, "| key | meaning")]
    assert len(documented) == len(set(documented))
    assert set(documented) == written
    assert set(PROMISED.split()) <= written


def test_the_fields_of_every_row_of_the_metrics_are_explained() -> None:
    from sparsae.runs.rows import KINDS
    from sparsae.search.rows import AgeRow, CandidateRow, LayerRow

    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    section = text.partition("## Rows of metrics.jsonl")[2].partition("\n## ")[0]
    told = {part.partition("**")[0]: set(re.findall(r"`(\w+)`", part)) for part in section.split("\n**")[1:]}
    assert set(told) == set(KINDS)
    for name, kind in KINDS.items():
        assert set(field_names(kind)) <= told[name], name
    inner = {name for part in (AgeRow, CandidateRow, LayerRow) for name in field_names(part)}
    assert inner <= told["topology"]
    # A name that is told and no field's is a rule, a term, a value, or what a rule adds.
    others = {"cross_entropy", "diversity", "activity", "candidates_count", "mutation_rate", "reset_probability"}
    others |= {"drop_fraction", "progress", "fitness", "gradient", "set", "rigl", "gse", "granet"}
    assert told["topology"] <= set(field_names(KINDS["topology"])) | inner | others
    for name, kind in KINDS.items():
        if name != "topology":
            assert told[name] - set(field_names(kind)) <= {"test_loss"}, name


def test_presets_and_methods_are_all_explained() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert sorted(first_code(row[0]) for row in table_rows(text, "| preset |")) == sorted(presets())
    explained = {name for row in table_rows(text, "| method |") for name in re.findall(r"`([^`]+)`", " ".join(row))}
    explained &= set(methods())
    # A rule explains itself: `sparsae methods` shows the first line of its settings.
    assert set(methods()) - set(RULES.names()) <= explained <= set(methods())
    assert all(RULES[name].title for name in RULES.names())


def test_the_readme_has_the_numbers_of_the_run_in_its_picture() -> None:
    """One script makes picture, record and paragraph of one run; see benchmarks/demo.py."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "benchmarks" / "demo.py")
    assert spec
    assert spec.loader
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    record = json.loads(demo.RECORD.read_text("utf-8"))
    found = demo.MARKED.search(demo.README.read_text("utf-8"))
    assert found
    assert found[0] == demo.paragraph(record["summary"], record["machine"])


def test_defaults_of_the_method_page_are_those_of_the_methods() -> None:
    """Each table of settings names the methods whose values its columns hold."""
    text, checked = (ROOT / "docs" / "method.md").read_text("utf-8"), 0
    for columns in {found[1] for found in SETTINGS.finditer(text)}:
        configs = [resolve(method=method) for method in re.findall(r"`([^`]+)`", columns)]
        for row in table_rows(text, f"| symbol | meaning | setting |{columns}|\n"):
            key = first_code(row[2])
            checked += 1
            for cell, config in zip(row[3:], configs, strict=True):
                assert first_code(cell) == inline(value_of(config, key)), key
    assert checked > 50


def test_the_method_page_names_every_setting_of_the_method() -> None:
    config = resolve(method="sparsae-written")
    rows = table_rows((ROOT / "docs" / "method.md").read_text("utf-8"), "| symbol | meaning | setting")
    named = {first_code(row[2]) for row in rows}
    wanted = {f"topology.{key}" for key in leaves(config.topology.model_dump())} - {"topology.rule"}
    wanted |= {f"teacher.{key}" for key in leaves(config.teacher.model_dump())} - {"teacher.enabled"}
    wanted |= {f"parameterization.{key}" for key in leaves(config.parameterization.model_dump())}
    assert wanted <= named


def test_what_sparsae_written_is_said_to_have_taken_it_has() -> None:
    written = resolve(method="sparsae-written")
    rows = table_rows((ROOT / "docs" / "method.md").read_text("utf-8"), "| part | the text | taken")
    settings = [setting for row in rows for setting in re.findall(r"`([^`]+)`", row[3])]
    assert len(settings) > 15
    for setting in settings:
        key, _, value = setting.partition("=")
        assert value == inline(value_of(written, key)), key


def test_the_migration_page_names_settings_that_there_are() -> None:
    page = (ROOT / "docs" / "migration.md").read_text("utf-8")
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z0-9_.]+)[=`]", page))
    assert len(named) > 25
    assert {name for name in named if name not in setting_names()} == set()


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def leaves(tree: dict[str, Any]) -> list[str]:
    return [
        f"{name}.{inner}" if inner else name
        for name, value in tree.items()
        for inner in (leaves(value) if isinstance(value, dict) else [""])
    ]


def test_the_glossary_has_the_words_of_the_trade() -> None:
    terms = re.findall(r"^\*\*(.+?)\.\*\*", (ROOT / "docs" / "glossary.md").read_text("utf-8"), re.MULTILINE)
    words = [word.lower() for term in terms for word in term.split(", ")]
    assert len(words) == len(set(words))  # one word, one thing
    assert {
        "topology",
        "density",
        "nnz",
        "rule",
        "method",
        "update",
        "drop",
        "grow",
        "prune",
        "sparsae-written",
    } <= set(words)


def test_the_tables_of_growth_and_of_a_strategy_are_what_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row's example runs; every setting of a strategy has a row, with its default; genes can evolve."""
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    section = page.partition("## Growth, ramp and teacher by example")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \|.*\| `(sparsae train .*)` \|$", section, re.M)
    assert len(rows) == 6
    for setting, example in rows:
        assert setting in setting_names()
        assert f"{setting}=" in example
        assert main([*shlex.split(example)[1:], "--print-config"]) == 0, example
    capsys.readouterr()
    page = (ROOT / "docs" / "method.md").read_text("utf-8")
    table = page.partition("| setting of `topology.strategy` |")[2].partition("\n\n")[0]
    told = dict(re.findall(r"^\| `([a-z_.]+)` \| `([^`]*)` \|", table, re.M))
    strategy = StrategyConfig()
    fields = {name: getattr(strategy, name) for name in type(strategy).model_fields if name != "damage"}
    fields |= {f"damage.{name}": getattr(strategy.damage, name) for name in type(strategy.damage).model_fields}
    assert set(told) == set(fields)
    for name, value in fields.items():
        plain = {key: list(ends) for key, ends in value.items()} if isinstance(value, dict) else value
        assert yaml.safe_load(told[name]) == plain, name
    table = page.partition("| gene |")[2].partition("\n\n")[0]
    genes = [name for row in table.splitlines()[2:] for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])]
    assert len(genes) == 8
    for gene in genes:
        ends = [1, 2] if gene not in ("drop_fraction", "random_share") else [0.5, 1]
        genes_of = f"topology.strategy.genes={{{gene}: {ends}}}"
        assert resolve(method="sparsae-evolved", overrides=[genes_of]).topology.strategy.genes  # type: ignore[attr-defined]


def command_lines(page: Path) -> list[str]:
    """The commands of `sparsae` in a page's blocks: indented, or fenced as a shell's."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.M | re.S)
    unfenced = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    lines = [*"".join(fenced).splitlines(), *re.findall(r"^ {4,}(.*)$", unfenced, re.M)]
    found = [re.fullmatch(r"(?:[A-Z_]+=\S+ )*(?:torchrun .* -m )?sparsae (.+)", line) for line in lines]
    return [line[1] for line in found if line]


def complaint(command: Any, line: str, settings: Collection[str]) -> str | None:
    """Why a command line cannot be: a command or an option that there is not, or a setting."""
    words = shlex.split(line, comments=True)
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            return None if words[0].startswith("-") else f"no command {words[0]}"
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word, following in pairwise([*words, ""]):
        if word.startswith("--") and word.partition("=")[0] not in options | {"--help"}:
            return f"no option {word}"
        key = following.partition("=")[0]
        # What `topology` has is up to the rule.
        known = key.startswith("topology.") or any(f"{name}.".startswith(f"{key}.") for name in settings)
        if word == "--set" and not known:
            return f"no setting {key}"
    return None


def test_the_commands_of_the_documentation_are_those_that_there_are() -> None:
    lines = {line: page for page in PAGES for line in command_lines(page)}
    program, settings = get_command(app), setting_names()
    assert len(lines) > 60
    assert complaint(program, "train --presett demo", settings) == "no option --presett"
    assert complaint(program, "train --set training.step=3", settings) == "no setting training.step"
    wrong = {
        f"{name_of(page)}: sparsae {line}: {why}"
        for line, page in lines.items()
        if (why := complaint(program, line, settings))
    }
    assert wrong == set()
