"""What the page says: its header, its headline numbers and its sections, each with a sentence on how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from html import escape
from statistics import median

from sparsae import __version__
from sparsae.config.text import annotated
from sparsae.report import figures as draw
from sparsae.report import maps, markup
from sparsae.report.data import RunData, or_nan
from sparsae.report.headline import facts, headline
from sparsae.report.readable import UNKNOWN, compact, count, duration, in_bytes, percent, short_names, sparsity_text
from sparsae.report.state import state
from sparsae.report.svg import Key
from sparsae.rules.parts.strategy import GENE
from sparsae.runs.rows import TopologyRow
from sparsae.search.rows import LayerRow


def title(run: RunData) -> str:
    """Preset, method and, where the method's name does not say it, sparsity."""
    config, sparsity, (height, width) = run.config, run.config.sparsity.sparsity, run.config.sparsity.block
    kind = f"{sparsity_text(sparsity)} sparse" if sparsity else "dense"
    if sparsity and config.sparsity.quota is not None:
        kind = f"{config.sparsity.quota} sparse"
    if sparsity and height * width > 1:
        kind += f" in blocks of {height}×{width}"
    return " · ".join((config.preset, config.method, *([] if config.method.startswith(kind) else [kind])))


def body(run: RunData) -> str:
    """Everything inside the page's body."""
    parts = {
        "training": ("Training", _training(run)),
        "density": ("Density", density(run)),
        "search": ("Search", _search(run)),
        "movement": ("Movement", movement(run)),
        "cost": ("Cost", _cost(run)),
        "layers": ("Layers", _layers(run)),
        "sample": ("Sample", _sample(run)),
        "settings": ("Settings", _settings(run)),
    }
    links = "".join(f'<li><a href="#{name}">{label}</a></li>' for name, (label, _) in parts.items())
    return "\n".join(
        [
            f"<header>\n<h1>{escape(title(run))}</h1>",
            f'<p class="lead">Training run <code>{escape(run.path.resolve().name)}</code>, seed {run.config.seed}</p>',
            state(run),
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>',
            markup.tiles(headline(run)),
            markup.facts(facts(run)),
            *(text for _, text in parts.values()),
            f"</main>\n<footer>Written by sparsae {escape(__version__)} from this run's own metrics.</footer>",
        ]
    )


def _training(run: RunData) -> str:
    rates = draw.training_curve
    lead = (
        "Lower is better; the dotted lines are the model before its first step and one that knows only how frequent "
        "each token is. By FLOPs, runs of different sparsity can be held against each other."
    )
    panels = [
        draw.loss(run, "step"),
        draw.loss(run, "train_flops"),
        rates(run, "learning-rate", "Learning rate", "base rate of the optimizer", lambda r: r.learning_rate),
        rates(run, "gradient-norm", "Gradient norm", "L2, before clipping", lambda r: r.gradient_norm, log=True),
        rates(
            run, "distillation", "Divergence from the teacher", "KL, nats per token", lambda r: or_nan(r.distillation)
        ),
        rates(run, "throughput", "Throughput", "tokens per second", lambda r: r.tokens_per_second),
        rates(run, "mfu", "Model FLOPs utilization", "share of the peak", lambda r: or_nan(r.mfu)),
    ]
    missing = "" if any(panels) else markup.paragraph("No loss has been measured yet.")
    return markup.section("training", "Training", lead, markup.figures(panels), missing)


def density(run: RunData) -> str:
    """Which share of its connections each layer has, through time."""
    lead = (
        "One row a layer or head, time from left to right: which share of its possible connections exists. A "
        "projection that makes queries, keys and values at once has a row for each head of each, in that order."
    )
    if not run.layers:
        return markup.section("density", "Density", lead, markup.paragraph("This run has no sparse layers."))
    change = maps.density_change(run)
    still = "" if change else markup.paragraph("Every layer kept the density that it began with.")
    return markup.section(
        "density",
        "Density through time",
        lead,
        markup.figures([maps.density(run), change, maps.heads(run)]),
        still,
    )


def _search(run: RunData) -> str:
    lead = (
        "Each update proposes candidates and scores them on held-out text; a mark below the line is a topology that "
        "scored better than the one in force."
    )
    if not run.updates:
        text = "The topology was never updated in this run."
        return markup.section("search", "Search", "", markup.paragraph(text))
    scores = draw.scores(run)
    return markup.section(
        "search",
        "Search",
        lead if scores else "",
        "" if scores else markup.paragraph("No candidate was scored."),
        markup.figures([scores, *(draw.term(run, name) for name in run.terms)]),
        markup.table(
            "Candidates by proposer",
            ["proposer", "proposed", "outside its bounds", "scored", "accepted", "median difference in score"],
            _proposers(run),
        ),
        _strategy(run),
    )


def _strategy(run: RunData) -> str:
    """The parameters in force: a curve each, or a number where it never moved."""
    parameters: dict[tuple[str, str, str], Callable[[TopologyRow], float]] = {
        ("lambda", "Candidates (λ)", "an update"): lambda update: update.number("candidates_count"),
        ("mutation-rate", "Mutation rate", "share of connections"): lambda update: update.number("mutation_rate"),
        ("reset-probability", "Reset probability", "share of candidates"): lambda update: update.number(
            "reset_probability"
        ),
    }
    for gene in dict.fromkeys(key for update in run.updates for key in update.numbers if key.startswith(GENE)):
        label = gene.removeprefix(GENE).replace("_", " ").replace(".", ", ").capitalize()
        parameters[gene.replace(".", "-").replace("_", "-"), label, "evolved"] = partial(_number, gene)
    constant, panels = [], []
    for (name, label, unit), value in parameters.items():
        values = {value(update) for update in run.updates if math.isfinite(value(update))}
        if len(values) == 1:
            constant.append((f"{label}, constant", compact(values.pop())))
        elif values:
            key = Key(label, "accent")
            panels.append(draw.by_update(run, name, label, unit, {key: value}, shape="steps", initial=False))
    if not constant and not panels:
        return ""
    return "<h3>The strategy's own parameters</h3>\n" + markup.facts(constant) + markup.figures(panels)


def _number(name: str, update: TopologyRow) -> float:
    return update.number(name)


def _proposers(run: RunData) -> list[list[str]]:
    rows = []
    for proposer in dict.fromkeys(c.proposer for u in run.updates for c in u.candidates):
        mine = [(u, i, c) for u in run.updates for i, c in enumerate(u.candidates) if c.proposer == proposer]
        differences = [c.score - u.current.score for u, _, c in mine if u.current]
        differences = [d for d in differences if math.isfinite(d)]
        rows.append(
            [
                proposer,
                count(len(mine)),
                count(sum(c.rejected is not None for *_, c in mine)),
                count(sum(math.isfinite(c.score) for *_, c in mine)),
                count(sum(u.accepted and u.chosen == i for u, i, _ in mine)),
                f"{median(differences):+.2g}".replace("-", "−") if differences else UNKNOWN,
            ]
        )
    return rows


def movement(run: RunData) -> str:
    """How far the topology moved."""
    lead = (
        "How far the topology moved: what each update exchanged, which share of the active connections is not of the "
        "first topology (or of the one before), and which share of all positions was ever active (the in-time "
        "over-parameterization rate, ITOP). What an update only drops, or only grows, is in the densities above."
    )
    if not run.updates:
        text = "No connection moved." if run.layers else "There are no sparse layers."
        return markup.section("movement", "Movement", lead, markup.paragraph(text))
    update = draw.by_update
    distances = {
        Key("to the first", "accent"): lambda u: u.hamming_start,
        Key("to the one before", "warm", "dash"): lambda u: u.hamming_last,
    }
    ages = {
        Key("median", "accent"): lambda u: u.age.median,
        Key("mean", "warm", "dash"): lambda u: u.age.mean,
        Key("oldest", "ink", "dot"): lambda u: u.age.max,
    }
    dead, (height, width) = maps.dead_outputs(run), run.config.sparsity.block
    moved = "Connections exchanged" if height * width == 1 else f"Blocks of {height}×{width} exchanged"
    exchanges = any(u.swaps for u in run.updates)
    return markup.section(
        "movement",
        "Movement of the topology",
        lead,
        markup.figures(
            [
                update(
                    run,
                    "swaps",
                    moved,
                    "an update",
                    {Key("swaps", "accent"): lambda u: u.swaps},
                    shape="stems",
                    initial=False,
                )
                if exchanges
                else None,
                update(run, "hamming", "Distance", "share of active connections", distances),
                update(
                    run,
                    "itop",
                    "Positions ever active",
                    "share of all positions",
                    {Key("ITOP rate", "accent"): lambda u: u.itop_rate},
                ),
                update(run, "age", "Age of connections", "steps", ages),
                maps.gradient_activity(run),
                dead,
            ]
        ),
        "" if dead else markup.paragraph("No layer ever had an output without an active weight."),
    )


def _cost(run: RunData) -> str:
    lead = (
        "Blue bars are parts, grey ones totals. FLOPs are counted analytically; growth gradients are those at inactive "
        "positions, by which connections are grown; bytes are those of live tensors of the sparse layers, at most."
    )
    totals = run.totals
    if totals is None:
        text = "Cost by part is known once the run has its summary."
        return markup.section("cost", "Cost", lead, markup.paragraph(text))
    flops = {"total": totals.train_flops, "dense equivalent": totals.train_flops_dense_equivalent}
    state = {
        "total": totals.state_bytes_sparse_layers,
        "dense equivalent": totals.state_bytes_sparse_layers_dense_equivalent,
    }
    return markup.section(
        "cost",
        "Cost by part",
        lead,
        markup.figures(
            [
                draw.bars("flops", "Training FLOPs", totals.train_flops_by_part, flops, compact),
                draw.bars("memory", "State of the sparse layers", totals.state_bytes_by_part, state, in_bytes)
                if run.layers
                else None,
                draw.bars("seconds", "Time", totals.seconds_by_part, {"total": totals.seconds}, duration),
            ]
        ),
    )


def _layers(run: RunData) -> str:
    lead = (
        "Each sparse layer at the start and at the end of what was recorded; a dead output has no active weight left."
    )
    if not run.layers:
        return markup.section("layers", "Layers", lead, markup.paragraph("This run has no sparse layers."))
    first, last, names = run.topologies[0].layers, run.last_layers, short_names(run.layers)
    rows = [_layer_row(names[name], first[name], last.get(name, first[name])) for name in run.layers]
    columns = ["layer", "shape", "connections, first", "last", "density, first", "last", "dead outputs"]
    if not any(layer.shape for layer in first.values()):
        columns[1] = "weights if dense"
    return markup.section("layers", "Layers", lead, markup.table(f"{len(rows)} sparse layers", columns, rows))


def _layer_row(name: str, first: LayerRow, last: LayerRow) -> list[str]:
    shape = " × ".join(str(side) for side in first.shape) or count(first.units)
    densities = [percent(layer.density) for layer in (first, last)]
    return [name, shape, count(first.nnz), count(last.nnz), *densities, count(last.dead_outputs)]


def _sample(run: RunData) -> str:
    lead = "The prompt is grey; what follows it was drawn from the trained model, token by token."
    if run.sample is None:
        text = "This run has no sample; one is drawn when a run finishes."
        return markup.section("sample", "A sample", lead, markup.paragraph(text))
    prompt = escape(run.sample.prompt)
    student = "The model" if run.sample.teacher_text is None else "Student"
    texts = {student: run.sample.text, "Teacher": run.sample.teacher_text}
    blocks = "".join(
        f'<div class="sample"><h3>{name}</h3><pre><span class="prompt">{prompt}</span>{escape(text)}</pre>'
        f"{'' if text else markup.paragraph('The model ended the text at once.')}</div>"
        for name, text in texts.items()
        if text is not None
    )
    named = markup.facts(_sampled(run))
    return markup.section("sample", "A sample", lead, named, f'<div class="samples">{blocks}</div>')


def _sampled(run: RunData) -> list[tuple[str, str]]:
    """What the sample continues, and what the model has read: text and tokenizer by name."""
    data, prompt = run.config.data, run.config.tracking.sample_prompt
    weighed = [f"{text.source} ({text.weight:g})" if data.sources else text.source for text in data.texts]
    tokenizer = (
        f"trained on it, {data.tokenizer_vocab:,} entries at most" if data.tokenizer == "train" else data.tokenizer
    )
    held_out = data.validation_source or "the held-out text"
    return [
        ("Prompt", f"the start of a document of {held_out}" if prompt is None else "tracking.sample_prompt"),
        ("Training text", ", ".join(weighed)),
        ("Tokenizer", tokenizer),
    ]


def _settings(run: RunData) -> str:
    text = escape(annotated(run.config))
    return markup.section(
        "settings",
        "Settings",
        "Everything that this run was configured with, its defaults included, each with its explanation.",
        f"<details><summary>All settings</summary>\n<pre>{text}</pre></details>",
    )
