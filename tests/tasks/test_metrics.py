"""Scores by hand: GLUE's and SuperGLUE's metrics, in pairs, by question, and the majority class's."""

from __future__ import annotations

import math

import pytest

from sparsae.tasks.catalogue import TASKS, Example
from sparsae.tasks.data import TaskData
from sparsae.tasks.metrics import all_scores, majority, scores

pytest.importorskip("sklearn")


def labelled(*labels: int, groups: str = "") -> list[Example]:
    return [Example(((str(n),),), label, groups[n : n + 1]) for n, label in enumerate(labels)]


def test_accuracy_and_f1_are_a_pair() -> None:
    found = scores(TASKS["mrpc"], labelled(1, 1, 0, 0), [1, 0, 1, 0])
    assert found == {"accuracy": 0.5, "f1": 0.5}


def test_matthews_is_zero_for_one_class_alone() -> None:
    assert scores(TASKS["cola"], labelled(1, 1, 0, 0), [1, 1, 1, 1]) == {"matthews": 0.0}
    tp, tn, fp, fn = 2, 1, 1, 1
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = scores(TASKS["cola"], labelled(1, 1, 1, 0, 0), [1, 1, 0, 0, 1])
    assert found["matthews"] == pytest.approx(by_hand)


def test_macro_f1_is_the_mean_of_classes() -> None:
    found = scores(TASKS["cb"], labelled(0, 0, 1, 2), [0, 0, 1, 1])
    assert found["macro_f1"] == pytest.approx((1.0 + 2 / 3 + 0.0) / 3)


def test_a_question_is_right_where_every_answer_is() -> None:
    found = scores(TASKS["multirc"], labelled(1, 0, 1, 1, groups="aabb"), [1, 0, 1, 0])
    assert found["exact_match"] == 0.5
    assert found["f1_of_answers"] == pytest.approx(0.8)


def test_each_variant_has_scores_of_its_own() -> None:
    data = TaskData(
        TASKS["mnli"], labelled(2, 2, 0), {"matched": labelled(2, 0), "mismatched": labelled(2)}, False, 3, ""
    )
    assert all_scores(data, {"matched": [2, 2], "mismatched": [2]}) == {
        "accuracy_matched": 0.5,
        "accuracy_mismatched": 1.0,
        "score": 0.75,
    }
    assert majority(data) == {"accuracy_matched": 0.5, "accuracy_mismatched": 1.0, "score": 0.75}


def test_the_majority_is_that_of_training() -> None:
    data = TaskData(TASKS["sst2"], labelled(0, 0, 1), {"": labelled(1, 1, 1, 0)}, False, 3, "")
    assert majority(data)["accuracy"] == 0.25
