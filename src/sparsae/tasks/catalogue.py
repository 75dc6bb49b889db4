"""The tasks of GLUE and SuperGLUE: which fields they are read from, what their classes are, what they are scored by.

A row becomes an `Example`, whatever form it was published in: labels are numbers, digits, names or truth values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsae.config.complaints import nearest, shown
from sparsae.errors import InputError

Metric = Literal["accuracy", "matthews", "f1", "macro_f1", "f1_of_answers", "exact_match"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """What a model reads, and the number of the right class.

    texts: the parts of the input in order; of a multiple choice one such tuple for each choice. group: examples of
    equal groups are scored together, where the task does that.
    """

    texts: tuple[tuple[str, ...], ...]
    label: int
    group: str = ""

    @property
    def key(self) -> str:
        """What examples that belong together (of one premise, passage or sentence) have in common."""
        return self.texts[0][0]


Reader = Callable[[Row, str], Iterator[Example]]


@dataclass(frozen=True)
class Task:
    """A task: `read` makes examples of a row and its place in a file. Of choices, `labels` are their numbers."""

    name: str
    title: str
    suite: Literal["glue", "super_glue"]
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...]
    read: Reader
    chooses: bool = False


def task_named(name: str) -> Task:
    """Raises InputError for a name that is no task's."""
    if name not in TASKS:
        raise InputError(f"no task {shown(name)}; {nearest(name, TASKS)}")
    return TASKS[name]


def _pairs(fields: Sequence[str | tuple[str, ...]], labels: Sequence[str], key: Sequence[str] = ("label",)) -> Reader:
    """Rows with one text a field (the first that is there of several names) and a label."""

    def read(row: Row, where: str) -> Iterator[Example]:
        texts = tuple(_text(row, names if isinstance(names, tuple) else (names,), where) for names in fields)
        yield Example((texts,), _label(row, key, labels, where))

    return read


def _copa(row: Row, where: str) -> Iterator[Example]:
    asked = _text(row, ("question",), where)
    if asked not in ("cause", "effect"):
        raise InputError(f"{where}: question is {shown(asked)}; must be cause or effect")
    question = "What was the cause?" if asked == "cause" else "What happened as a result?"
    premise = f"{_text(row, ('premise',), where)} {question}"
    choices = tuple((premise, _text(row, (name,), where)) for name in ("choice1", "choice2"))
    yield Example(choices, _label(row, ("label",), ("0", "1"), where))


def _multirc(row: Row, where: str) -> Iterator[Example]:
    """Each answer by itself, of the flat form that the Hub has, or of SuperGLUE's own nested one."""
    if "passage" not in row:
        texts = tuple(_text(row, (name,), where) for name in ("paragraph", "question", "answer"))
        yield Example((texts,), _label(row, ("label",), _TRUTH, where), f"{texts[0]}\0{texts[1]}")
        return
    try:
        passage = row["passage"]
        for question in passage["questions"]:
            for answer in question["answers"]:
                flat = {"paragraph": passage["text"], "question": question["question"], "answer": answer["text"]}
                yield from _multirc({**flat, "label": answer.get("label")}, where)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: no passage of MultiRC with questions and answers: {shown(str(error))}") from None


def _text(row: Row, names: Sequence[str], where: str) -> str:
    for name in names:
        if name in row:
            if not isinstance(row[name], str):
                raise InputError(f"{where}: {name} is {shown(row[name])}; must be text")
            return row[name]
    raise InputError(f"{where}: no field {' or '.join(names)} (there are: {', '.join(map(str, row))})")


def _label(row: Row, names: Sequence[str], labels: Sequence[str], where: str) -> int:
    found = next((row[name] for name in names if row.get(name) is not None), None)
    if found is None:
        raise InputError(f"{where}: no {' or '.join(names)}; the example has no answer")
    name = str(int(found)) if isinstance(found, int | bool) else str(found).strip().lower()
    if name in labels:
        return labels.index(name)
    if name.isascii() and name.isdigit() and int(name) < len(labels):
        return int(name)
    raise InputError(f"{where}: label {shown(found)}; must be one of {', '.join(labels)}, or its number from 0 on")


_TRUTH = ("false", "true")
_ENTAILED = ("entailment", "not_entailment")
_FIRST: tuple[str, ...] = ("sentence1", "premise")
_SECOND: tuple[str, ...] = ("sentence2", "hypothesis")


def _glue(name: str, title: str, fields: Sequence[Any], labels: tuple[str, ...], metrics: tuple[Metric, ...]) -> Task:
    return Task(name, title, "glue", labels, metrics, _pairs(fields, labels))


def _super(
    name: str, title: str, labels: tuple[str, ...], metrics: tuple[Metric, ...], read: Reader, **more: Any
) -> Task:
    return Task(name, title, "super_glue", labels, metrics, read, **more)


_MNLI, _CB = ("entailment", "neutral", "contradiction"), ("entailment", "contradiction", "neutral")
_WNLI, _SST, _SAME = ("not_entailment", "entailment"), ("negative", "positive"), ("not_equivalent", "equivalent")
_QQP, _COLA = ("not_duplicate", "duplicate"), ("unacceptable", "acceptable")

TASKS = {
    task.name: task
    for task in (
        _glue("rte", "RTE", (_FIRST, _SECOND), _ENTAILED, ("accuracy",)),
        _glue("cola", "CoLA", ("sentence",), _COLA, ("matthews",)),
        _glue("sst2", "SST-2", ("sentence",), _SST, ("accuracy",)),
        _glue("wnli", "WNLI", (_FIRST, _SECOND), _WNLI, ("accuracy",)),
        _glue("mrpc", "MRPC", ("sentence1", "sentence2"), _SAME, ("accuracy", "f1")),
        _glue("qqp", "QQP", ("question1", "question2"), _QQP, ("accuracy", "f1")),
        _glue("qnli", "QNLI", ("question", "sentence"), _ENTAILED, ("accuracy",)),
        _glue("mnli", "MNLI", (_FIRST, _SECOND), _MNLI, ("accuracy",)),
        _super("boolq", "BoolQ", _TRUTH, ("accuracy",), _pairs(("passage", "question"), _TRUTH, ("label", "answer"))),
        _super("cb", "CB", _CB, ("accuracy", "macro_f1"), _pairs(("premise", "hypothesis"), _CB)),
        _super("copa", "COPA", ("0", "1"), ("accuracy",), _copa, chooses=True),
        _super("wic", "WiC", _TRUTH, ("accuracy",), _pairs(("word", "sentence1", "sentence2"), _TRUTH)),
        _super("multirc", "MultiRC", _TRUTH, ("f1_of_answers", "exact_match"), _multirc),
    )
}
