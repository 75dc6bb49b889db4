"""The schema, and the presets and methods that ship with the package."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from sparsae.config import Config, ModelConfig, Section, SparsityConfig, TrainingConfig
from sparsae.config.editors import json_schema
from sparsae.config.load import resolve
from sparsae.config.shipped import about, methods, presets
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.plan import parse_plan
from sparsae.registry import METHODS, RULES
from sparsae.rules import (
    EvolutionConfig,
    GmpConfig,
    GranetConfig,
    GseConfig,
    MagnitudeConfig,
    RiglConfig,
    SetConfig,
    StaticConfig,
)


def sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for value in section().__dict__.values():
        if isinstance(value, Section):
            yield from sections(type(value))


@pytest.mark.parametrize("section", list(sections(Config)), ids=lambda section: section.__name__)
def test_every_setting_is_explained_on_one_line(section: type[Section]) -> None:
    assert (section.__doc__ or "").splitlines()[0]
    for name, field in section.model_fields.items():
        if not isinstance(getattr(section(), name), Section):
            assert field.description, name
            assert "\n" not in field.description


def whole_numbers(section: type[Section], path: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        value = getattr(section(), name)
        if isinstance(value, Section):
            yield from whole_numbers(type(value), f"{path}{name}.")
        elif re.search(r"\bint\b", str(field.annotation)) and not str(field.annotation).startswith("tuple"):
            yield f"{path}{name}"


@pytest.mark.parametrize("key", list(whole_numbers(Config, "")))
def test_no_whole_number_may_be_of_any_size(key: str) -> None:
    for number in (2**63, 10**30):
        with pytest.raises(InputError, match=rf"{re.escape(key)}.*(at most|below)"):
            resolve(None, None, None, [f"{key}={number}"])


@pytest.mark.parametrize("method", ["sparsae", "dense-small"])
@pytest.mark.parametrize(
    "settings",
    [
        ["model.width=2147483644"],
        ["model.mlp_width=2147483647", "model.width=4096"],
        ["model.vocab_size=2147483647", "model.width=4096"],
        ["model.layers=1000", "model.width=65536"],
        ["training.batch_size=2147483647"],
        ["model.context=2147483647", "model.width=4096"],
    ],
)
def test_sizes_whose_product_no_machine_holds_are_refused(settings: list[str], method: str) -> None:
    with pytest.raises(InputError, match="too large"):
        resolve(None, None, method, settings)


def test_models_deeper_than_any_that_was_trained_are_refused() -> None:
    assert resolve(overrides=["model.layers=1000"]).model.layers == 1000
    with pytest.raises(InputError, match=r"model\.layers: must be at most 1000, not 1001"):
        resolve(overrides=["model.layers=1001"])


def test_the_defaults_are_the_preset_demo_with_the_method_sparsae() -> None:
    assert Config() == resolve()
    assert (resolve().preset, resolve().method) == ("demo", "sparsae")


def test_names_that_ship() -> None:
    # Those that existed first stay, whatever else is added.
    assert set(presets()) >= {"demo", "tiny", "gpt-25m", "gpt2-small", "gpt2-medium", "llama-130m"}
    shipped = {"sparsae", "sparsae-guided", "sparsae-written", "sparsae-one", "sparsae-rigl", "random-search"}
    shipped |= {"sparsae-evolved", "sparsae-placebo"}
    shipped |= {f"{rule}-ramp" for rule in ("set", "rigl", "gse", "granet", "mest")}
    shipped |= {"static-erk", "dense", "dense-small", "sparsae-written-ramp"}
    # Every rule is a method too; those that existed first stay, whatever else is added.
    assert set(methods()) == shipped | set(RULES.names())
    assert {"static", "set", "rigl", "gse", "gmp", "granet", "magnitude", "evolution"} <= set(RULES.own_names())


def test_methods_have_hyphens() -> None:
    assert [name for name in METHODS if not re.fullmatch(r"[a-z]+(-[a-z]+)*", name)] == []


def test_methods_with_underscores_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """On the command line, in a file, in a run's settings and in a plan, where runs keep the names of their folders."""
    now = resolve(method="random-search")
    (tmp_path / "settings.yaml").write_text("method: random_search\n")
    assert resolve(method="random_search") == resolve(tmp_path / "settings.yaml") == now
    assert Config.model_validate(now.model_dump() | {"method": "random_search"}) == now
    assert about("random_search") == about("random-search")
    plan = parse_plan({"methods": ["static", "dense_small"]}, "here", ComparisonPlan)
    assert plan.named_variants["dense_small"].method == plan.config("dense_small", 0.9, 0).method == "dense-small"
    with pytest.raises(InputError, match="no rule can be called 'dense_small'"):
        RULES.register("dense_small", type(now.topology))


def test_the_twin_of_sparsae_written_differs_in_the_ramp_of_the_teacher_alone() -> None:
    written, twin = (resolve(method=name).model_dump() for name in ("sparsae-written", "sparsae-written-ramp"))
    assert not written["teacher"]["ramp"]
    assert twin["teacher"]["ramp"]
    written["method"], written["teacher"]["ramp"] = "sparsae-written-ramp", True
    assert twin == written


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("method", methods())
def test_every_preset_goes_with_every_method(preset: str, method: str) -> None:
    config = resolve(None, preset, method)
    assert (config.preset, config.method) == (preset, method)
    assert config.data.source == "stdlib"
    assert config.sparsity.sparsity == (0.0 if method in ("dense", "dense-small") else 0.9)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [  # weights of the blocks' linear layers, and of the embeddings, in millions
        ("demo", (3.1, 1.1)),
        ("tiny", (10.6, 4.1)),
        ("gpt-25m", (22.0, 2.4)),
        ("gpt2-small", (84.9, 39.4)),
        ("gpt2-medium", (302.0, 52.5)),
        ("llama-130m", (84.9, 49.2)),
    ],
)
def test_presets_have_the_sizes_they_are_named_for(preset: str, expected: tuple[float, float]) -> None:
    config = resolve(None, preset)
    model, vocabulary = config.model, config.data.tokenizer_vocab
    mlp = 3 * (model.mlp_width or 0) if model.family == "llama" else 2 * 4 * model.width
    linear = model.layers * (4 * model.width**2 + mlp * model.width)
    positions = model.context if model.family == "gpt2" else 0
    embeddings = (vocabulary * (1 if model.tie_embeddings else 2) + positions) * model.width
    assert (round(linear / 1e6, 1), round(embeddings / 1e6, 1)) == expected


def test_sparsae_written_has_the_defaults_of_its_text() -> None:
    config = resolve(None, None, "sparsae-written")
    search = config.topology
    assert isinstance(search, EvolutionConfig)
    assert (search.every, search.start, search.stop, search.candidates) == (500, 0.0, 1.0, 4)
    assert (search.selection, search.proposer, search.initialization) == ("elitist", "uniform", "kaiming_uniform")
    assert (search.mutation_rate, search.mutation_schedule) == (0.005, "constant")
    assert search.proxy.model_dump(exclude={"standardize", "anneal"})["terms"] == {
        "cross_entropy": {"weight": 1.0},
        "diversity": {"weight": 0.01},
        "activity": {"weight": 0.005, "source": "candidate"},
    }
    assert (search.proxy.standardize, search.proxy.anneal) == (False, "none")
    assert (search.reset.probability, search.reset.reshuffle, search.reset.patience) == (0.02, (0.05, 0.1), 5)
    assert (search.reset.boosted_probability, search.reset.boosted_updates) == (0.1, 2)
    assert search.adaptation.enabled
    assert (search.burn_in.steps, search.burn_in.multiplier, search.burn_in.scope) == (5, 1.5, "new")
    teacher = config.teacher
    assert (teacher.alpha, teacher.beta, teacher.storage, teacher.warmup_fraction) == (0.5, 0.999, "union", 0.05)


@pytest.mark.parametrize("method", ["static", "dense"])
def test_baselines_have_neither_search_nor_teacher(method: str) -> None:
    config = resolve(None, None, method)
    assert config.topology == StaticConfig()
    assert not config.teacher.enabled


@pytest.mark.parametrize(
    ("method", "topology"),
    [
        ("set", SetConfig(every=100, stop=0.75, drop_fraction=0.3)),
        ("rigl", RiglConfig(every=100, stop=0.75, drop_fraction=0.3, accumulate="last")),
        ("gse", GseConfig(every=1000, stop=0.6, drop_fraction=0.2, sampling="uniform", sample_ratio=1.0)),
        ("gmp", GmpConfig(start_sparsity=0.0, every=100, start=0.25, stop=0.75)),
        ("granet", GranetConfig(start_sparsity=0.5, every=100, start=0.0, stop=0.5, regeneration=0.5)),
        ("magnitude", MagnitudeConfig(start_sparsity=0.0, at=0.5)),
    ],
)
def test_rivals_have_their_papers_settings_and_no_teacher(method: str, topology: Section) -> None:
    config = resolve(None, None, method)
    assert config.topology == topology
    assert not config.teacher.enabled
    assert config.initial_sparsity == getattr(topology, "start_sparsity", 0.9)


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("random-search", {"proposer": "layerwise"}),
        ("sparsae-one", {"candidates": 1}),
        ("sparsae-rigl", {"proposer": "rigl"}),
    ],
)
def test_a_control_differs_in_one_setting(method: str, changed: dict[str, object]) -> None:
    guided, control = resolve(None, None, "sparsae-guided"), resolve(None, None, method)
    assert control.topology.model_dump() == {**guided.topology.model_dump(), **changed}
    assert control.teacher == guided.teacher


@pytest.mark.parametrize("rule", [name for name in RULES.own_names() if f"{name}-ramp" in methods()])
def test_a_twin_differs_in_its_ramp(rule: str) -> None:
    plain, twin = resolve(None, None, rule), resolve(None, None, f"{rule}-ramp")
    assert twin.topology.model_dump() == {**plain.topology.model_dump(), "ramp": "1 update"}
    assert (twin.teacher, twin.sparsity, twin.training) == (plain.teacher, plain.sparsity, plain.training)


@pytest.mark.parametrize(
    ("section", "values", "complaint"),
    [
        (ModelConfig, {"width": 256, "heads": 3}, "not a multiple of heads"),
        (ModelConfig, {"family": "llama", "heads": 4, "kv_heads": 3}, "not a multiple of kv_heads"),
        (ModelConfig, {"kv_heads": 2}, "family gpt2 has no kv_heads: it must be null"),
        (ModelConfig, {"family": "llama", "dropout": 0.1}, "family llama has no dropout: it must be 0"),
        (ModelConfig, {"head_size": 32}, "family gpt2 has no head_size"),
        (ModelConfig, {"family": "llama", "width": 12, "heads": 4}, "must be even"),
        (ModelConfig, {"family": "llama", "head_size": 7}, "head_size must be even"),
        (SparsityConfig, {"min_density": 0.2}, "cannot hold density 0.1"),
        (SparsityConfig, {"max_density": 0.05}, "cannot hold density 0.1"),
        (SparsityConfig, {"head_min_density": 0.2}, "head_min_density"),
        (EvolutionConfig, {"start": 0.9}, "must come before stop"),
        (EvolutionConfig, {"reset": {"reshuffle": (0.2, 0.1)}}, "lowest first"),
        (GmpConfig, {"start": 0.8}, "start 0.8 must come before stop 0.75"),
        (GranetConfig, {"start": 0.6}, "must come before stop"),
        (MagnitudeConfig, {"at": 1.0}, "less than 1"),
        (RiglConfig, {"stop": 0.0}, "greater than 0"),
        (Config, {"topology": {"rule": "granet", "start_sparsity": 0.9}}, "must be less than sparsity.sparsity 0.9"),
        (SparsityConfig, {"fan_in": [1.5, 2.0]}, "in terms of the mean"),
        (SparsityConfig, {"density": {"mlp": -1}}, "a factor must be a number"),
        (Config, {"sparsity": {"sparsify_head": True}}, "tie_embeddings"),
        (Config, {"method": "dense"}, "sparsity.sparsity 0"),
        (TrainingConfig, {"steps": 3.0}, "valid integer"),
        (TrainingConfig, {"steps": True}, "valid integer"),
        (TrainingConfig, {"compile": 1}, "valid boolean"),
        (TrainingConfig, {"learning_rate": float("nan")}, "finite"),
        (TrainingConfig, {"stepz": 3}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    section: type[Section], values: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        section.model_validate(values)


def test_bounds_equal_to_the_density_hold_despite_rounding() -> None:
    config = SparsityConfig(sparsity=0.9, min_density=0.1, max_density=0.1)
    assert config.density_bounds == (0.1, 0.1)


def test_the_json_schema_knows_every_section_and_explains_its_keys() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    training = schema["$defs"]["TrainingConfig"]
    assert training["additionalProperties"] is False
    assert training["properties"]["steps"]["description"] == "optimizer steps"
