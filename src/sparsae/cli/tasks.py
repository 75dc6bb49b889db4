"""`sparsae evaluate` and `sparsae finetune`: what a run's model is worth, on text and on tasks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from sparsae.cli.lists import names_in, seeds_in
from sparsae.cli.output import Best, JsonFile, Run, Teacher, output, show_table, show_values
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.files import refuse_unwritable
from sparsae.tasks.catalogue import TASKS
from sparsae.tasks.settings import MODES, FinetuneConfig, finetune_config

_OPTIONS = {"names": "--task", "data": "--data", "topology": "--topology", "seeds": "--seeds", "epochs": "--epochs"}
_OPTIONS |= {"learning_rate": "--learning-rate", "batch_size": "--batch-size", "max_examples": "--max-examples"}
_OPTIONS |= {"max_length": "--max-length", "weight_decay": "--weight-decay", "precision": "--precision"}
_OPTIONS |= {"device": "--device"}


def _default(key: str) -> object:
    return FinetuneConfig.model_fields[key].default


def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Text: a path, a glob, stdlib or hf:NAME.  (default: the run's held-out text)"
        ),
    ] = None,
    teacher: Teacher = False,
    best: Best = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after so many tokens.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Tasks of lm-evaluation-harness, in place of a text: blimp,lambada_openai."),
    ] = None,
    include_path: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Task files of your own; may be repeated.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Solved examples before each question.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Questions of each task at most.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Questions in a batch.  (default: 16)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  (default: as the run has it)")] = None,
    json_file: JsonFile = None,
) -> None:
    """Loss, perplexity and bits per byte of a run's model on a text; or its scores on tasks."""
    refuse_unwritable("--json", json_file)
    of_tasks: dict[str, object] = {"--include-path": include_path, "--num-fewshot": num_fewshot, "--limit": limit}
    of_tasks |= {"--batch-size": batch_size, "--device": device}
    if tasks is None and (given := [option for option, value in of_tasks.items() if value is not None]):
        raise InputError(f"{given[0]} is for tasks: give --tasks too")
    if tasks is not None and (data is not None or max_tokens is not None):
        raise InputError("--tasks have questions of their own: leave out --data and --max-tokens")
    with output(json_file) as result:
        if tasks is not None:
            from sparsae.tasks.harness import ask

            scores = ask(
                run,
                names_in("--tasks", tasks),
                teacher=teacher,
                best=best,
                include=include_path or [],
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                device=device,
                quiet=json_file == "-",
            )
            result.update(encode(scores))
        else:
            from sparsae.evaluate.perplexity import evaluate_run
            from sparsae.train.progress import Display

            with contextlib.closing(Display(quiet=json_file == "-")) as display:
                result.update(evaluate_run(run, data, teacher, max_tokens, display.stage, best))
    if json_file == "-":
        return
    if tasks is None:
        show_values(f"{run} on {data or 'its held-out text'}", result)
        return
    from sparsae.tasks.harness import results_table

    table = results_table(f"{run} on tasks of lm-eval {scores.lm_eval}", scores)
    show_table(table.title, table.columns, table.rows, table.names)


def finetune(
    run: Run,
    *,
    task: Annotated[str, typer.Option(metavar="LIST", help=f"Of: {', '.join(TASKS)}.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="A folder with TASK/train.jsonl or .parquet, or hf:ORG/NAME; hf: alone for the suites' own place.",
            show_default=False,
        ),
    ],
    topology: Annotated[
        str | None,
        typer.Option(metavar="LIST", help=f"Of: {', '.join(MODES)}.  (default: frozen; a dense run's: dense)"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|LIST", help="How many seeds, or which: 3, or 0,1,2.  (default: 3)")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the examples.  (default: {_default('epochs')})")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Highest, after the warm-up.  (default: {_default('learning_rate')})")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Examples in a batch.  (default: {_default('batch_size')})")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help=f"As AdamW has it.  (default: {_default('weight_decay')})")
    ] = None,
    max_examples: Annotated[
        int | None, typer.Option(metavar="N", help="Train on so many at most.  (default: all)")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of an example at most.  (default: the model's context)")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.  (default: as the run was trained)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  (default: as the run has it)")] = None,
    best: Best = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results lie.  (default: RUN/tasks)", show_default=False)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Fine-tune a run's model on tasks, with several seeds. Started again, it goes on."""
    refuse_unwritable("--json", json_file)
    given = {
        "names": names_in("--task", task),
        "data": data,
        "topology": None if topology is None else names_in("--topology", topology),
        "seeds": None if seeds is None else seeds_in(seeds),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "max_examples": max_examples,
        "max_length": max_length,
        "precision": precision,
        "device": device,
    }
    settings = finetune_config({key: value for key, value in given.items() if value is not None}, _OPTIONS)
    where = run / "tasks" if out is None else out
    with output(json_file) as result:
        from sparsae.tasks.study import finetune_run
        from sparsae.train.progress import Display

        with contextlib.closing(Display(quiet=json_file == "-")) as display:
            try:
                results = finetune_run(run, settings, where, display.stage, best=best)
            except KeyboardInterrupt:
                if (where / "ended").is_dir():
                    typer.echo(f"what ended is kept in {where}; go on with the same command", err=True)
                raise
        result.update(encode(results))
    if json_file == "-":
        return
    from sparsae.tasks.tables import remarks, scores_table

    table = scores_table(results)
    show_table(table.title, table.columns, table.rows, table.names)
    for remark in remarks(results.rows):
        typer.echo(remark)
    typer.echo(f"written: {where / 'report.html'}, results.json, table.md")
