"""GLUE's and SuperGLUE's metrics, by scikit-learn; and what always the commonest class would get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsae.errors import InputError
from sparsae.tasks.catalogue import Example, Metric, Task
from sparsae.tasks.data import TaskData

EXTRA = "pip install 'sparsae[tasks]'"
TITLES: Mapping[Metric, str] = {
    "accuracy": "accuracy",
    "matthews": "Matthews correlation",
    "f1": "F1",
    "macro_f1": "F1, mean of classes",
    "f1_of_answers": "F1 of all answers",
    "exact_match": "questions all right",
}


def scores(task: Task, examples: Sequence[Example], predictions: Sequence[int]) -> dict[Metric, float]:
    """The task's metrics of a prediction for each example, as shares of one. Raises InputError without scikit-learn."""
    return {metric: _METRICS[metric](examples, predictions) for metric in task.metrics}


def all_scores(data: TaskData, predictions: Mapping[str, Sequence[int]], score: str = "score") -> dict[str, float]:
    """Every metric of every validation split, `accuracy` or `accuracy_matched`; as `score` the mean of them all."""
    found = {
        f"{metric}_{name}" if name else metric: value
        for name, examples in data.validations.items()
        for metric, value in scores(data.task, examples, predictions[name]).items()
    }
    return found | {score: sum(found.values()) / len(found)}


def majority(data: TaskData) -> dict[str, float]:
    """The scores of the class that most training examples have, given to every one (the first of equal ones)."""
    counts = Counter(example.label for example in data.train)
    commonest = min(counts, key=lambda label: (-counts[label], label))
    return all_scores(data, {name: [commonest] * len(examples) for name, examples in data.validations.items()})


def _library() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise InputError(f"scores of tasks need scikit-learn: {EXTRA}") from None
    return metrics


def _truth(examples: Sequence[Example]) -> list[int]:
    return [example.label for example in examples]


def _accuracy(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    return float(_library().accuracy_score(_truth(examples), predictions))


def _matthews(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    return float(_library().matthews_corrcoef(_truth(examples), predictions))


def _f1(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    return float(_library().f1_score(_truth(examples), predictions, zero_division=0.0))


def _macro_f1(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    return float(_library().f1_score(_truth(examples), predictions, average="macro", zero_division=0.0))


def _exact_match(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    """Share of the groups (of MultiRC: questions) in which every prediction is right."""
    right: dict[str, bool] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        right[example.group] = right.get(example.group, True) and example.label == prediction
    return sum(right.values()) / len(right)


_METRICS: Mapping[Metric, Callable[[Sequence[Example], Sequence[int]], float]] = {
    "accuracy": _accuracy,
    "matthews": _matthews,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "f1_of_answers": _f1,
    "exact_match": _exact_match,
}
