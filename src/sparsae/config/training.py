"""Settings of the loop."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.effect import where_dense
from sparsae.config.section import LARGEST, TOLERANCE, Count, NonNegative, Positive, Section, Share, Text

DECAY = 0.2  # share of a run over which wsd falls
LAST_RATE = 0.1


class TrainingConfig(Section):
    """The loop."""

    steps: Count = Field(default=250, description="optimizer steps")
    batch_size: Count = Field(default=8, description="sequences in one forward pass")
    accumulation: Count = Field(default=1, description="forward passes an optimizer step")
    learning_rate: Positive = Field(default=2e-3, description="peak learning rate")
    sparse_learning_rate: Annotated[Positive | None, where_dense()] = Field(
        default=None,
        description="peak learning rate of the sparse layers' values (dense models have none); null: learning_rate",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="the learning rate after the warm-up: falls all the way as a cosine or a line, stays, or "
        "(wsd: warm-up, stable, decay) stays and falls as a line at the end",
    )
    decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description=f"share of the steps over which the learning rate falls (wsd); null: {DECAY:g}"
    )
    final_learning_rate: Share = Field(
        default=LAST_RATE, description="last learning rate as a share of the peak (not constant, which stays)"
    )
    warmup: Share = Field(default=0.1, description="share of the steps over which the learning rate rises")
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.9, description="AdamW's first decay")
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.95, description="AdamW's second decay")
    epsilon: Positive = Field(default=1e-8, description="AdamW's epsilon")
    weight_decay: NonNegative = Field(
        default=0.1, description="decoupled weight decay of matrices and active connections"
    )
    clip: Positive | None = Field(default=1.0, description="largest gradient norm; null: no clipping")
    skip_limit: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        default=5,
        description="steps in a row that may be skipped, loss or gradient being not finite; one more ends the run",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the arithmetic, by autocast; parameters stay float32"
    )
    device: Text = Field(default="auto", description="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    threads: Count | None = Field(default=None, description="CPU threads; null: torch's choice")
    compile: bool = Field(default=False, description="run the model through torch.compile")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        default="default",
        description="torch.compile's: reduce-overhead records what it compiles as CUDA graphs, max-autotune also times "
        "its kernels first, by the clock (so that a repeated run may round otherwise)",
    )
    mlp_keeps: Annotated[Literal["nothing", "bfloat16", "float32"], where_dense()] = Field(
        default="nothing",
        description="of the hidden layer of sparse MLPs that are fused (on a CPU), from forward to backward: bfloat16 "
        "and float32 hold 2 and 4 bytes a token, layer and hidden feature, twice that where gated; nothing: it is "
        "computed again. Gradients are the same with nothing and float32, and rounded with bfloat16",
    )
    loss_chunk: Count = Field(default=1024, description="tokens whose logits exist at a time")
    validate_every: Count | None = Field(
        default=None, description="steps between validations; null: a tenth of the run, at least 10"
    )
    validation_sequences: Count = Field(default=64, description="held-out sequences a validation reads")
    test_sequences: Count | None = Field(
        default=None,
        description="other held-out sequences, which only the end of a run reads; null: twice validation_sequences",
    )
    peak_flops: Positive | None = Field(
        default=None,
        description="operations a second that a device could do at best, for the utilization in the metrics (mfu); "
        "null: as published for a known CUDA device in bfloat16",
    )
    log_every: Count = Field(default=10, description="steps between rows of metrics.jsonl and of the progress display")
    checkpoint_every: Count | None = Field(default=None, description="steps between checkpoints; null: by time only")
    checkpoint_minutes: Positive | None = Field(
        default=5.0, description="minutes between checkpoints; null: by steps, at the end and when stopped only"
    )
    keep_checkpoints: Count = Field(default=1, description="checkpoints kept, newest first")
    keep_best: bool = Field(
        default=False,
        description="save where a validation is better than all before (the untrained one left out), and keep the best",
    )
    checkpoint_async: bool = Field(
        default=False, description="write checkpoints beside training, from a copy of them in memory"
    )

    @property
    def tested_sequences(self) -> int:
        """How many sequences the test reads, if the held-out text has as many."""
        return 2 * self.validation_sequences if self.test_sequences is None else self.test_sequences

    @model_validator(mode="after")
    def _has_a_mode_of_what_is_compiled(self) -> Self:
        if self.compile_mode != "default" and not self.compile:
            raise SettingError(
                f"compile_mode {self.compile_mode} is for what is compiled: set compile to true, or leave it out",
                "compile_mode",
                "compile",
            )
        return self

    @model_validator(mode="after")
    def _falls_as_scheduled(self) -> Self:
        if self.decay is not None and self.schedule != "wsd":
            raise SettingError(f"decay is for schedule wsd, not {self.schedule}: leave it out", "decay", "schedule")
        if self.schedule == "wsd" and self.warmup + (self.decay or DECAY) > 1.0 + TOLERANCE:
            raise SettingError(
                f"warmup {self.warmup:g} and decay {self.decay or DECAY:g} together are more than the run: they must "
                "be at most 1",
                "warmup",
                "decay",
                "schedule",
            )
        if self.schedule == "constant" and self.final_learning_rate not in (LAST_RATE, 1.0):
            raise SettingError(
                f"final_learning_rate {self.final_learning_rate:g} is not for schedule constant, whose learning rate "
                "stays: leave it out",
                "final_learning_rate",
                "schedule",
            )
        return self
