"""Every setting of a run, with its default, its range and one line of explanation.

One class a section; the hyper-parameters of the method carry the symbols of the method page (docs/method.md). Nothing
here imports torch, so that a wrong key is named in well under a second. The defaults are those of the preset `demo`
with the method `sparsae`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from sparsae.config.complaints import SettingError
from sparsae.config.density import Density, by_pattern
from sparsae.config.effect import Idle
from sparsae.config.parameterization import ParameterizationConfig
from sparsae.config.rules import AnyRule, default_rule
from sparsae.config.schedule import ScheduleConfig
from sparsae.config.section import LARGEST, Count, Counts, NonNegative, Positive, Section, Share, ShareOfMean, Text
from sparsae.errors import InputError
from sparsae.families import DEFAULT, FAMILIES
from sparsae.registry import method_named

DECAY = 0.2  # share of a run over which wsd falls
LAST_RATE = 0.1
STDLIB = "stdlib"
MOST_GENERATED = 100_000  # tokens of one text: it is shown when the last one is there
TOLERANCE = 1e-9  # 1 - 0.9 is not 0.1 in floating point: densities this close are the same


_NO_SPARSE = "a dense model has no sparse layers"


def _is_dense(config: Config) -> bool:
    return not config.sparsity.sparsity


def _known_family(name: str) -> str:
    try:
        _ = FAMILIES[name]
    except InputError as error:
        raise ValueError(str(error)) from None
    return name


class ModelConfig(Section):
    """The architecture, built by `transformers` with new weights. A family refuses what it does not have."""

    family: Annotated[str, AfterValidator(_known_family)] = Field(
        default=DEFAULT, description=f"architecture: {', '.join(FAMILIES.own_names())}, or one of your own"
    )
    layers: Annotated[int, Field(ge=1, le=1_000)] = Field(default=4, description="transformer blocks")
    heads: Count = Field(default=4, description="attention heads a block")
    kv_heads: Count | None = Field(default=None, description="key and value heads a block; null: as many as heads")
    head_size: Count | None = Field(default=None, description="features of an attention head; null: width / heads")
    width: Count = Field(default=256, description="model width d")
    mlp_width: Count | None = Field(default=None, description="hidden width of the MLP; null: the family's share of d")
    context: Annotated[int, Field(ge=2, le=LARGEST)] = Field(default=256, description="longest sequence, in tokens")
    vocab_size: Count | None = Field(default=None, description="entries of the embedding; null: the tokenizer's")
    tie_embeddings: bool = Field(default=True, description="the output head shares the embedding's weights")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.0, description="dropout probability")
    transformers: dict[Text, JsonValue] = Field(
        default={}, description="further entries of the configuration in transformers, such as {rms_norm_eps: 1e-5}"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_size is None and self.width % self.heads:
            raise SettingError(f"width {self.width} is not a multiple of heads {self.heads}", "heads", "width")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            what = f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"
            raise SettingError(what, "kv_heads", "heads")
        return self

    @model_validator(mode="after")
    def _family_has_it(self) -> Self:
        FAMILIES[self.family].refuse(self)
        return self


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
    tokenizer_vocab: Annotated[int, Field(ge=257, le=2**22)] = Field(
        default=4096, description="entries of a tokenizer trained here"
    )
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
    def texts(self) -> tuple[SourceConfig, ...]:
        """What there is to train on; one text alone has the weight 1."""
        return tuple(self.sources) or (SourceConfig(source=self.source, text_field=self.text_field),)


class SparsityConfig(Section):
    """How many connections exist, and where the first ones lie."""

    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.9, description="share of the sparsified layers' weights that do not exist; 0: a dense model"
    )
    budget: Literal["uniform", "er", "erk"] = Field(
        default="erk", description="how density spreads over layers (er: Erdos-Renyi, erk: with kernel sizes)"
    )
    unit: Counts = Field(default=(1, 1), description="rows and columns of a unit: [1, 1] single weights, [4, 4] blocks")
    min_density: Share | None = Field(
        default=None, description="k_min: no layer below this density; null: a quarter of the model's"
    )
    max_density: Share | None = Field(
        default=None, description="k_max: no layer above this density; null: 4 times the model's, at most 1"
    )
    head_min_density: Share = Field(
        default=0.0, description="no attention head's slice below this density; 0: no floor"
    )
    fan_in: ShareOfMean | None = Field(
        default=None,
        description="least and most connections into a neuron, in terms of its layer's mean: [0.25, 4], or [1, 1]: all "
        "have as many; null: no bounds",
    )
    fan_out: ShareOfMean | None = Field(
        default=None, description="least and most connections out of an input, in terms of its layer's mean; null: none"
    )
    density: Density = Field(
        default={},
        description="factors on the budget's densities, at the same total, by name (glob), role (attention, mlp, head, "
        "query, key, value, output, up, gate, down) or depth: {mlp: 0.8, depth: [1.5, 1.0, 0.5]}",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    include: list[Text] = Field(
        default=[], description="names (globs) of layers to sparsify; empty: every linear layer"
    )
    exclude: list[Text] = Field(default=[], description="names (globs) of layers to leave dense")
    sparsify_head: bool = Field(default=False, description="sparsify the output head too (only where it is not tied)")
    backend: Text = Field(default="auto", description="kernels: auto, or a backend by name (reference, cpu)")

    @model_validator(mode="after")
    def _bounds_hold(self) -> Self:
        low, high = self.density_bounds
        density = 1.0 - self.sparsity
        if not low - TOLERANCE <= density <= high + TOLERANCE:
            raise SettingError(
                f"bounds [{low:g}, {high:g}] cannot hold density {density:g}: "
                "min_density must be at most, max_density at least it",
                "max_density" if high < density else "min_density",
                "sparsity",
            )
        if self.head_min_density > density + TOLERANCE:
            raise SettingError(
                f"head_min_density {self.head_min_density:g} must be at most the model's density {density:g}",
                "head_min_density",
                "sparsity",
            )
        return self

    @model_validator(mode="after")
    def _schedule_has_room(self) -> Self:
        kind, first = self.schedule.kind, self.schedule.first_factor * (1.0 - self.sparsity)
        if kind != "constant" and self.sparsity == 0.0:
            raise SettingError(
                f"schedule.kind {kind} moves density around that of a sparse model: sparsity must not be 0",
                "schedule.kind",
                "sparsity",
            )
        if first > 1.0 + TOLERANCE:
            raise SettingError(
                f"schedule.factor {self.schedule.first_factor:g} times density {1.0 - self.sparsity:g} is more than a "
                f"dense model: it must be at most {1.0 / (1.0 - self.sparsity):g}",
                "schedule.factor",
                "sparsity",
            )
        return self

    @property
    def density_bounds(self) -> tuple[float, float]:
        """(k_min, k_max) as densities, defaults filled in."""
        density = 1.0 - self.sparsity
        low = density / 4 if self.min_density is None else self.min_density
        high = min(1.0, 4 * density) if self.max_density is None else self.max_density
        return low, high


class TeacherConfig(Section):
    """Self-distillation from an average of the student: loss = CE + alpha KL(teacher || student)."""

    enabled: bool = Field(default=True, description="keep a teacher and learn from it")
    alpha: NonNegative = Field(default=0.1, description="weight of the KL term")
    beta: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.999, description="decay of the average, a step")
    storage: Literal["union", "masked", "dense"] = Field(
        default="masked",
        description="what the teacher remembers: dropped weights as they fade, only active ones, or everything",
    )
    tolerance: Annotated[
        NonNegative,
        Idle(lambda teacher, _: teacher.storage != "union", "only a union teacher has dropped weights that fade"),
    ] = Field(default=1e-8, description="a dropped weight leaves a union teacher once its magnitude is below this")
    warmup: Literal["fraction", "validation"] = Field(
        default="fraction",
        description="no KL until a share of the steps has passed, or until validation improves past a threshold",
    )
    warmup_fraction: Annotated[
        Share, Idle(lambda teacher, _: teacher.warmup != "fraction", "teacher.warmup is validation")
    ] = Field(default=0.25, description="share of the steps without KL (fraction)")
    warmup_improvement: Annotated[
        Positive, Idle(lambda teacher, _: teacher.warmup != "validation", "teacher.warmup is fraction")
    ] = Field(default=0.5, description="nats under the untrained validation loss that end the warm-up (validation)")
    ramp: bool = Field(
        default=True, description="let the decay grow with the teacher's steps t: min(beta, (1 + t) / (10 + t))"
    )
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        description="share of the steps before the teacher, which begins there as a copy of the student; no KL before",
    )
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="share of the sequences that are taught; the teacher reads no others"
    )
    every: Count = Field(default=1, description="taught at every n-th step only")
    grown: Literal["zero", "student"] = Field(
        default="zero",
        description="a connection that the student grows begins in the teacher at 0 or what a union teacher remembers "
        "(zero), or at the student's value with a ramp of its own (student)",
    )

    @model_validator(mode="after")
    def _dense_forgets_nothing(self) -> Self:
        if self.grown == "student" and self.storage == "dense":
            what = "grown 'student' is for a union or masked teacher: a dense one keeps every position"
            raise SettingError(what, "grown", "storage")
        return self


class TrainingConfig(Section):
    """The loop."""

    steps: Count = Field(default=250, description="optimizer steps")
    batch_size: Count = Field(default=8, description="sequences in one forward pass")
    accumulation: Count = Field(default=1, description="forward passes an optimizer step")
    learning_rate: Positive = Field(default=2e-3, description="peak learning rate")
    sparse_learning_rate: Annotated[Positive | None, Idle(lambda _, config: _is_dense(config), _NO_SPARSE)] = Field(
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
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the arithmetic, by autocast; parameters stay float32"
    )
    device: Text = Field(default="auto", description="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    threads: Count | None = Field(default=None, description="CPU threads; null: torch's choice")
    compile: bool = Field(default=False, description="run the model through torch.compile")
    loss_chunk: Count = Field(default=1024, description="tokens whose logits exist at a time")
    validate_every: Count | None = Field(
        default=None, description="steps between validations; null: a tenth of the run, at least 10"
    )
    validation_sequences: Count = Field(default=64, description="held-out sequences a validation reads")
    test_sequences: Count | None = Field(
        default=None,
        description="other held-out sequences, which only the end of a run reads; null: twice validation_sequences",
    )
    log_every: Count = Field(default=10, description="steps between rows of metrics.jsonl and of the progress display")
    checkpoint_every: Count | None = Field(default=None, description="steps between checkpoints; null: by time only")
    checkpoint_minutes: Positive | None = Field(
        default=5.0, description="minutes between checkpoints; null: by steps, at the end and when stopped only"
    )
    keep_checkpoints: Count = Field(default=1, description="checkpoints kept, newest first")

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


class TrackingConfig(Section):
    """Trackers beside metrics.jsonl; each needs its extra installed."""

    project: Text = Field(default="sparsae", description="project name given to the trackers")
    tensorboard: bool = Field(default=False, description="write TensorBoard events into the run directory")
    trackio: bool = Field(default=False, description="log to trackio")
    wandb: bool = Field(default=False, description="log to Weights & Biases (WANDB_MODE=offline works)")
    observers: list[Text] = Field(
        default=[], description="observers of your own by name, which see every row of the run"
    )
    sample_prompt: Text | None = Field(
        default=None, description="prompt of the sample in the report; null: the start of a held-out text"
    )
    sample_tokens: Annotated[int, Field(ge=1, le=MOST_GENERATED)] = Field(
        default=120, description="tokens of the sample in the report"
    )

    @property
    def named(self) -> tuple[str, ...]:
        """The observers of a run, each once."""
        own = {"tensorboard": self.tensorboard, "trackio": self.trackio, "wandb": self.wandb}
        return tuple(dict.fromkeys([*(name for name, wanted in own.items() if wanted), *self.observers]))


class Config(Section):
    """A whole run."""

    preset: str = Field(default="demo", description="the model and run that these settings started from")
    method: str = Field(default="sparsae", description="the named method that topology and teacher started from")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="fixes everything that is random")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sparsity: Annotated[SparsityConfig, Idle(lambda config, _: _is_dense(config), _NO_SPARSE, but=("sparsity",))] = (
        SparsityConfig()
    )
    topology: Annotated[AnyRule, Idle(lambda config, _: _is_dense(config), _NO_SPARSE, but=("rule",))] = Field(
        default_factory=default_rule
    )
    rules: dict[Text, AnyRule] = Field(
        default={}, description="rules beside topology's, each for the layers whose names match its pattern (a glob)"
    )
    teacher: Annotated[
        TeacherConfig,
        Idle(
            lambda config, _: not config.teacher.enabled, "there is no teacher: set teacher.enabled", but=("enabled",)
        ),
    ] = TeacherConfig(enabled=False)
    parameterization: ParameterizationConfig = ParameterizationConfig()
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("method")
    @classmethod
    def _method_has_hyphens(cls, method: str) -> str:
        return method_named(method)

    @model_validator(mode="after")
    def _head_is_free(self) -> Self:
        if self.sparsity.sparsify_head and self.model.tie_embeddings:
            what = "sparsity.sparsify_head needs a head of its own: set model.tie_embeddings to false"
            raise SettingError(what, "sparsity.sparsify_head", "model.tie_embeddings")
        return self

    @model_validator(mode="after")
    def _pruning_prunes(self) -> Self:
        start, end = self.topology.first_sparsity, self.sparsity.sparsity
        if start is None:
            return self
        if self.sparsity.schedule.moves:
            raise SettingError(
                f"sparsity.schedule.kind {self.sparsity.schedule.kind} is for rules that keep the density: rule "
                f"{self.topology.rule} prunes by a schedule of its own",
                "sparsity.schedule.kind",
                "topology.rule",
            )
        if start >= end:
            what = f"topology.start_sparsity {start:g} must be less than sparsity.sparsity {end:g}"
            raise SettingError(what, "topology.start_sparsity", "sparsity.sparsity")
        return self

    @model_validator(mode="after")
    def _density_has_roles(self) -> Self:
        try:
            by_pattern(self.sparsity.density, self.model.family)
        except ValueError as error:
            raise SettingError(str(error), "sparsity.density", "model.family") from None
        return self

    @model_validator(mode="after")
    def _dense_is_dense(self) -> Self:
        if self.method == "dense" and self.sparsity.sparsity:
            raise SettingError(
                "method dense needs sparsity.sparsity 0; for a sparse model that keeps its topology: static",
                "sparsity.sparsity",
                "method",
            )
        return self

    @property
    def initial_sparsity(self) -> float:
        """Sparsity of the untrained model: that of the whole run, but where the rule prunes or density has a bump."""
        start, schedule = self.topology.first_sparsity, self.sparsity.schedule
        if schedule.kind == "bump":
            return max(0.0, 1.0 - schedule.first_factor * (1.0 - self.sparsity.sparsity))
        return self.sparsity.sparsity if start is None else start
