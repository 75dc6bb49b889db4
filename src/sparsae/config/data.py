"""Settings of the text that a model reads."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.effect import Idle
from sparsae.config.section import Count, Positive, Section, Text

STDLIB = "stdlib"


class SourceConfig(Section):
    """One of several texts."""

    source: Text = Field(description="as data.source")
    weight: Positive = Field(default=1.0, description="its part of the training sequences, in terms of the others'")
    text_field: Text | None = Field(default=None, description="as data.text_field; null: that one")


class DataConfig(Section):
    """The text, the tokenizer and where their prepared form is kept."""

    source: Text = Field(
        default=STDLIB,
        description="stdlib (Python's own source), path or glob of .txt/.py/.md/.jsonl[.xz|.gz|.zst]/.parquet, "
        "hf:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]",
    )
    sources: list[SourceConfig] = Field(
        default=[],
        description="several texts in place of source, by weight: [{source: a.jsonl, weight: 3}, {source: hf:NAME}]",
    )
    validation_source: Text | None = Field(default=None, description="validation text; null: a share of source")
    validation_share: Annotated[
        float,
        Field(gt=0.0, lt=1.0),
        Idle(lambda data, _: data.validation_source is not None, "the held-out text is data.validation_source"),
    ] = Field(
        default=0.02,
        description="share of the text held out when validation_source is null: whole documents, the ends of long ones",
    )
    text_field: Text = Field(default="text", description="field of a JSON, parquet or hf row that holds the text")
    max_documents: Count | None = Field(default=None, description="read only so many documents; null: all")
    tokenizer: Text = Field(
        default="train", description="train (byte-level BPE on the text), a tokenizer.json, or a directory"
    )
    tokenizer_vocab: Annotated[
        int, Field(ge=257, le=2**22), Idle(lambda data, _: data.tokenizer != "train", "data.tokenizer names one")
    ] = Field(default=4096, description="entries of a tokenizer trained here")
    cache: Text | None = Field(
        default=None, description="where prepared data is kept; null: $SPARSAE_CACHE or ~/.cache/sparsae"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        names = [each.source for each in self.sources]
        if names and self.source != STDLIB:
            what = f"source {self.source} is given beside sources: put it there, with its weight"
            raise SettingError(what, "source", "sources")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise SettingError(f"sources has {twice} twice: give it once, with the sum of the weights", "sources")
        return self

    @property
    def training_field(self) -> str:
        """The field of the text to train on, of one source alone; the held-out text's is `text_field`."""
        own = self.sources[0].text_field if len(self.sources) == 1 else None
        return own or self.text_field

    @property
    def texts(self) -> tuple[SourceConfig, ...]:
        """What there is to train on; one text alone has the weight 1."""
        return tuple(self.sources) or (SourceConfig(source=self.source, text_field=self.text_field),)
