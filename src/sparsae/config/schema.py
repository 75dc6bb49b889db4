"""Every setting of a run, with its default, its range and one line of explanation.

One class a section; the larger ones have files of their own. The hyper-parameters of the method carry the symbols of
the method page (docs/method.md). Nothing here imports torch, so that a wrong key is named in well under a second. The
defaults are those of the preset `demo` with the method `sparsae`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, PrivateAttr, field_validator, model_validator

from sparsae.config.complaints import Given, SettingError
from sparsae.config.data import DataConfig
from sparsae.config.density import Density, by_pattern
from sparsae.config.effect import Idle, where_dense
from sparsae.config.parameterization import ParameterizationConfig
from sparsae.config.rules import AnyRule, default_rule
from sparsae.config.schedule import ScheduleConfig
from sparsae.config.section import LARGEST, TOLERANCE, Count, Section, Share, ShareOfMean, Text
from sparsae.config.teacher import TeacherConfig
from sparsae.config.training import TrainingConfig
from sparsae.config.unit import Quota, Unit, parsed_unit, unit_name
from sparsae.errors import InputError
from sparsae.families import DEFAULT, FAMILIES
from sparsae.registry import method_named

MOST_GENERATED = 100_000  # tokens of one text: it is shown when the last one is there


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


class SparsityConfig(Section):
    """How many connections exist, and where the first ones lie."""

    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.9, description="share of the sparsified layers' weights that do not exist; 0: a dense model"
    )
    budget: Literal["uniform", "er", "erk"] = Field(
        default="erk", description="how density spreads over layers (er: Erdos-Renyi, erk: with kernel sizes)"
    )
    unit: Unit = Field(
        default=(1, 1),
        description="rows and columns of a unit: [1, 1] single weights, [4, 4] blocks; or N:M such as 2:4, single "
        "weights of which N of every M consecutive inputs exist, which gives the sparsity",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _follows_from_a_quota(cls, data: Any) -> Any:
        """Sparsity and budget, where the unit is N:M: every layer has the density N / M."""
        try:
            quota = parsed_unit(data["unit"])[1]
        except (ValueError, KeyError, TypeError):
            return data
        return data if quota is None else {"sparsity": quota.sparsity, "budget": "uniform", **data}

    @model_validator(mode="after")
    def _quota_stands_alone(self) -> Self:
        quota = self.quota
        if quota is None or self.sparsity == 0.0:
            return self
        if abs(self.sparsity - quota.sparsity) > TOLERANCE:
            what = f"unit {quota} has sparsity {quota.sparsity:.6g}, not {self.sparsity:g}: set that, or leave it out"
            raise SettingError(what, "sparsity", "unit")
        others = {
            "budget": self.budget != "uniform",
            "min_density": self.min_density is not None,
            "max_density": self.max_density is not None,
            "head_min_density": self.head_min_density > 0,
            "fan_in": self.fan_in is not None,
            "fan_out": self.fan_out is not None,
            "density": bool(self.density),
            "schedule.kind": self.schedule.kind != "constant",
        }
        for name, is_given in others.items():
            if is_given:
                what = f"unit {quota} fixes the density of every neuron of every layer: leave {name} out"
                raise SettingError(what, name, "unit")
        return self

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
    def block(self) -> tuple[int, int]:
        """Rows and columns of a unit; single weights are 1 x 1."""
        return parsed_unit(self.unit)[0]

    @property
    def quota(self) -> Quota | None:
        """How many weights exist of so many in a row, where the unit says it."""
        return parsed_unit(self.unit)[1]

    @property
    def unit_name(self) -> str:
        """What people call the unit: 1x1, 4x4, 2:4."""
        return unit_name(self.block, self.quota)

    @property
    def density_bounds(self) -> tuple[float, float]:
        """(k_min, k_max) as densities, defaults filled in."""
        density = 1.0 - self.sparsity
        low = density / 4 if self.min_density is None else self.min_density
        high = min(1.0, 4 * density) if self.max_density is None else self.max_density
        return low, high


class TrackingConfig(Section):
    """Trackers beside metrics.jsonl; each needs its extra installed."""

    project: Annotated[
        Text,
        Idle(lambda own, _: not (own.trackio or own.wandb or own.observers), "no tracker is on that has projects"),
    ] = Field(default="sparsae", description="project name given to the trackers")
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
    sparsity: Annotated[SparsityConfig, where_dense(but=("sparsity",))] = SparsityConfig()
    topology: Annotated[AnyRule, where_dense(but=("rule",))] = Field(default_factory=default_rule)
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
    _given: Given = PrivateAttr(default_factory=Given)

    @property
    def given(self) -> Given:
        """Where these settings were given; known of those that `resolve` has put together."""
        return self._given

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
        if end and self.sparsity.quota is not None:
            what = f"rule {self.topology.rule} prunes, and every model of unit {self.sparsity.quota} has one density"
            raise SettingError(f"{what}: choose another rule", "topology.rule", "sparsity.unit")
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
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.training.batch_size * self.training.accumulation * self.model.context

    @property
    def initial_sparsity(self) -> float:
        """Sparsity of the untrained model: that of the whole run, but where the rule prunes or density has a bump."""
        start, schedule = self.topology.first_sparsity, self.sparsity.schedule
        if schedule.kind == "bump":
            return max(0.0, 1.0 - schedule.first_factor * (1.0 - self.sparsity.sparsity))
        return self.sparsity.sparsity if start is None else start
