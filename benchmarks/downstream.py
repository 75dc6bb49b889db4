"""What sparse training is worth downstream: `BOOKS=DIR EVAL=DIR python benchmarks/downstream.py OUT`.

Two GPTs of 15 million parameters read 5 million tokens of books, one sparse from the first step to the last, one dense.
Both are fine-tuned on five tasks (the sparse one with its topology frozen, and densified), and asked by lm-eval. OUT
gets runs and results; the record goes to docs/results/downstream/results.json and the page beside it, which
`--page` writes again from the record alone. Stopped at any time, the same command goes on. BOOKS has train-0.jsonl.xz
and valid.jsonl.xz; EVAL is described in lm_eval/local.py, with a folder for each task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsae.cli import main as sparsae
from sparsae.core.record import decode
from sparsae.files import read_json, write_atomically
from sparsae.report.tables import Table
from sparsae.tasks.record import TaskResults
from sparsae.tasks.tables import mode_title, remarks, scores_table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TASK_FILES = Path(__file__).parent / "lm_eval"
KEPT = ["preset", "method", "sparsity", "steps", "tokens", "parameters_dense", "nnz", "validation_loss", "train_flops"]
Record = Mapping[str, Any]


SETTINGS = ("--set", "data.max_documents=120", "--set", "training.precision=bfloat16")


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    # Steps of 4,096 tokens; of the books, enough to be read once.
    train: tuple[str, ...] = ("--preset", "tiny", "--steps", "1300", *SETTINGS)
    finetune: tuple[str, ...] = ("--max-examples", "1000", "--epochs", "3", "--seeds", "3", "--max-length", "128")
    tasks: str = "rte,cola,sst2,wnli,boolq"
    asked: tuple[str, ...] = ()
    asked_tasks: str = "blimp_local,lambada_local,arc_easy_local"
    sparsity: str = "0.9"
    learning_rate: str = "3e-4"


SMALLEST = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=64", "data.tokenizer_vocab=300"]
SMALLEST += ["data.max_documents=2", "training.validation_sequences=4"]
TOY = replace(
    Size(),
    train=("--preset", "tiny", "--steps", "20", *(part for setting in SMALLEST for part in ("--set", setting))),
    finetune=("--max-examples", "32", "--epochs", "1", "--seeds", "2"),
    tasks="wnli,cola",
    asked=("--limit", "8"),
)


def measure(out: Path, size: Size) -> dict[str, Any]:
    """Everything that is not there yet; the record."""
    record: dict[str, Any] = {"runs": {}}
    for name, method, modes in (("sparse", "sparsae", "frozen,dense"), ("dense", "dense", "dense")):
        run, asked = out / name, out / f"{name}-asked.json"
        train(run, method, size)
        tuned = ["--task", size.tasks, "--data", "${EVAL}", "--topology", modes, "--learning-rate", size.learning_rate]
        call("finetune", run, *tuned, *size.finetune)
        if not asked.is_file():
            given = ["--tasks", size.asked_tasks, "--include-path", str(TASK_FILES), "--json", str(asked)]
            call("evaluate", run, *given, *size.asked)
        summary = read_json(run / "summary.json")
        record["runs"][name] = {
            "summary": {key: summary[key] for key in KEPT},
            "finetuned": read_json(run / "tasks" / "results.json"),
            "asked": read_json(asked),
        }
    return record


def train(run: Path, method: str, size: Size) -> None:
    """To its end, from wherever it is."""
    if (run / "summary.json").is_file() and read_json(run / "summary.json")["finished"]:
        return
    if (run / "checkpoints").is_dir():
        call("train", "--resume", run)
        return
    text = ["--set", "data.source=${BOOKS}/train-0.jsonl.xz", "--set", "data.validation_source=${BOOKS}/valid.jsonl.xz"]
    sparse = [] if method == "dense" else ["--sparsity", size.sparsity]
    call("train", "--method", method, *size.train, *text, *sparse, "--out", run)


def call(*arguments: object) -> None:
    """A command of the program; ends this one where it fails or is stopped."""
    if code := sparsae([str(argument) for argument in arguments]):
        sys.exit(code)


def page(record: Record) -> str:
    """The page of a record, as Markdown."""
    runs = record["runs"]
    sparse = runs["sparse"]
    settings, summary = sparse["finetuned"]["settings"], sparse["summary"]
    told = dict.fromkeys(remark for run in runs.values() for remark in remarks(finetuned(run).rows))
    return "\n".join(
        (
            "# Downstream: fine-tuned on five tasks, and asked as they are\n",
            f"Two GPTs of {summary['parameters_dense']:,} parameters if dense, trained on {summary['tokens']:,} tokens",
            f"of English books: one {100 * sparse['finetuned']['sparsity']:g} % sparse from the first step to the last",
            f"(`{summary['method']}`), one dense, on the same text in the same order. So few tokens make no model that",
            "knows much: what is asked here is whether sparsity loses what there is.\n",
            trained_table(record).markdown(),
            "## Fine-tuned\n",
            f"{settings['max_examples']:,} examples of {settings['max_length']} tokens at most, {settings['epochs']}",
            f"epochs, {len(settings['seeds'])} seeds, learning rate {settings['learning_rate']:g} for all, not tuned",
            "for any. *Densified* is sparse pre-training and dense fine-tuning.\n",
            tasks_table(record).markdown(),
            *(f"- {remark}" for remark in told),
            "\n## Asked as they are\n",
            f"By lm-evaluation-harness {sparse['asked']['lm_eval']}, with the task files of `benchmarks/lm_eval`: half",
            "of BLiMP's paradigms, LAMBADA's development passages, the validation questions of ARC's easy part.\n",
            asked_table(record).markdown(),
            "[All numbers](downstream/results.json). Again:",
            "`BOOKS=books EVAL=eval python benchmarks/downstream.py runs/downstream`.\n",
        )
    )


def trained_table(record: Record) -> Table:
    """The two runs."""
    columns = ["model", "method", "active weights of sparse layers", "validation loss, nats", "training FLOPs"]
    rows = []
    for name, run in record["runs"].items():
        summary = run["summary"]
        active = f"{summary['nnz']:,}" if summary["sparsity"] else "all"
        cells = [name, summary["method"], active, f"{summary['validation_loss']:.4f}", f"{summary['train_flops']:.3g}"]
        rows.append(cells)
    return Table("The two runs", columns, rows)


def tasks_table(record: Record) -> Table:
    """A row for each metric of each task, a column for each model."""
    runs = [finetuned(run) for run in record["runs"].values()]
    columns = ["task", "metric", *dict.fromkeys(title for run in runs for title, _ in _columns(run)), "majority class"]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        for task, metric, model, score, *_ in scores_table(run).rows:
            rows.setdefault((task, metric), {})[model] = score
    lines = [[*name, *(cells.get(column, "") for column in columns[2:])] for name, cells in rows.items()]
    return Table("Percent, mean over seeds ± half of the 95 % interval", columns, lines)


def finetuned(run: Record) -> TaskResults:
    """A run's fine-tunings, in a record."""
    return decode(TaskResults, run["finetuned"], "results.json: finetuned")


def _columns(run: TaskResults) -> Iterator[tuple[str, str]]:
    yield from ((mode_title(run, row.topology), row.topology) for row in run.rows)


def asked_table(record: Record) -> Table:
    """A row for each metric of each task, a column for each run."""
    runs = {name: run["asked"]["tasks"] for name, run in record["runs"].items()}
    first = next(iter(runs.values()))
    rows = [
        [task, metric, f"{entry['questions']:,}", *(_score(tasks[task]["metrics"][metric]) for tasks in runs.values())]
        for task, entry in first.items()
        for metric in entry["metrics"]
    ]
    return Table("Score ± standard error", ["task", "metric", "questions", *runs], rows)


def _score(entry: Mapping[str, float | None]) -> str:
    error = entry["stderr"]
    return f"{entry['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="a directory for the runs")
    parser.add_argument("--toy", action="store_true", help="as small as it gets, to see that it works")
    parser.add_argument("--page", action="store_true", help="only write the page, from the record")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where page and record go")
    given = parser.parse_args()
    file = given.results / "downstream" / "results.json"
    if not given.page:
        if given.out is None:
            parser.error("give a directory for the runs")
        record = measure(given.out, TOY if given.toy else Size())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(record, indent=1) + "\n")
    write_atomically(given.results / "downstream.md", page(json.loads(file.read_text("utf-8"))))


if __name__ == "__main__":
    main()
