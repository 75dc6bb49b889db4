"""Terms of a score: what every registered one promises, and what those of the written proxy say."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsae.config.editors import json_schema
from sparsae.config.load import resolve
from sparsae.config.rules import TermConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.text import dump
from sparsae.core.heads import HeadLayout
from sparsae.core.observation import LayerView, PastValues
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear
from sparsae.registry import TERMS
from sparsae.report.data import RunData
from sparsae.report.figures import term as term_panel
from sparsae.rules import EvolutionConfig
from sparsae.rules.evolution import Evolution
from sparsae.rules.parts.proxy import ProxyConfig
from sparsae.runs.rows import TopologyRow, read_row
from sparsae.score import Running, Score, Term, Trial, combine
from sparsae.search.sparsifier import Sparsifier
from sparsae.surgery import Change, prepare_swap
from tests.support.loops import mlp, score_of
from tests.support.records import candidate_row, topology_row
from tests.support.runs import config_of, rows, write_text

NAMES = TERMS.names()


def variants(name: str) -> list[Term[Any]]:
    """A term with its default settings, and with each other choice of each of them."""
    default = TERMS[name].settings()
    schema = type(default).model_json_schema()["properties"]
    others = [{key: choice} for key, field in schema.items() for choice in field.get("enum", ())]
    return [TERMS[name].build(TERMS[name].settings.model_validate(settings)) for settings in ({}, *others)]


ALL = [term for name in NAMES for term in variants(name)]


def named(term: Term[Any]) -> str:
    return f"{term.name}-{'-'.join(str(value) for value in term.config.model_dump().values())}"


def layers_of(unit: tuple[int, int]) -> dict[str, SparseLinear]:
    layers = {}
    for index, shape in enumerate([(24, 16), (16, 32), (16, 16)]):
        topology = Topology.random(shape, shape[0] * shape[1] // (5 * unit[0] * unit[1]), generator(7, index), unit)
        layers[f"layer{index}"] = SparseLinear(topology, torch.randn(topology.values_shape, generator=generator(index)))
    return layers


def view_of(layer: SparseLinear, needs: frozenset[Any], seed: int) -> LayerView:
    """What is seen of a layer under these needs, and nothing else."""
    topology, rng = layer.topology, generator(seed)
    sample = topology.sample_inactive(topology.count, rng)

    def drawn(count: int) -> Tensor:
        return torch.randn(count, *topology.values_shape[1:], generator=rng)

    return LayerView(
        topology,
        layer.values.data,
        (1, topology.units),
        heads=HeadLayout("out", 8) if seed == 0 else None,
        gradient=drawn(topology.count) if "gradient" in needs else None,
        moment=drawn(topology.count) if "moments" in needs else None,
        sample=sample if needs & {"gradient_at", "dense_gradient"} else None,
        sample_gradient=drawn(sample.numel()) if needs & {"gradient_at", "dense_gradient"} else None,
        active_gradient=drawn(topology.count).abs() if "dense_gradient" in needs else None,
        past={need.steps: drawn(topology.count) for need in needs if isinstance(need, PastValues)},
    )


def trial_of(needs: frozenset[Any], unit: tuple[int, int] = (1, 1), *, changed: bool = True) -> Trial:
    """A topology that is scored, of three layers of which two are changed; it has just what these needs bring."""
    layers, swap = layers_of(unit), Swap({}, {})
    if changed:
        some = {name: layer.topology for name, layer in layers.items() if name != "layer1"}
        drop = {name: topology.indices[:3] for name, topology in some.items()}
        swap = Swap(drop, {name: topology.sample_inactive(3, generator(1)) for name, topology in some.items()})
    norms = {name: 0.5 + index for index, name in enumerate(layers)}
    return Trial(
        {name: view_of(layer, needs, seed) for seed, (name, layer) in enumerate(layers.items())},
        prepare_swap(layers, swap, "kaiming_uniform", generator(2)).changes,
        forward=(lambda: 2.5) if "loss" in needs else None,
        backward=(lambda: norms) if "candidate_gradient" in needs else None,
    )


def tensors_of(trial: Trial) -> list[Tensor]:
    parts: list[LayerView | Change] = [*trial.views.values(), *trial.changes.values()]
    found = [value for part in parts for value in vars(part).values()]
    found += [values for view in trial.views.values() for values in view.past.values()]
    found += [value.indices for value in found if isinstance(value, Topology)]
    return [value.clone() for value in found if isinstance(value, Tensor)]


@pytest.mark.parametrize("term", ALL, ids=named)
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("changed", [False, True], ids=["current", "candidate"])
def test_a_term_is_a_finite_function_of_what_it_declares(term: Term[Any], unit: tuple[int, int], changed: bool) -> None:
    trial, random = trial_of(term.needs, unit, changed=changed), torch.get_rng_state()
    before = tensors_of(trial)
    value = term.value(trial)
    assert type(value) is float
    assert math.isfinite(value)
    assert term.value(trial) == value
    assert TERMS[term.name].build(term.config).value(trial_of(term.needs, unit, changed=changed)) == value
    assert all(torch.equal(one, two) for one, two in zip(before, tensors_of(trial), strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", NAMES)
def test_a_term_is_explained_and_set_by_its_name(name: str) -> None:
    term, settings = variants(name)[0], TERMS[name].settings
    assert term.name == name
    assert term.label
    assert term.unit
    assert TERMS[name].title
    assert issubclass(settings, TermConfig)
    for key, field in settings.model_fields.items():
        assert field.description, key
        assert "\n" not in field.description
    keys = [f"topology.proxy.terms.{name}.weight=0.25", "topology.proxy.terms.diversity=null"]
    config = resolve(None, None, "sparsae-guided", keys[: 1 if name == "diversity" else 2])
    assert isinstance(config.topology, EvolutionConfig)
    chosen = config.topology.proxy.terms[name]
    assert chosen is not None
    assert chosen.weight == 0.25
    assert name in json_schema()["$defs"]["ProxyConfig"]["properties"]["terms"]["properties"]


def alone(name: str, **settings: Any) -> EvolutionConfig:
    """Settings of a search by one term."""
    terms = {**dict.fromkeys(ProxyConfig().terms), name: settings}
    return EvolutionConfig.model_validate({"every": 2, "candidates": 2, "stop": 1.0, "proxy": {"terms": terms}})


def rows_of(topology: EvolutionConfig, steps: int = 4) -> list[dict[str, Any]]:
    """Rows of the updates of a short training."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config, score = SparsifierConfig(steps=steps + 1, topology=topology), score_of(model)
    sparsifier, rows = Sparsifier(model, optimizer, config, score=score), []  # type: ignore[arg-type]
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 24, generator=generator(5, step))).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        update = sparsifier.after_step()
        rows += [update.row] if update else []
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_a_term_is_searched_by_recorded_and_drawn(name: str) -> None:
    topology = alone(name, weight=2.0)
    (term,) = Evolution(topology).terms
    rows = rows_of(topology)
    assert len(rows) == 2
    for row in rows:
        for candidate in (row["current"], *row["candidates"]):
            assert list(candidate) == ["proposer", "swaps", name, "score", "rejected"]
            assert candidate["score"] == (-2.0 if term.higher_is_better else 2.0) * candidate[name]
        assert row["chosen"] == min((0, 1), key=lambda i: row["candidates"][i]["score"])
    topologies = tuple(row for row in (read_row(row, "here") for row in rows) if isinstance(row, TopologyRow))
    run = RunData(Path("run"), resolve(), (), (), topologies, None, None)
    assert run.terms == (name,)
    panel = term_panel(run, name)
    assert panel is not None
    assert panel.title == term.label
    assert term.unit in panel.svg


def test_a_term_that_is_not_known_here_is_drawn_by_its_bare_name() -> None:
    scored, other = (candidate_row(1.0, terms={"somebodys": number}) for number in (0.5, math.nan))
    row = topology_row(1, current=scored, candidates=(scored, other))
    run = RunData(Path("run"), resolve(), (), (), (row,), None, None)
    assert run.terms == ("somebodys",)
    panel = term_panel(run, "somebodys")
    assert panel is not None
    assert panel.title == "somebodys"


def test_without_a_term_that_reads_the_loss_nothing_needs_a_score_function() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=3, topology=alone("diversity")))
    assert sparsifier.search.rule.micro_batch is None
    for step in range(2):
        model(torch.randn(8, 24, generator=generator(5, step))).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        update = sparsifier.after_step()
    assert update is not None
    assert len(update.row["candidates"]) == 2
    assert (update.cost.forwards, update.cost.backwards) == (0, 0)


def test_terms_of_weight_0_are_recorded_and_decide_nothing() -> None:
    plain, recorded = (
        rows_of(EvolutionConfig.model_validate({"every": 2, "proxy": {"terms": {"activity": activity}}}))
        for activity in (None, {"weight": 0.0, "source": "candidate"})
    )
    for one, two in zip(plain, recorded, strict=True):
        assert one["chosen"] == two["chosen"]
        for mine, other in zip(one["candidates"], two["candidates"], strict=True):
            assert "activity" not in mine
            assert other["activity"] > 0
            assert mine["score"] == other["score"]


def test_a_term_that_reads_what_it_does_not_declare_is_told() -> None:
    for needs, read in ((frozenset(), "loss"), (frozenset({"loss"}), "gradient_norms")):
        with pytest.raises(InputError, match=r"add '(loss|candidate_gradient)' to its needs"):
            getattr(trial_of(needs), read)


@pytest.mark.parametrize("name", sorted(TERMS.reserved))
def test_no_term_takes_the_name_of_another_field_of_its_rows(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}'"):
        TERMS.register(name, type("Config", (TermConfig,), {}))(Term)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"terms": {"x": {}}}, "x: no term 'x': use one of"),
        ({"terms": {"activity": {"wieght": 1}}}, "activity.wieght: no such setting; did you mean weight"),
        ({"terms": {"activity": {"weight": -1.0}}}, "activity.weight: must be at least 0"),
        ({"terms": {"activity": TermConfig()}}, "activity: TermConfig is no settings of term 'activity'"),
        ({"terms": {"activity": 3}}, "terms.activity"),
        ({"terms": [1]}, "terms"),
        ({"terms": dict.fromkeys(("cross_entropy", "diversity", "activity"))}, "at least one must be left"),
    ],
)
def test_terms_that_are_none_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ProxyConfig.model_validate(settings)


def test_resets_after_plateaus_want_the_cross_entropy() -> None:
    settings = {"reset": {"boosted_probability": 0.1}, "proxy": {"terms": {"cross_entropy": None}}}
    with pytest.raises(ValueError, match=r"keep proxy\.terms\.cross_entropy"):
        EvolutionConfig.model_validate(settings)


def score(cross_entropy: float, spread: float = 0.0, active: float = 0.0) -> Score:
    return {"cross_entropy": cross_entropy, "diversity": spread, "activity": active}


def test_proxy_is_the_written_formula() -> None:
    proxy, one = ProxyConfig(), score(2.0, 0.5, 3.0)
    terms = proxy.built()
    assert proxy.combined(one, terms, Running(), 0.5) == pytest.approx(2.0 + 0.01 * 0.5 - 0.005 * 3.0)
    annealed = ProxyConfig(anneal="linear")
    assert annealed.combined(one, terms, Running(), 1.0) == pytest.approx(2.0)
    assert annealed.combined(one, terms, Running(), 0.5) == pytest.approx(2.0 + 0.5 * (0.01 * 0.5 - 0.005 * 3.0))
    assert combine(one, terms[:1]) == 2.0


def test_standardized_terms_have_mean_zero_and_deviation_one() -> None:
    rng = generator(0)
    scores = [score(*row) for row in (torch.randn(50, 3, generator=rng, dtype=torch.float64) * 3 + 7).tolist()]
    running = Running().including(scores[:20]).including(scores[20:])
    rows = [list(running.standardized(one).values()) for one in scores]
    columns = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(columns.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(columns.std(0, correction=0), torch.ones(3, dtype=torch.float64))
    constant = Running().including([score(2.0)] * 3)
    assert constant.standardized(score(2.0)) == score(0.0)


def test_diversity_is_the_deviation_over_layers_and_heads() -> None:
    topologies = {
        "a": Topology.from_indices((4, 4), torch.arange(8)),
        "b": Topology.from_indices((4, 4), torch.arange(4)),
    }
    (term,) = variants("diversity")
    views = {name: LayerView(topology, torch.ones(topology.count), (1, 16)) for name, topology in topologies.items()}
    assert term.value(Trial(views)) == pytest.approx(0.125)
    views["b"] = dataclasses.replace(views["b"], heads=HeadLayout("in", 2))
    densities = torch.tensor([0.5, 0.5, 0.0])
    assert term.value(Trial(views)) == pytest.approx(float(densities.std(correction=0)))


def test_known_gradients_count_kept_and_sampled_units() -> None:
    topology = Topology.from_indices((1, 8), torch.tensor([0, 2, 4]))
    view = LayerView(
        topology,
        torch.ones(3),
        (1, 8),
        gradient=torch.tensor([1.0, 2.0, 3.0]),
        moment=torch.tensor([0.1, 0.2, 0.3]),
        sample=torch.tensor([1, 5, 7], dtype=torch.int32),
        sample_gradient=torch.tensor([10.0, 20.0, 30.0]),
    )
    layers = {"a": SparseLinear(topology, torch.ones(3))}
    swap = Swap({"a": torch.tensor([0, 2])}, {"a": torch.tensor([3, 5])})
    candidate = Trial({"a": view}, prepare_swap(layers, swap, "zero", generator(0)).changes)
    by_source = {term.config.source: term for term in variants("activity")}
    assert by_source["training"].value(Trial({"a": view})) == pytest.approx(math.sqrt(14))
    # Unit 4 stays (3), unit 5 was sampled (20), unit 3 was not.
    assert by_source["training"].value(candidate) == pytest.approx(math.sqrt(9 + 400))
    assert by_source["moments"].value(candidate) == pytest.approx(0.3)


PAGE = (Path(__file__).parents[2] / "docs" / "own-term.md").read_text("utf-8")


@pytest.mark.slow
def test_the_term_of_the_page_is_trained_with_and_reported_once_it_is_installed(tmp_path: Path) -> None:
    """The page's first block in a package with the page's entry point; nothing else names the term."""
    (file, *_) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(file.splitlines()) <= 30
    site = tmp_path / "site"
    (site / "somebodys-1.0.dist-info").mkdir(parents=True)
    (site / "dead_outputs.py").write_text(file, "utf-8")
    (site / "somebodys-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    entry = "[sparsae.terms]\ndead_outputs = dead_outputs\n"
    (site / "somebodys-1.0.dist-info" / "entry_points.txt").write_text(entry)

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "sparsae", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    added = "topology.proxy.terms.dead_outputs.weight=0.1"
    printed = run("train", "--method", "sparsae-guided", "--print-config", "--set", added)
    assert "weight of the share of dead outputs" in printed
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache")
    (tmp_path / "settings.yaml").write_text(dump(config), "utf-8")
    out = tmp_path / "run"
    run("train", str(tmp_path / "settings.yaml"), "--set", added, "--out", str(out))
    updates = [row for row in rows(out) if row["kind"] == "topology" and row["candidates"]]
    assert updates
    assert all(0 <= candidate["dead_outputs"] <= 1 for update in updates for candidate in update["candidates"])
    assert "Dead outputs" in (out / "report.html").read_text("utf-8")


def test_no_registered_file_imports_torch() -> None:
    code = (
        "import sys; from sparsae.registry import RULES, TERMS; "
        "[r[name].build(r[name].settings()) for r in (RULES, TERMS) for name in r.own_names()]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
