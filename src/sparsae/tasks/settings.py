"""What is fine-tuned on which tasks, and how. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from sparsae.config.complaints import Keys, Origin, explain
from sparsae.config.section import Count, OrHowMany, Positive, Section, Text
from sparsae.errors import InputError
from sparsae.tasks.catalogue import TASKS, task_named

TopologyMode = Literal["frozen", "searched", "dense"]
MODES: tuple[TopologyMode, ...] = get_args(TopologyMode)
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class FinetuneConfig(Section):
    """Fine-tuning on tasks: every task with every topology and every seed."""

    names: list[str] = Field(min_length=1, description=f"of {', '.join(TASKS)}")
    data: Text = Field(description="a folder with a folder for each task, or hf:ORG/NAME; hf: alone: the suites' own")
    topology: list[TopologyMode] = Field(
        default=["frozen"],
        min_length=1,
        description="frozen: connections stay; searched: the rule goes on; dense: densified before (SPDF). "
        "A dense run knows dense alone",
    )
    seeds: Annotated[list[Seed], OrHowMany] = Field(
        default=[0, 1, 2], min_length=1, description="of the head and the order, or how many"
    )
    epochs: Count = Field(default=3, description="passes over the training examples")
    learning_rate: Positive = Field(default=1e-4, description="after a warm-up of a twentieth, linear to 0")
    batch_size: Count = Field(default=16, description="examples in a batch")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(default=0.01, description="as AdamW has it")
    max_examples: Count | None = Field(default=None, description="training examples at most; null: all")
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="tokens of an example at most; null: the model's context"
    )
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="of the arithmetic, by autocast; null: as the run was trained (training.precision)"
    )
    device: Text | None = Field(default=None, description="cpu, cuda; null: as the run has it")

    @field_validator("names")
    @classmethod
    def _names_are_known(cls, names: list[str]) -> list[str]:
        for name in names:
            try:
                task_named(name)
            except InputError as error:
                raise ValueError(str(error)) from None
        return names

    @field_validator("names", "topology", "seeds")
    @classmethod
    def _nothing_twice(cls, values: list[object]) -> list[object]:
        if len(set(values)) < len(values):
            raise ValueError("one is given twice")
        return values


def finetune_config(options: Mapping[str, object], names: Mapping[str, str]) -> FinetuneConfig:
    """Settings from the options that were given; `names` says which option gives a key. Raises InputError."""
    try:
        return FinetuneConfig.model_validate(options)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        origins: dict[Keys, Origin] = {(key,): _option(option) for key, option in names.items()}
        raise InputError(explain(error, error["loc"], origins)) from None


def _option(name: str) -> Origin:
    """An option that its own name says enough of, whatever the key is called that it gives."""
    return lambda _: name
