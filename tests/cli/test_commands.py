"""What each command calls, prints and writes; the modules that need torch are replaced by recorders."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import sparsae
from sparsae.cli import main
from sparsae.cli.experiments import read
from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.config.text import dump
from sparsae.errors import TakenError
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.runs.directory import RunDirectory
from tests.support.records import summary_of

SUMMARY = {
    "preset": "demo",
    "steps": 20,
    "validation_loss": float("nan"),
    "train_flops_by_part": {"student": 7},
    "finished": True,
}
FORECAST = {
    "density_steps": [],
    "parameters_dense": 1000,
    "parameters": 190,
    "layers": [
        {
            "name": "h.0.attn",
            "out": 30,
            "in": 10,
            "nnz": 30,
            "density": 0.1,
            "density_factor": 1.0,
            "density_cut": False,
        }
    ],
    "train_flops_per_step": 10,
    "train_flops": 2_000_000_000_000_000,
    "train_flops_dense_equivalent": 20_000_000_000_000_000,
    "state_bytes": {"values": 40, "teacher": 40},
    "state_bytes_dense_equivalent": 800,
    "model_state_bytes": 1680,
    "model_state_bytes_dense_equivalent": 3200,
    "expected_seconds": None,
    "uncounted": [],
    "steps": 250,
    "tokens": 512_000,
}


class Calls(list[tuple[str, tuple[Any, ...]]]):
    """Calls of the replaced functions, by name."""

    def replace(self, monkeypatch: pytest.MonkeyPatch, module: str, **results: object) -> None:
        fake = ModuleType(module)
        for name, result in results.items():
            setattr(fake, name, self._recorder(name, result))
        monkeypatch.setitem(sys.modules, module, fake)

    def _recorder(self, name: str, result: object) -> Callable[..., object]:
        def record(*arguments: object) -> object:
            self.append((name, arguments))
            print("chatter of a library")
            if isinstance(result, BaseException):
                raise result
            return result

        return record


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    monkeypatch.chdir(tmp_path)
    calls = Calls()
    calls.replace(monkeypatch, "sparsae.train.run", start=SUMMARY, resume=SUMMARY)
    calls.replace(monkeypatch, "sparsae.train.forecast", forecast=FORECAST)
    calls.replace(monkeypatch, "sparsae.evaluate.perplexity", evaluate_run={"loss": 1.5, "tokens": 1234})
    calls.replace(monkeypatch, "sparsae.evaluate.generation", generate_text=" f(): pass", write_sample=None)
    calls.replace(monkeypatch, "sparsae.evaluate.export", export_run=None)
    calls.replace(monkeypatch, "sparsae.report.page", write_report=Path("r/report.html"))
    return calls


class TestTrain:
    def test_passes_the_resolved_settings_on(self, calls: Calls, tmp_path: Path) -> None:
        (tmp_path / "my.yaml").write_text("training: {batch_size: 2}")
        arguments = "train my.yaml --preset tiny --method static --out there --steps 20 --seed 4 --sparsity 0.95"
        assert main([*arguments.split(), "--set", "training.clip=null", "--set", "training.beta2=0.9"]) == 0
        overrides = ["training.batch_size=2", "training.clip=null", "training.beta2=0.9", "training.steps=20", "seed=4"]
        expected = resolve(None, "tiny", "static", [*overrides, "sparsity.sparsity=0.95"])
        assert calls == [
            ("start", (expected, Path("there"), False, None, False)),
            ("write_sample", (Path("there"),)),
            ("write_report", (Path("there"),)),
        ]

    def test_a_stopped_run_gets_its_report_and_the_exit_code_of_a_stop(
        self, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls.replace(monkeypatch, "sparsae.train.run", start={**SUMMARY, "finished": False})
        assert main(["train", "--out", "there", "--json", "summary.json"]) == 130
        assert [name for name, _ in calls] == ["start", "write_report"]
        assert json.loads(Path("summary.json").read_text())["finished"] is False

    def test_a_directory_that_another_process_takes_meanwhile_is_left_to_it(
        self, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried: list[Path] = []

        def start(config: Config, out: Path, *_: object) -> dict[str, Any]:
            tried.append(out)
            if len(tried) < 3:
                out.mkdir(parents=True)
                raise TakenError("another process works on this run")
            return SUMMARY

        calls.replace(monkeypatch, "sparsae.train.run", resume=SUMMARY)
        monkeypatch.setattr(sys.modules["sparsae.train.run"], "start", start, raising=False)
        assert main(["train"]) == 0
        assert tried == [Path(f"runs/demo-sparsae-{n}") for n in (1, 2, 3)]
        tried.clear()
        assert main(["train", "--out", "mine"]) == 2
        assert tried == [Path("mine")]

    def test_the_first_free_directory_is_taken(self, calls: Calls, tmp_path: Path) -> None:
        (tmp_path / "runs" / "demo-sparsae-1").mkdir(parents=True)
        assert main(["train"]) == 0
        assert main(["train", "--method", "dense"]) == 0
        assert [call[1][1] for call in calls if call[0] == "start"] == [
            Path("runs/demo-sparsae-2"),
            Path("runs/demo-dense-1"),
        ]

    def test_resume(self, calls: Calls) -> None:
        assert main(["train", "--resume", "there"]) == 0
        assert calls[0] == ("resume", (Path("there"), False, None, ()))
        assert main(["train", "--resume", "there", "--steps", "9"]) == 0
        assert ("resume", (Path("there"), False, 9, ())) in calls
        assert main(["train", "--resume", "there", "--allow-change", "training.clip"]) == 0
        assert ("resume", (Path("there"), False, None, ["training.clip"])) in calls

    def test_json_alone_on_standard_output(self, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["train"], ["train", "--resume", "there"], ["train", "--dry-run"]):
            assert main([*arguments, "--json", "-"]) == 0
            result = json.loads(capsys.readouterr().out)
            assert result == (FORECAST if "--dry-run" in arguments else {**SUMMARY, "validation_loss": None})
        assert [call[1][2 if call[0] == "start" else 1] for call in calls if call[0] in ("start", "resume")] == [
            True
        ] * 2

    def test_json_to_a_file(self, calls: Calls, tmp_path: Path) -> None:
        assert main(["train", "--json", "out.json"]) == 0
        assert json.loads((tmp_path / "out.json").read_text())["steps"] == 20

    def test_dry_run_shows_the_plan_and_starts_nothing(self, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--dry-run"]) == 0
        assert [name for name, _ in calls] == ["forecast"]
        out = capsys.readouterr().out
        assert "h.0.attn" in out
        assert ["parameters", "190", "1,000", "0.190"] in [line.split() for line in out.splitlines()]
        assert "training FLOPs" in out
        assert "2e+15" in out
        assert "state of sparse layers, bytes: teacher" in out
        assert "\x1b" not in out

    def test_print_config_reads_back(self, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--print-config", "--method", "sparsae-written", "--seed", "7"]) == 0
        (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
        assert resolve(tmp_path / "again.yaml") == resolve(None, None, "sparsae-written", ["seed=7"])
        assert calls == []

    def test_every_key_of_the_settings_is_valid_yaml_elsewhere_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--print-config"]) == 0
        assert Config.model_validate(yaml.safe_load(capsys.readouterr().out)) == Config()


class TestOtherCommands:
    def test_evaluate(self, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evaluate", "r", "--data", "books", "--teacher", "--max-tokens", "9"]) == 0
        assert "1,234" in capsys.readouterr().out
        assert main(["evaluate", "r", "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out) == {"loss": 1.5, "tokens": 1234}
        assert [arguments[:4] for _, arguments in calls] == [
            (Path("r"), "books", True, 9),
            (Path("r"), None, False, None),
        ]

    def test_generate(self, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--tokens", "5", "--temperature", "0", "--top-k", "3", "--seed", "2", "--teacher"]
        assert main(["generate", "r", "--prompt", "def", *arguments]) == 0
        assert calls == [("generate_text", (Path("r"), "def", 5, 0.0, 3, 2, True, False))]
        assert capsys.readouterr().out.endswith("def f(): pass\n")

    def test_a_text_that_the_model_ends_at_once_is_said(
        self, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls.replace(monkeypatch, "sparsae.evaluate.generation", generate_text="")
        assert main(["generate", "r", "--prompt", "The end."]) == 0
        out, err = capsys.readouterr()
        assert out.endswith("The end.\n")
        assert "ended the text at once" in err

    def test_report(self, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["report", "r"]) == 0
        assert calls == [("write_report", (Path("r"), None))]
        assert capsys.readouterr().out.endswith("r/report.html\n")

    def test_export(self, calls: Calls) -> None:
        assert main(["export", "r", "--to", "there", "--teacher"]) == 0
        assert calls == [("export_run", (Path("r"), Path("there"), True, "dense", None, False))]

    def test_info(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = RunDirectory(tmp_path / "r")
        run.path.mkdir()
        run.config_file.write_text(dump(resolve(None, "tiny")))
        run.write_summary(summary_of(preset="tiny", nnz=12345, seconds_by_part={"train": 1.5}))
        assert main(["info", str(run.path)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["nnz", "12,345"] in lines
        assert ["seconds_by_part.train", "1.5", "s"] in lines
        assert ["finished", "yes"] in lines
        assert main(["info", str(run.path), "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["preset"] == "tiny"

    def test_version_and_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"sparsae {sparsae.__version__}\n"
        assert main([]) == 0
        assert "train" in capsys.readouterr().out
        assert main(["train", "--help"]) == 0
        assert "gpt2-medium" in capsys.readouterr().out

    def test_tables_are_rich_on_a_terminal(
        self, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert main(["train", "--dry-run"]) == 0
        assert "│" in capsys.readouterr().out


class TestWhatPeopleRead:
    """Numbers and names in the form that somebody can take in."""

    def test_a_long_time_is_told_in_years(
        self, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls.replace(monkeypatch, "sparsae.train.forecast", forecast={**FORECAST, "expected_seconds": 8.17424e7})
        assert main(["train", "--dry-run"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["expected_seconds", "2", "years", "216", "days"] in lines

    def test_a_text_that_the_terminal_cannot_show_is_escaped(
        self, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls.replace(monkeypatch, "sparsae.evaluate.generation", generate_text="größer 三")
        shown = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="latin-1"))
        assert main(["generate", "r", "--prompt", "gr"]) == 0
        sys.stdout.flush()
        assert shown.getvalue().endswith(b"gr\xf6\xdfer \\u4e09\n")

    def test_set_is_the_same_in_experiments(self) -> None:
        by_option = read(None, ["training.steps=3"], {"--methods": ("methods", ["static"])}, ComparisonPlan)
        assert by_option == read(["training.steps=3"], None, {"--methods": ("methods", ["static"])}, ComparisonPlan)
        assert by_option != read(None, None, {"--methods": ("methods", ["static"])}, ComparisonPlan)


class TestEndings:
    def test_ctrl_c_ends_without_a_traceback(
        self, monkeypatch: pytest.MonkeyPatch, calls: Calls, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls.replace(monkeypatch, "sparsae.train.run", start=KeyboardInterrupt())
        assert main(["train"]) == 130
        assert capsys.readouterr().err == "sparsae: interrupted\n"

    def test_a_fault_of_our_own_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
        calls.replace(monkeypatch, "sparsae.train.run", start=ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            main(["train"])

    def test_a_json_file_is_not_written_after_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, calls: Calls, tmp_path: Path
    ) -> None:
        calls.replace(monkeypatch, "sparsae.train.run", start=sparsae.InputError("the corpus is empty"))
        assert main(["train", "--json", "out.json"]) == 2
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["train", "--help"], ["train", "--print-config"], ["train", "--set", "a.b=3"], ["info", "/none"]],
        ids=" ".join,
    )
    def test_torch_is_not_imported(self, arguments: list[str]) -> None:
        code = (
            "import sys; from sparsae.cli import main; main(sys.argv[1:]); "
            "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules); "
            "sys.exit(str(heavy) if heavy else 0)"
        )
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    def test_python_dash_m(self) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "sparsae", "train", "--steps", "0"], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "sparsae: error: --steps: must be at least 1, not 0\n"
