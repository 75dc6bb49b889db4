"""Settings from several layers: which one wins, what is read and written, and what is refused in one line."""

import ast
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsae
from sparsae.config import Config
from sparsae.config.load import is_dense, resolve
from sparsae.config.narrow import METHOD
from sparsae.config.shipped import methods, presets
from sparsae.config.text import annotated, dump
from sparsae.errors import InputError
from sparsae.rules import EvolutionConfig, RiglConfig, StaticConfig


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        resolve(*arguments, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def attempt(override: str) -> Config | str:
    try:
        return resolve(None, None, None, [override])
    except InputError as error:
        return str(error)


class TestLayers:
    def test_each_layer_wins_over_the_one_before(self, tmp_path: Path) -> None:
        file = write(tmp_path, "training: {steps: 7, batch_size: 3}\nteacher: {alpha: 0.7}\n")
        config = resolve(file, "tiny", "sparsae-written", ["training.steps=9"], options={"--seed": ("seed", 5)})
        assert config.model.width == 384  # preset
        assert config.topology == resolve(None, None, "sparsae-written").topology
        assert (config.teacher.alpha, config.teacher.storage) == (0.7, "union")  # file over method
        assert (config.training.steps, config.training.batch_size, config.seed) == (9, 3, 5)

    def test_options_win_over_set(self) -> None:
        assert resolve(None, None, None, ["seed=1"], options={"--seed": ("seed", 2)}).seed == 2

    def test_the_last_of_equal_overrides_wins(self) -> None:
        assert resolve(None, None, None, ["seed=1", "seed=2"]).seed == 2

    def test_a_file_names_its_preset_and_method(self, tmp_path: Path) -> None:
        config = resolve(write(tmp_path, "preset: tiny\nmethod: static\n"))
        assert (config.preset, config.method, config.model.layers) == ("tiny", "static", 6)

    def test_the_command_line_replaces_them_and_keeps_the_other_keys(self, tmp_path: Path) -> None:
        file = write(tmp_path, "preset: tiny\nmethod: sparsae\ntraining: {steps: 77}\ntopology: {every: 5}\n")
        config = resolve(file, "gpt2-small", "static")
        assert (config.preset, config.model.layers, config.training.steps) == ("gpt2-small", 12, 77)
        assert config.topology == StaticConfig()

    def test_a_runs_own_settings_can_be_run_with_another_preset_and_method(self, tmp_path: Path) -> None:
        file = write(tmp_path, dump(resolve(None, "demo", "sparsae-written", ["training.steps=77"])))
        assert resolve(file, "tiny", "dense") == resolve(None, "tiny", "dense", ["training.steps=77"])

    def test_an_empty_file_changes_nothing(self, tmp_path: Path) -> None:
        assert resolve(write(tmp_path, "# nothing\n")) == Config()

    def test_keys_of_one_rule_merge_and_another_rule_starts_anew(self) -> None:
        merged = resolve(None, None, "sparsae-written", ["topology.burn_in.steps=3", "topology.every=50"]).topology
        assert isinstance(merged, EvolutionConfig)
        assert (merged.every, merged.burn_in.steps, merged.burn_in.scope) == (50, 3, "new")
        assert resolve(None, None, None, ["topology.rule=static"]).topology == StaticConfig()
        again = resolve(None, None, "sparsae-written", ["topology.rule=static", "topology.rule=evolution"])
        assert again.topology == EvolutionConfig()

    def test_terms_merge_by_name_key_by_key_and_null_leaves_one_out(self, tmp_path: Path) -> None:
        file = write(
            tmp_path, "topology: {rule: evolution, proxy: {terms: {activity: {weight: 0.25}, diversity: null}}}"
        )
        overrides = ["topology.proxy.terms.activity.source=training", "topology.proxy.terms.cross_entropy.weight=2"]
        config = resolve(file, None, "sparsae-written", overrides)
        assert config.topology.model_dump()["proxy"]["terms"] == {
            "cross_entropy": {"weight": 2.0},
            "diversity": None,
            "activity": {"weight": 0.25, "source": "training"},
        }
        again = resolve(file, None, "sparsae-written", ["topology.proxy.terms.diversity.weight=1"])
        assert again.topology.model_dump()["proxy"]["terms"]["diversity"] == {"weight": 1.0}

    def test_rules_merge_by_pattern_key_by_key(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'rules: {"*.mlp.*": {rule: rigl, every: 7}, "*.c_attn": {rule: set}}')
        rules = resolve(file, None, None, ['rules={"*.mlp.*": {drop_fraction: 0.1}, "*.c_attn": {rule: static}}']).rules
        assert rules == {"*.mlp.*": RiglConfig(every=7, drop_fraction=0.1), "*.c_attn": StaticConfig()}

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("training.learning_rate=1e-3", 0.001),
            ("training.learning_rate=3e-4", 0.0003),
            ("training.learning_rate=1", 1.0),
            ("training.clip=null", None),
            ("training.clip=~", None),
            ("training.compile=true", True),
            ("training.steps=010", 10),
            ("training.device=cuda:1", "cuda:1"),
            ("data.source=/tmp/*.txt", "/tmp/*.txt"),
            ("data.source=yes", "yes"),
            ("tracking.sample_prompt='def f(x): return'", "def f(x): return"),
            ("tracking.sample_prompt=a = b", "a = b"),
            ("sparsity.unit=[4, 4]", (4, 4)),
            ("sparsity.include=['*.mlp.*']", ["*.mlp.*"]),
        ],
    )
    def test_values_are_strict_yaml(self, override: str, value: object) -> None:
        section, name = override.partition("=")[0].split(".")
        found = getattr(getattr(resolve(None, None, None, [override]), section), name)
        assert found == value
        assert type(found) is type(value)


class TestText:
    @pytest.mark.parametrize("preset", presets())
    @pytest.mark.parametrize("method", methods())
    @pytest.mark.parametrize("write_text", [annotated, dump], ids=["annotated", "dump"])
    def test_reads_back_equal(self, preset: str, method: str, write_text: object, tmp_path: Path) -> None:
        config = resolve(None, preset, method)
        assert callable(write_text)
        assert resolve(write(tmp_path, write_text(config))) == config

    @pytest.mark.parametrize("write_text", [annotated, dump], ids=["annotated", "dump"])
    def test_sections_by_name_read_back_equal(self, write_text: object, tmp_path: Path) -> None:
        rules = 'rules={"*.mlp.*": {rule: rigl, every: 5%}, "yes": {rule: evolution, proxy: {terms: {activity: null}}}}'
        config = resolve(None, None, "sparsae-guided", [rules, "topology.proxy.terms.diversity=null"])
        assert callable(write_text)
        assert resolve(write(tmp_path, write_text(config))) == config

    def test_every_key_is_explained(self) -> None:
        lines = annotated(resolve()).splitlines()
        # The genes of a strategy are a mapping of anybody's settings, which are explained where they are.
        bare = {line.split(":")[0].strip() for line in lines if "# " not in line}
        assert bare == {"drop_fraction", "interval"} == set(resolve().topology.model_dump()["strategy"]["genes"])
        assert "  steps: 250  # optimizer steps" in lines
        assert (
            "    mode: resampled  # one batch for the run, a new one an update, or one of a pool; one of static,"
            in annotated(resolve(None, None, "sparsae-guided"))
        )

    @settings(deadline=None, max_examples=60)
    @given(
        text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        globs=st.lists(
            st.sampled_from(["*", "yes", "1e3", "- a", "a: b", "#", "null", ".nan", "x\ny", " "])
            | st.text("ab\n", min_size=1)
        ),
        rate=st.floats(min_value=1e-300, max_value=1e300),
        seed=st.integers(0, 2**63 - 1),
        clip=st.none() | st.floats(min_value=1e-9, max_value=1e9),
        method=st.sampled_from(methods()),
    )
    def test_any_settings_read_back_equal(
        self, text: str, globs: list[str], rate: float, seed: int, clip: float | None, method: str
    ) -> None:
        base = resolve(None, None, method)
        config = base.model_copy(
            update={
                "seed": seed,
                "data": base.data.model_copy(update={"source": text}),
                "sparsity": base.sparsity.model_copy(update={"include": globs}),
                "training": base.training.model_copy(update={"learning_rate": rate, "clip": clip}),
                "tracking": base.tracking.model_copy(update={"sample_prompt": text}),
            }
        )
        with tempfile.TemporaryDirectory() as directory:
            for written in (annotated(config), dump(config)):
                assert resolve(write(Path(directory), written)) == config

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=30) | st.from_regex(r"[a-z]+(\.[a-z_]+)*=.{0,10}", fullmatch=True))
    def test_any_override_is_either_good_or_refused(self, override: str) -> None:
        outcome = attempt(override)
        assert isinstance(outcome, Config) or outcome.startswith("--set: ")


# (content of the file, or None for none at all; words that the refusal must have)
BAD_FILES = {
    "unknown key": ("training: {stepz: 3}", ["training.stepz", "training.steps"]),
    "unknown key in another section": ("learning_rate: 3", ["learning_rate", "training.learning_rate"]),
    "unknown section": ("trainings: {steps: 3}", ["trainings", "training"]),
    "unknown nested key": (
        "topology: {rule: evolution, burn_in: {step: 3}}",
        ["topology.burn_in.step", "topology.burn_in.steps"],
    ),
    "key of another rule": ("topology: {rule: static, every: 3}", ["topology.every", "topology.rule"]),
    "unknown rule": ("topology: {rule: evolutoin}", ["topology.rule", "evolution"]),
    "rule of another type": ("topology: {rule: [static]}", ["topology.rule", "static"]),
    "unknown term": (
        "topology: {rule: evolution, proxy: {terms: {activty: {}}}}",
        ["topology.proxy.terms.activty", "mean activity?"],
    ),
    "unknown key of a term": (
        "topology: {rule: evolution, proxy: {terms: {activity: {sauce: x}}}}",
        ["topology.proxy.terms.activity.sauce", "topology.proxy.terms.activity.source"],
    ),
    "wrong value of a term": (
        "topology: {rule: evolution, proxy: {terms: {activity: {weight: -1}}}}",
        ["topology.proxy.terms.activity.weight", "at least 0"],
    ),
    "term is a number": (
        "topology: {rule: evolution, proxy: {terms: {activity: 3}}}",
        ["topology.proxy.terms.activity", "section"],
    ),
    "no term left": (
        "topology: {rule: evolution, proxy: {terms: {cross_entropy: null, diversity: null, activity: null}}}",
        ["topology.proxy", "at least one"],
    ),
    "unknown rule of a pattern": ("rules: {'*.mlp': {rule: rigll}}", ["rules.*.mlp.rule", "mean rigl?"]),
    "unknown key of a pattern": ("rules: {'*.mlp': {rule: rigl, evry: 1}}", ["rules.*.mlp.evry", "rules.*.mlp.every"]),
    "wrong value of a pattern": ("rules: {'*.mlp': {rule: rigl, stop: 2}}", ["rules.*.mlp.stop", "at most 1"]),
    "pattern without a section": ("rules: {'*.mlp': 3}", ["rules.*.mlp", "section"]),
    "wrong type": ("training: {steps: many}", ["training.steps", "whole number", "'many'"]),
    "bool for int": ("training: {steps: true}", ["training.steps", "whole number", "true"]),
    "float for int": ("training: {steps: 1e3}", ["training.steps", "whole number", "1000.0"]),
    "yes for true": ("training: {compile: yes}", ["training.compile", "true or false", "'yes'"]),
    "number for text": ("data: {source: 3}", ["data.source", "text", "3"]),
    "empty text": ("data: {source: ''}", ["data.source", "empty"]),
    "list too short": ("sparsity: {unit: [4]}", ["sparsity.unit:", "two entries"]),
    "list too long": ("sparsity: {unit: [4, 4, 4]}", ["sparsity.unit:", "two entries"]),
    "wrong entry of a list": ("sparsity: {unit: [4, x]}", ["sparsity.unit[1]", "whole number"]),
    "too small": ("training: {steps: 0}", ["training.steps", "at least 1", "0"]),
    "sparsity of 1": ("sparsity: {sparsity: 1}", ["sparsity.sparsity", "below 1"]),
    "not a number": ("training: {learning_rate: .nan}", ["training.learning_rate", "finite"]),
    "infinite": ("training: {learning_rate: .inf}", ["training.learning_rate", "finite"]),
    "overflow": ("training: {learning_rate: 1e999}", ["training.learning_rate", "finite"]),
    "thousands of digits": (f"seed: {'9' * 5000}", ["too long"]),
    "null where not allowed": ("teacher: {alpha: null}", ["teacher.alpha", "number", "null"]),
    "null section": ("training:", ["training", "section", "null"]),
    "section is a number": ("training: 3", ["training", "section", "3"]),
    "key below a value": ("training: {steps: {x: 3}}", ["training.steps", "whole number"]),
    "not a choice": ("model: {family: bert}", ["model.family", "no family 'bert'", "gpt2, llama"]),
    "bounds": ("sparsity: {min_density: 0.5}", ["sparsity", "cannot hold density 0.1"]),
    "contradiction across sections": ("sparsity: {sparsify_head: true}", ["sparsify_head", "tie_embeddings"]),
    "dense yet sparse": ("method: dense\nsparsity: {sparsity: 0.5}", ["method dense", "static"]),
    "unknown preset": ("preset: tinny", ["preset", "tinny", "tiny"]),
    "unknown method": ("method: statik", ["method", "statik", "static"]),
    "preset of another type": ("preset: [tiny]", ["preset", "tiny"]),
    "duplicate key": ("training: {steps: 3}\ntraining: {steps: 4}", ["line 2", "'training'", "twice"]),
    "duplicate nested key": ("training:\n  steps: 3\n  steps: 4", ["line 3", "'steps'", "twice"]),
    "key that is no text": ("1: 2", ["line 1", "key 1"]),
    "merge key": ("a: &a {steps: 3}\ntraining: {<<: *a}", ["line 2", "alias", "not allowed"]),
    "merge key without an alias": ("training: {<<: {steps: 3}}", ["no such setting"]),
    "tag": ("seed: !!python/name:os.system", ["tag", "not allowed"]),
    "recursion": ("training: &a {steps: *a}", ["alias"]),
    "not YAML": ("training: [1, 2", ["not YAML"]),
    "control character": ("seed: \x00", ["not YAML"]),
    "not a mapping": ("- training", ["section"]),
    "plain text": ("hello", ["section", "'hello'"]),
    "several documents": ("seed: 1\n---\nseed: 2", ["not YAML"]),
    "deep nesting": ("seed: " + "[" * 20_000, ["too deeply"]),
    "another encoding": ("seed: \u00e9".encode("latin-1"), ["UTF-8"]),
    "far too long": ("# text\n" * 200_000, ["too long"]),
}


@pytest.mark.parametrize(("text", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_by_name(text: str | bytes, words: list[str], tmp_path: Path) -> None:
    file = write(tmp_path, text)
    message = refusal(file)
    assert message.startswith(f"{file}: ")
    for word in words:
        assert word in message.removeprefix(f"{file}: ")
    assert len(message) < 600


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=3", ["--set: training.stepz", "training.steps"]),
        ("training.steps", ["section.key=value"]),
        ("=3", ["section.key=value"]),
        (".steps=3", ["section.key=value"]),
        ("training..steps=3", ["section.key=value"]),
        ("", ["section.key=value"]),
        ("training.steps=", ["training.steps", "null"]),
        ("training.steps=[1", ["training.steps", "not YAML"]),
        ("training=3", ["training", "section"]),
        ("preset=tiny", ["--preset"]),
        ("method=static", ["--method"]),
        ("training.learning_rate=.nan", ["training.learning_rate", "finite"]),
        ('training.learning_rate="1e-3"', ["training.learning_rate", "a number, not '1e-3'"]),
        ("sparsity.sparsity=1", ["sparsity.sparsity", "below 1"]),
        ("training.compile_mode=reduce-overhead", ["training.compile_mode: ", "set compile to true", "leave it out"]),
        ("training.decay=0.1", ["training.decay: decay", "wsd", "leave it out"]),
        (
            "training={schedule: wsd, warmup: 0.5, decay: 0.6}",
            ["training.decay: warmup 0.5 and", "at most 1"],
        ),
        ("training={schedule: constant, final_learning_rate: 0.2}", ["final_learning_rate 0.2", "leave it out"]),
        ("training.schedule=cosin", ["training.schedule", "cosine"]),
        ("seed=-1", ["seed", "at least 0"]),
        ("seed=9223372036854775808", ["seed", "below 9223372036854775808"]),
    ],
)
def test_a_bad_override_is_refused(override: str, words: list[str]) -> None:
    message = refusal(None, None, None, [override])
    assert message.startswith("--set: ")
    assert all(word in message for word in words)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing.yaml")
    assert "Is a directory" in refusal(tmp_path)


def test_unknown_names_on_the_command_line_are_answered_with_the_nearest() -> None:
    assert "gpt2-small" in refusal(None, "gpt2-smal")
    assert "sparsae-written" in refusal(None, None, "sparsae-writen")
    assert all(name in refusal(None, "xyz") for name in presets())


def test_a_bad_name_in_a_file_is_refused_even_where_the_command_line_replaces_it(tmp_path: Path) -> None:
    assert "nonsense" in refusal(write(tmp_path, "preset: nonsense"), "tiny")


def test_the_layer_that_gave_the_wrong_value_is_blamed(tmp_path: Path) -> None:
    file = write(tmp_path, "training: {steps: 0}\nsparsity: {min_density: 0.05}\n")
    assert refusal(file).startswith(f"{file}: training.steps")
    good = write(tmp_path, "sparsity: {min_density: 0.05}\n")
    assert refusal(good, None, None, ["sparsity.sparsity=0.99"]).startswith("--set: sparsity.sparsity: bounds")
    assert refusal(None, options={"--steps": ("training.steps", 0)}).startswith("--steps: must be at least 1")


def test_dense_methods_are_known_by_their_settings_and_the_narrow_one_is_named_in_one_place() -> None:
    assert [method for method in methods() if is_dense(method)] == ["dense", METHOD]
    package = Path(sparsae.__file__).parent
    naming = [
        file
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value == METHOD
    ]
    assert naming == [package / "config" / "narrow.py"]
