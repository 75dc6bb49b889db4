"""The commands that run experiments: many runs that answer one question."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sparsae.cli.forecasts import show_experiment
from sparsae.cli.listing import Preset
from sparsae.cli.lists import if_given, names_in, numbers_in, seeds_in
from sparsae.cli.output import EXIT_INTERRUPTED, JsonFile, output, show_table
from sparsae.config.complaints import nearest, option_of, shown, unknown_name
from sparsae.config.load import parse_override
from sparsae.config.shipped import methods
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.compare.variants import ABLATIONS, MODES, WRITTEN, ablation_variants, sensitivity_variants
from sparsae.experiments.directory import require_place
from sparsae.experiments.grid import PARAMETERIZATIONS
from sparsae.experiments.kind import Results
from sparsae.experiments.plan import BasePlan, P, read_plan
from sparsae.experiments.registry import KINDS
from sparsae.experiments.transfer.plan import TransferPlan
from sparsae.files import refuse_unwritable

_PARTS = "; ".join(f"{method}: {', '.join(parts)}" for method, parts in ABLATIONS.items())

Given = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PLAN.yaml] [section.key=value ...]", help="A plan, and settings of every run."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of every run; may be repeated."),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="N|LIST", help="How many seeds, or which: 3, or 0,1,2.  (default: 3)")
]
Sparsities = Annotated[str | None, typer.Option(metavar="LIST", help="Such as 0.8,0.9,0.95.  (default: 0.9)")]
MatchOn = Annotated[
    str | None, typer.Option("--match", metavar="flops|tokens|steps", help="What the runs have in common.")
]
BudgetOf = Annotated[
    float | None, typer.Option(metavar="F", help="So much of it; else what the reference takes for training.steps.")
]
Reference = Annotated[
    str | None, typer.Option(metavar="NAME", help="What others are held against.  (default: static, else the first)")
]
Rates = Annotated[
    str | None,
    typer.Option("--learning-rates", metavar="LIST", help="Tune over this grid, for each method and sparsity."),
]
Share = Annotated[
    float | None, typer.Option("--tuning-share", metavar="F", help="Length of a trial in terms of a run.  (default: 1)")
]
Extensions = Annotated[
    int | None,
    typer.Option(
        "--tuning-extensions",
        metavar="N",
        help="Values that a grid may get where its best is at its end.  (default: 4)",
    ),
]
Parameterizations = Annotated[
    str | None, typer.Option(metavar="LIST", help=f"Of: {', '.join(PARAMETERIZATIONS)}.  (default: sp,mup,supar)")
]
Method = Annotated[str | None, typer.Option(metavar="NAME", help="Of every sparse run.  (default: static)")]
Heads = Annotated[
    str | None, typer.Option(metavar="scaled|constant", help="Heads of one size, or of one number, at all widths.")
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A new directory, or that of the same plan, stopped before.", show_default=False),
]
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help="Runs at a time on this machine.")]
Ray = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: its address, auto or local.")]


Minutes = Annotated[
    float | None, typer.Option(metavar="F", help="Save and stop after so long; the same command continues.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the runs, what they take together and how long, and exit.")
]
STACK = 32
Options = dict[str, tuple[str, object]]
"""By its name on the command line the dotted key of a plan, and its value."""


def compare(
    given: Given = None,
    *,
    out: Out = None,
    settings: Settings = None,
    preset: Preset = None,
    compared: Annotated[
        str | None, typer.Option("--methods", metavar="LIST", help=f"Of: {', '.join(methods())}.")
    ] = None,
    seeds: Seeds = None,
    sparsities: Sparsities = None,
    match: MatchOn = None,
    budget: BudgetOf = None,
    reference: Reference = None,
    learning_rates: Rates = None,
    tuning_share: Share = None,
    tuning_extensions: Extensions = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    stack: Annotated[
        bool, typer.Option("--stack", help="Train runs of equal shapes together: for their losses, not for times.")
    ] = False,
    stack_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most runs that train together.  (with --stack)")
    ] = STACK,
    minutes: Minutes = None,
    dry_run: DryRun = False,
    json_file: JsonFile = None,
) -> None:
    """Compare methods at the same cost: each method, seed and sparsity is a run. Started again, it continues."""
    options = _options(
        preset, seeds, sparsities, match, budget, reference, learning_rates, tuning_share, tuning_extensions
    )
    if compared is not None:
        options["--methods"] = ("methods", names_in("--methods", compared))
    if not stack and stack_size != STACK:
        raise InputError("--stack-size is for runs that train together: give --stack too")
    size = stack_size if stack else None
    _run(read(given, settings, options, ComparisonPlan), out, jobs, ray, dry_run, json_file, minutes, size)


def ablate(
    given: Given = None,
    *,
    out: Out = None,
    settings: Settings = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"Of: {', '.join(ABLATIONS)}.")] = "sparsae",
    names: Annotated[
        str | None, typer.Option("--variants", metavar="LIST", help=f"Of {_PARTS}.  (default: all)")
    ] = None,
    preset: Preset = None,
    seeds: Seeds = None,
    sparsities: Sparsities = None,
    match: MatchOn = None,
    budget: BudgetOf = None,
    learning_rates: Rates = None,
    tuning_share: Share = None,
    tuning_extensions: Extensions = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    dry_run: DryRun = False,
    json_file: JsonFile = None,
) -> None:
    """Take a method apart: itself without one of its parts, or with another in its place."""
    variants = ablation_variants(method, None if names is None else names_in("--variants", names))
    options = _options(preset, seeds, sparsities, match, budget, None, learning_rates, tuning_share, tuning_extensions)
    options |= {
        "ablate": ("kind", "ablation"),
        "ablate: methods": ("methods", []),
        "--variants": ("variants", variants),
        "ablate: reference": ("reference", next(iter(variants))),
    }
    _run(read(given, settings, options, ComparisonPlan), out, jobs, ray, dry_run, json_file)


def sensitivity(
    given: Given = None,
    *,
    out: Out = None,
    settings: Settings = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="A method that scores candidates.")] = WRITTEN,
    sequences: Annotated[str, typer.Option(metavar="LIST", help="Sizes of the micro-batch.")] = "1,4,16",
    modes: Annotated[str, typer.Option(metavar="LIST", help="How it is drawn.")] = ",".join(MODES),
    preset: Preset = None,
    seeds: Seeds = None,
    sparsities: Sparsities = None,
    match: MatchOn = None,
    budget: BudgetOf = None,
    learning_rates: Rates = None,
    tuning_share: Share = None,
    tuning_extensions: Extensions = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    dry_run: DryRun = False,
    json_file: JsonFile = None,
) -> None:
    """How the micro-batch that scores candidates matters: their ranking, acceptance, final loss."""
    if method not in methods():
        raise InputError(f"--method: {unknown_name('method', method, methods())}")
    drawn = names_in("--modes", modes)
    for mode in drawn:
        if mode not in MODES:
            raise InputError(f"--modes: no mode {shown(mode)}; {nearest(mode, MODES)}")
    counts = [int(count) for count in numbers_in("--sequences", sequences, int)]
    if min(counts) < 1:
        raise InputError(f"--sequences: must be at least 1, not {min(counts)}")
    variants = sensitivity_variants(method, counts, drawn)
    options = _options(preset, seeds, sparsities, match, budget, None, learning_rates, tuning_share, tuning_extensions)
    options |= {
        "sensitivity": ("kind", "sensitivity"),
        "sensitivity: methods": ("methods", []),
        "--sequences": ("variants", variants),
    }
    options.setdefault("--match", ("match", "steps"))
    if "resampled-4" in variants:  # the default of both methods that score candidates
        options["sensitivity: reference"] = ("reference", "resampled-4")
    _run(read(given, settings, options, ComparisonPlan), out, jobs, ray, dry_run, json_file)


def transfer(
    given: Given = None,
    *,
    out: Out = None,
    settings: Settings = None,
    parameterizations: Parameterizations = None,
    widths: Annotated[str | None, typer.Option(metavar="LIST", help="Model widths.  (default: 256)")] = None,
    sparsities: Annotated[
        str | None, typer.Option(metavar="LIST", help="0: a dense model.  (default: 0.5,0.75,0.9)")
    ] = None,
    learning_rates: Annotated[
        str | None, typer.Option(metavar="LIST", help="Tried at each.  (default: 2^-11 to 2^-5)")
    ] = None,
    initial_scales: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Factors on initial weights, tried at each.  (default: the settings' own)"),
    ] = None,
    embedding_multipliers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Of the embeddings, tried at each.  (default: the settings' own)")
    ] = None,
    method: Method = None,
    heads: Heads = None,
    preset: Preset = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|LIST", help="How many seeds, or which: 3, or 0,1,2.  (default: 1)")
    ] = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    dry_run: DryRun = False,
    json_file: JsonFile = None,
) -> None:
    """Find the best learning rate at every width and sparsity: does it stay? Started again, it continues."""
    options = grid_options(preset, method, heads, parameterizations, widths, sparsities, seeds)
    swept = {
        "learning_rates": learning_rates,
        "initial_scales": initial_scales,
        "embedding_multipliers": embedding_multipliers,
    }
    for key, text in swept.items():
        if text is not None:
            options[option_of((key,))] = key, numbers_in(option_of((key,)), text, float)
    _run(read(given, settings, options, TransferPlan), out, jobs, ray, dry_run, json_file)


def grid_options(
    preset: str | None,
    method: str | None,
    heads: str | None,
    parameterizations: str | None,
    widths: str | None,
    sparsities: str | None,
    seeds: str | None,
) -> Options:
    """The options that were given of an experiment over a grid."""
    options = {
        "preset": preset,
        "method": method,
        "heads": heads,
        "parameterizations": if_given(parameterizations, partial(names_in, "--parameterizations")),
        "widths": if_given(widths, partial(numbers_in, "--widths", kind=int)),
        "sparsities": if_given(sparsities, partial(numbers_in, "--sparsities", kind=float)),
        "seeds": if_given(seeds, seeds_in),
    }
    return options_of(options)


def options_of(values: Mapping[str, object]) -> Options:
    """The options that were given, which are called as the keys of the plan are."""
    return {option_of((key,)): (key, value) for key, value in values.items() if value is not None}


def read(given: list[str] | None, settings: list[str] | None, options: Options, plan: type[P]) -> P:
    """The plan that arguments, --set and options say. Raises InputError for whatever is wrong with it."""
    overrides = [entry for entry in given or [] if "=" in entry] + (settings or [])
    files = [entry for entry in given or [] if "=" not in entry]
    if len(files) > 1:
        raise InputError(
            f"two plans: {shown(files[0])} and {shown(files[1])}; give one, and settings as section.key=value"
        )
    return read_plan(Path(files[0]) if files else None, options, [parse_override(entry) for entry in overrides], plan)


def _options(
    preset: str | None,
    seeds: str | None,
    sparsities: str | None,
    match: str | None,
    budget: float | None,
    reference: str | None,
    learning_rates: str | None,
    tuning_share: float | None,
    tuning_extensions: int | None,
) -> Options:
    """The options that were given, by the keys of a plan."""
    options = {
        "preset": preset,
        "seeds": if_given(seeds, seeds_in),
        "sparsities": if_given(sparsities, partial(numbers_in, "--sparsities", kind=float)),
        "match": match,
        "budget": budget,
        "reference": reference,
        "tuning.share": tuning_share,
        "tuning.extensions": tuning_extensions,
    }
    found = options_of(options)
    if learning_rates is not None:
        found["--learning-rates"] = "tuning.learning_rates", numbers_in("--learning-rates", learning_rates, float)
    return found


def _run(
    plan: BasePlan,
    out: Path | None,
    jobs: int,
    ray: str | None,
    dry_run: bool,
    json_file: str | None,
    minutes: float | None = None,
    stack: int | None = None,
) -> None:
    """minutes: after which to stop. stack: how many runs train together; None: each for itself."""
    refuse_unwritable("--json", json_file)
    if dry_run:
        ways = {"--ray": ray, "--minutes": minutes, "--stack": stack, "--jobs": None if jobs == 1 else jobs}
        if given := [name for name, value in ways.items() if value is not None]:
            raise InputError(f"--dry-run trains nothing: leave out {', '.join(given)}")
        if out is not None:
            require_place(out, plan)
        show_experiment(plan, json_file)
        return
    if out is None:
        raise InputError("--out is missing: give a directory for the runs, or --dry-run to see what they take")
    if stack is not None and ray is not None:
        raise InputError("--stack trains its runs on one machine: leave out --ray")
    if minutes is not None and ray is not None:
        raise InputError("--minutes is for runs on one machine: leave out --ray")
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"--minutes: must be above 0, not {minutes:g}")
    if minutes is not None and getattr(plan, "tasks", None) is not None:
        raise InputError("--minutes knows no end of fine-tuning: leave it out, or the plan's tasks")
    if ray is not None and jobs != 1:
        raise InputError("--jobs is for one machine and --ray for a cluster: give one of them")
    if ray is not None and importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs the extra: pip install 'sparsae[ray]'")
    quiet = json_file == "-"
    with output(json_file) as result:
        from sparsae.experiments.execution import Executor, InOrder
        from sparsae.experiments.jobs import require_here
        from sparsae.experiments.stacked import Stacked, refuse
        from sparsae.experiments.workers import Workers
        from sparsae.train.stopping import StopRequest

        stop = StopRequest(None if minutes is None else 60 * minutes)

        def executor(lock: int) -> Executor:
            if ray is not None:
                from sparsae.experiments.cluster import Cluster

                return Cluster(ray)
            if jobs != 1:
                return Workers(jobs, lock, stack, stop)
            return InOrder(stop) if stack is None else Stacked(stack, stop)

        here = [require_here] if ray is None else []  # a cluster's machines may have what this one has not
        experiment = KINDS[plan.kind].experiment(plan, out, quiet, here + ([] if stack is None else [refuse]))
        found = experiment.run(executor)
        if found is None:
            typer.echo(f"stopped and saved; continue with the same command: {out}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED)
        result.update(encode(found))
    if not quiet:
        _show(found, out)


def _show(results: Results, out: Path) -> None:
    kind = KINDS[results.kind]
    for table in kind.tables(results):
        show_table(table.title, table.columns, table.rows, table.names)
    for line in kind.conclusions(results):
        typer.echo(line)
    for warning in results.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(f"written: {out / 'report.html'}, results.json, table.md, table.tex")
