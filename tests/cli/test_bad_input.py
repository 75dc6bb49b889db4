"""Bad input: one line on standard error that names what to mend, exit code 2, nothing written."""

import itertools
import os
import sys
from pathlib import Path

import pytest

from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.config.text import dump

# command line (in a directory with the files of `place`) -> words that the one line must have
CASES: dict[str, list[str]] = {
    "train missing.yaml": ["missing.yaml", "No such file"],
    "train folder": ["folder", "directory"],
    "train binary.yaml": ["binary.yaml", "UTF-8"],
    "train broken.yaml": ["broken.yaml", "line 3", "not YAML"],
    "train twice.yaml": ["twice.yaml", "'seed'", "twice"],
    "train list.yaml": ["list.yaml", "section"],
    "train unknown.yaml": ["unknown.yaml", "training.learning_rat", "training.learning_rate"],
    "train --preset gpt2": ["'gpt2'; did you mean gpt2-medium or gpt2-small?"],
    "train --preset gpt2smal": ["gpt2smal", "gpt2-small"],
    "train --method statix": ["statix", "static"],
    "train --set training.step=3": ["--set", "training.step", "training.steps"],
    "train --set training.lr=1e-3": ["--set: training.lr: no such setting; did you mean training.learning_rate?"],
    "train --set training.steps": ["--set", "section.key=value"],
    "train --set training.steps=": ["--set", "training.steps", "null"],
    "train --set training.learning_rate=.nan": ["--set", "training.learning_rate", "finite"],
    "train --set training.learning_rate=-.inf": ["--set", "training.learning_rate", "finite"],
    "train --set training.learning_rate=0": ["--set", "training.learning_rate", "above 0"],
    "train --set training.steps=yes": ["--set", "training.steps", "whole number"],
    "train --set training.compile=on": ["--set", "training.compile", "true or false"],
    "train --set data.source=null": ["--set", "data.source", "text"],
    "train --set sparsity.unit=[0,4]": ["--set", "sparsity.unit[0]", "at least 1"],
    "train --set sparsity.min_density=0.3": ["--set", "min_density", "density 0.1"],
    "train --set topology.rule=rigll": ["--set", "topology.rule", "did you mean rigl?"],
    "train --method static --set topology.every=3": ["--set", "topology.every", "topology.rule"],
    "train --set model.heads=3": ["--set", "width 256", "heads 3"],
    "train --sparsity 1": ["error: --sparsity: must be below 1, not 1.0"],
    "train --sparsity nan": ["--sparsity", "finite"],
    "train --sparsity half": ["--sparsity", "number"],
    "train --steps 0": ["error: --steps: must be at least 1, not 0"],
    "train --steps 1.5": ["--steps", "whole number", "'1.5'"],
    "train --steps 1e3": ["--steps: must be a whole number, not '1e3'"],
    "train --sparsity 90%": ["--sparsity: must be a number, not '90%'"],
    "train --seed -1": ["--seed", "at least 0"],
    "train --stpes 3": ["--stpes", "--steps"],
    "train a.yaml b.yaml": ["b.yaml"],
    "train --out run": ["run", "--resume"],
    "train --out folder": ["folder", "not empty"],
    "train --out twice.yaml": ["twice.yaml", "is a file"],
    "train --json folder": ["--json", "folder", "directory"],
    "train --json none/out.json": ["--json", "none"],
    f"train --json {'e' * 240}": ["--json: a name of 240 bytes is too long"],
    f"evaluate run --json {'é' * 120}": ["--json: a name of 240 bytes is too long"],
    "train --print-config --json -": ["--print-config", "--json"],
    "train --resume run --preset tiny --steps 3": ["--resume", "--preset"],
    "train --resume run --steps 3": ["run", "--steps 3", "250"],
    "train --resume run --set training.steps=9": ["leave out --set (another value goes into", "--allow-change KEY"],
    "train --resume run --from run": ["--resume", "--from"],
    "train --best": ["--best", "--from"],
    "train --resume run --best": ["--resume", "--best"],
    "train --from saved --best": ["saved", "no Trainer", "--best"],
    "train --from missing --best": ["missing", "no such directory"],
    "train --from missing": ["missing", "no such directory"],
    "train --from run": ["run", "no checkpoint"],
    "train --from run --set model.width=64": ["run", "model.width", "256", "64"],
    "train --out twice.yaml/run": ["twice.yaml/run", "no directory"],
    "train --set training.threads=10000": ["training.threads", "10000", "cores"],
    "train --set training.steps=9223372036854775808": ["--set", "training.steps", "at most"],
    "train --set model.width=9223372036854775808": ["--set", "model.width", "at most"],
    "train bomb.yaml": ["bomb.yaml", "line 2", "alias"],
    "train deep.yaml": ["deep.yaml", "deep"],
    "info deep": ["summary.json", "deep"],
    "train --resume run --out x": ["--resume", "--out"],
    "train --resume run twice.yaml": ["--resume", "CONFIG"],
    "train --resume run --dry-run": ["--resume", "--dry-run"],
    "trian": ["trian", "train"],
    "evaluate": ["RUN"],
    "evaluate run --max-tokens 0": ["--max-tokens", "1"],
    "evaluate run --json none/x": ["--json", "none"],
    "generate run": ["--prompt"],
    "generate run --prompt a --tokens 0": ["--tokens", "1"],
    "generate run --prompt a --tokens 100001": ["--tokens", "100000"],
    "train --set tracking.sample_tokens=100001": ["tracking.sample_tokens", "at most 100000"],
    "generate run --prompt a --temperature -1": ["--temperature", "0"],
    "generate run --prompt a --temperature nan": ["--temperature"],
    "generate run --prompt a --temperature inf": ["--temperature", "finite"],
    "export run": ["--to"],
    "export run --to folder": ["folder", "not empty"],
    "report run --figures folder": ["--figures: folder holds notes.txt, which is no figure: give a new directory"],
    "export run --to new --format spars": ["--format", "sparse"],
    "info": ["RUN"],
    "info missing": ["missing", "no such directory"],
    "info folder": ["folder", "it has no config.yaml, but notes.txt"],
    "info empty": ["empty", "it is empty"],
    "evaluate .": ["it holds 4 runs: give one of them, such as begun"],
    "report begun/checkpoints": ["it is a part of the run begun: give that"],
    "watch compared": ["it is an experiment: give the run compared/runs/one"],
    "info compact": ["it is a compact export: evaluate and generate read it"],
    "info packed": ["it is a semi-structured export: load_semi_structured reads it"],
    "train --from packed --out x": ["packed", "it is a semi-structured export"],
    "check sparsity packed": ["packed", "it is a semi-structured export"],
    "finetune saved --task rte --data .": ["it is a sparse model for transformers: only train --from and"],
    "export trained --to x": ["it holds checkpoints of transformers' Trainer"],
    "info twice.yaml": ["twice.yaml", "not a directory"],
    "info damaged": ["summary.json", "damaged"],
    "info run --json none/x": ["--json", "none"],
    "generate run --prompt caf\udce9": ["'caf\\udce9'", "UTF-8"],
    "train --out r\udcff": ["'r\\udcff'", "UTF-8"],
    "evaluate run --data \ud800": ["UTF-8"],
    "train --set data.source=b\udce9": ["UTF-8"],
    'train --set data.source="\\ud800"': ["data.source", "\\ud800"],
    "compare --set training.steps --out x": ["--set", "section.key=value"],
    "transfer --set training.step=3 --out x": ["training.step", "training.steps"],
    "check coordinates --set training.beta1=2": ["training.beta1", "below 1"],
    "compare --out x --seeds 0": ["error: --seeds: must be 1 to 1000 seeds"],
    "compare --out x --match foo": ["error: --match: must be 'flops'", "'foo'"],
    "compare --out x --sparsities 2": ["error: --sparsities: must be below 1, not 2.0"],
    "compare --out x --methods static,rigel": ["error: --methods: no method 'rigel'; did you mean rigl?"],
    "train --method relative": ["no method 'relative'", "one of: dense,", "name its file by SPARSAE_IMPORT"],
    "sensitivity --out x --method relative": ["--method: no method 'relative'", "SPARSAE_IMPORT"],
    "train --set topology.rule.name=relative": ["topology.rule: must be the name of a rule", "{'name': 'relative'}"],
    "train --set topology.rule=relative": ["no rule 'relative'", "SPARSAE_IMPORT"],
    "train --set topology.proxy.terms.diversity=null": [
        "topology.proxy: not a setting of this topology.rule, but of evo"
    ],
    "train --dry-run --out run": ["run: holds a run already"],
    "train --preset relative": ["no preset 'relative'; one of: "],
    "compare --out x --sparsities ,": ["error: --sparsities: give at least one number"],
    "compare --out x --learning-rates ,": ["error: --learning-rates: give at least one number"],
    "transfer --out x --widths ,": ["error: --widths: give at least one number"],
    "check sparsity run --sparsities ,": ["error: --sparsities: give at least one number"],
    "sensitivity --out x --method rigl": ["--method: rigl compares no candidates", "sparsae-guided or sparsae-written"],
    "sensitivity --out x --sequences 0": ["error: --sequences: must be at least 1, not 0"],
    "finetune run --data . --task rtee": ["error: --task: no task 'rtee'; did you mean rte?"],
    "finetune run --data . --task rte,rte": ["error: --task: one is given twice"],
    "finetune run --data . --task ,": ["error: --task: give at least one name"],
    "compare --methods static --ray auto --out x": ["--ray", "sparsae[ray]"],
    "ablate --ray auto --out x": ["--ray", "sparsae[ray]"],
    "compare --methods static": ["error: --out is missing", "--dry-run"],
    "transfer": ["error: --out is missing"],
    "compare seeds.yaml --dry-run": ["seeds.yaml: seeds: must be a list of seeds, or how many, not 'two'"],
    "compare --methods static --dry-run --jobs 2 --stack": ["error: --dry-run", "leave out --stack, --jobs"],
    "compare --methods static --dry-run --out folder": ["folder: is not empty"],
    "compare --methods static --dry-run --out other": ["other: holds an experiment whose methods differ"],
    "transfer --dry-run --out run": ["run: holds a run"],
    "ablate --dry-run --jobs 2": ["error: --dry-run", "leave out --jobs"],
    "compare --methods statik --dry-run": ["did you mean static"],
    "compare --methods static --dry-run training.steps=0": ["training.steps", "at least 1"],
    "transfer --ray auto --out x": ["--ray", "sparsae[ray]"],
}


# Of nine lines, that would be a billion values.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("folder", "run", "damaged", "deep"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name in ("run", "damaged", "deep"):
        (tmp_path / name / "config.yaml").write_text(dump(resolve()))
    (tmp_path / "damaged" / "summary.json").write_text('{"nnz": ')
    (tmp_path / "deep" / "summary.json").write_text('{"a": ' + "[" * 100_000)
    (tmp_path / "empty").mkdir()
    for name in ("begun/checkpoints", "compared/runs/one", "compact", "packed", "saved", "trained/checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / "begun" / name).touch()
    (tmp_path / "compared" / "plan.yaml").write_text("kind: comparison\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.yaml").write_text("kind: comparison\nmethods: [set]\n")
    (tmp_path / "compared" / "runs" / "one" / "config.yaml").write_text(dump(resolve()))
    (tmp_path / "compact" / "compact.json").write_text("{}")
    for name in ("semi-structured.json", "config.json"):
        (tmp_path / "packed" / name).write_text("{}")
    (tmp_path / "saved" / "config.json").write_text('{"quantization_config": {"quant_method": "sparsae"}}')
    (tmp_path / "trained" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (tmp_path / "bomb.yaml").write_text(BOMB)
    (tmp_path / "deep.yaml").write_text("seed: " + "[" * 5000)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.yaml").write_text("training:\n  steps: [1\n")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "seeds.yaml").write_text("kind: comparison\nmethods: [static]\nseeds: two\n")
    (tmp_path / "list.yaml").write_text("- seed\n")
    (tmp_path / "unknown.yaml").write_text("training: {learning_rat: 1.0}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # whether it is installed or not
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(directory.rglob("*"))}


@pytest.mark.parametrize(("command", "words"), CASES.items(), ids=CASES.keys())
def test_one_line_exit_code_2_and_nothing_written(
    command: str, words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place)
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsae: error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert contents(place) == before


def test_a_key_with_a_line_break_is_still_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "training.a\nb=3"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_json_file_without_permission_is_refused_before_any_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root, who runs many tests, may write anywhere
    assert main(["train", "--json", "out.json"]) == 2
    assert "no permission" in capsys.readouterr().err


def test_a_directory_whose_name_is_not_utf_8_is_refused_before_any_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = os.fsencode(place) + b"/caf\xe9"
    os.mkdir(other)
    monkeypatch.chdir(os.fsdecode(other))
    Path("a.txt").write_text("text")
    monkeypatch.setattr("sparsae.train.run.prepare", None)
    assert main(["train", "--set", "data.source=a.txt", "--out", "r"]) == 2
    err = capsys.readouterr().err
    assert "data.source" in err
    assert r"caf\udce9" in err
    assert os.listdir() == ["a.txt"]
