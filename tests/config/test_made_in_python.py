"""Sections of settings that are made in Python: what is wrong is one line, as the command line says it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from sparsae.config import DataConfig, ModelConfig, Section, TeacherConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.errors import InputError
from sparsae.rules import GenerationsConfig, RiglConfig


@pytest.mark.parametrize(
    ("section", "settings", "line"),
    [
        (RiglConfig, {"evry": 10}, "RiglConfig: evry: no such setting; did you mean every?"),
        (SparsifierConfig, {"step": 10}, "SparsifierConfig: step: no such setting; did you mean steps or "),
        (SparsifierConfig, {"steps": 1, "colour": 2}, "SparsifierConfig: colour: no such setting; one of: steps, "),
        (
            SparsifierConfig,
            {"steps": 1, "teacher": {"enabld": True}},
            "SparsifierConfig: teacher.enabld: no such setting; did you mean enabled?",
        ),
        (
            SparsifierConfig,
            {"steps": 1, "topology": {"rule": "set", "evry": 2}},
            "SparsifierConfig: topology.evry: no such setting; did you mean every?",
        ),
        (
            SparsifierConfig,
            {"steps": 1, "topology": {"rule": "generations", "strategy": {"fitnes": "none"}}},
            "SparsifierConfig: topology.strategy.fitnes: no such setting; did you mean fitness?",
        ),
        (
            SparsifierConfig,
            {"steps": 1, "rules": {"*": {"rule": "rigl", "evry": 2}}},
            "SparsifierConfig: rules.*.evry: no such setting; did you mean every?",
        ),
        (
            DataConfig,
            {"sources": [{"source": "a.txt"}, {"sorce": "b.txt"}]},
            "DataConfig: sources[1].sorce: no such setting; did you mean source?",
        ),
        (SparsifierConfig, {}, "SparsifierConfig: steps: must be given"),
        (SparsifierConfig, {"steps": 0}, "SparsifierConfig: steps: must be at least 1, not 0"),
        (SparsifierConfig, {"steps": "ten"}, "SparsifierConfig: steps: must be a whole number, not 'ten'"),
        (SparsifierConfig, {"steps": 1, "topology": {"rule": "rigli"}}, "SparsifierConfig: topology: no rule 'rigli'"),
        (SparsifierConfig, {"steps": 1, "fan_in": (2, 3)}, "SparsifierConfig: fan_in: must be the least and the most"),
        (ModelConfig, {"width": float("nan")}, "ModelConfig: width: must be a whole number, not nan"),
        (TeacherConfig, {"beta": 2.0}, "TeacherConfig: beta: must be "),
        (GenerationsConfig, {"strategy": {"genes": 5}}, "GenerationsConfig: strategy.genes: must be a section"),
    ],
)
def test_what_is_wrong_is_one_line(section: type[Section], settings: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as caught:
        section(**settings)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"steps": 1, "teacher": {"enabld": True}}, {"step": 1}])
def test_whoever_validates_gets_all_that_is_wrong(settings: dict[str, Any]) -> None:
    """Sections in others too, which says where they lie."""
    with pytest.raises(ValidationError):
        SparsifierConfig.model_validate(settings)


def test_a_section_is_made_copied_and_read_as_ever() -> None:
    made = SparsifierConfig(steps=9, topology=RiglConfig(every=3), teacher=TeacherConfig(beta=0.9))
    assert made == SparsifierConfig.model_validate(made.model_dump()) == copy.deepcopy(made)
    assert pickle.loads(pickle.dumps(made)) == made
    assert made.model_fields_set == {"steps", "topology", "teacher"}
