"""What Sparsae knows of an architecture: one file each, of facts alone.

A family is a causal language model of `transformers`: a stack of blocks, each with norms, attention and an MLP. What a
`Family` says of the names, the shapes and the habits of its modules is all that the rest of the package knows; nothing
here imports torch, so that a wrong setting is named at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from sparsae.errors import InputError
from sparsae.registry import Names

if TYPE_CHECKING:
    from sparsae.config.schema import ModelConfig

DEFAULT = "gpt2"  # the family of a model that names none

# Settings of a model that every family takes; the others are those of `Family.settings`.
_EVERYWHERE = frozenset({"family", "vocab_size", "tie_embeddings", "transformers"})


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts about one architecture. Names of modules are relative to the module around them.

    title: its name for people. model_type: its name in transformers.
    settings: names of its configuration in transformers, and the settings of `model` that they take; a setting that
    is not among them is refused. constants: further names of its configuration, and their values.

    blocks, final_norm, head, positions: in the model, the list of blocks, the norm after them, the output head, and
    the learned embedding of positions (None: they are rotary). attention, mlp, norms: in a block.
    projections: in the attention, the layers of queries, keys and values, or one that gives all three in this order;
    output: the one after it. head_norms: the norms of a head's queries and keys, if it has any.
    up, gate, down, activation: in the MLP; without a gate, it is down(activation(up(x))). mlp_class: its class.
    mlp_ratio, mlp_multiple: its hidden width where none is set, in terms of the model's, and what that is rounded to.
    divides_width: whether the heads have to divide the width though they have a size of their own.
    biases: whether layers and norms have biases. small_residuals: whether transformers starts the projections into
    the residual stream smaller than other layers.

    model_class: the class whose pass is as these facts say, x + attention(norm(x)) and then x + mlp(norm(x)), so that
    decoding may do it; None: only its own forward is used. plain: what its configuration must say for that.
    """

    title: str
    model_type: str
    settings: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)

    blocks: str
    final_norm: str
    head: str = "lm_head"
    positions: str | None = None

    attention: str
    projections: tuple[str] | tuple[str, str, str]
    output: str
    head_norms: tuple[str, str] | None = None

    mlp: str
    mlp_class: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    mlp_ratio: Fraction
    mlp_multiple: int = 1

    norms: tuple[str, ...]
    divides_width: bool = False
    biases: bool = False
    small_residuals: bool = False

    model_class: str | None = None
    plain: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, model: ModelConfig) -> None:
        """Raises ValueError for settings that a model of this family cannot have."""
        has = _EVERYWHERE.union(self.settings.values())
        for name, setting in type(model).model_fields.items():
            if name not in has and getattr(model, name) != setting.default:
                default = "null" if setting.default is None else setting.default
                raise ValueError(f"family {model.family} has no {name}: it must be {default}")
        if self.divides_width and model.width % model.heads:
            raise ValueError(f"width {model.width} is not a multiple of heads {model.heads}")
        if self.positions is None and self.head_size(model) % 2:
            size = f"width {model.width} / heads {model.heads}" if model.head_size is None else "head_size"
            raise ValueError(f"{size} must be even for rotary positions, not {self.head_size(model)}")

    def configuration(self, model: ModelConfig) -> dict[str, object]:
        """The settings of a model, but for those that every family takes, as its configuration in transformers."""
        values = model.model_dump() | {
            "mlp_width": self.mlp_width(model),
            "kv_heads": self.kv_heads(model),
            "head_size": self.head_size(model),
        }
        return {**self.constants, **{theirs: values[ours] for theirs, ours in self.settings.items()}}

    def head_size(self, model: ModelConfig) -> int:
        """Features of an attention head."""
        return model.head_size or model.width // model.heads

    def kv_heads(self, model: ModelConfig) -> int:
        """Heads of keys and values in a block."""
        return model.kv_heads or model.heads

    def mlp_width(self, model: ModelConfig) -> int:
        """Hidden width of the MLP."""
        unit = self.mlp_multiple
        return model.mlp_width or unit * max(1, round(self.mlp_ratio * model.width / unit))

    def linear_shapes(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers inside the blocks, by their names in the model."""
        width, hidden = model.width, self.mlp_width(model)
        queries, keys = self.head_size(model) * model.heads, self.head_size(model) * self.kv_heads(model)
        outputs = (queries + 2 * keys,) if len(self.projections) == 1 else (queries, keys, keys)
        attention = {name: (rows, width) for name, rows in zip(self.projections, outputs, strict=True)}
        attention[self.output] = (width, queries)
        mlp = {name: (hidden, width) for name in (self.gate, self.up) if name is not None}
        mlp[self.down] = (width, hidden)
        block = {f"{self.attention}.{name}": shape for name, shape in attention.items()}
        block |= {f"{self.mlp}.{name}": shape for name, shape in mlp.items()}
        return {f"{self.blocks}.{i}.{name}": shape for i in range(model.layers) for name, shape in block.items()}

    def other_parameters(self, model: ModelConfig, vocabulary: int) -> int:
        """How many parameters embeddings, norms and biases have."""
        embeddings = (vocabulary + (0 if self.positions is None else model.context)) * model.width
        norms = model.width * (len(self.norms) * model.layers + 1)
        norms += 0 if self.head_norms is None else len(self.head_norms) * self.head_size(model) * model.layers
        biases = sum(rows for rows, _ in self.linear_shapes(model).values()) + norms if self.biases else 0
        return embeddings + norms + biases

    @property
    def decoder_class(self) -> str | None:
        """The class below `model_class`, as transformers names it: the model without its head."""
        if self.model_class is None:
            return None
        return self.model_class.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Model"

    @property
    def mlp_layers(self) -> tuple[str, ...]:
        """The layers of the MLP: up, down and, if there is one, the gate."""
        return (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)

    @property
    def densities(self) -> dict[str, str]:
        """Where the layers of each role are that a density can be given by: globs over their names."""
        attention, mlp = f"*.{self.attention}.", f"*.{self.mlp}."
        single = () if len(self.projections) == 1 else zip(("query", "key", "value"), self.projections, strict=True)
        gate = {} if self.gate is None else {"gate": mlp + self.gate}
        return {
            "attention": attention + "*",
            **{role: attention + name for role, name in single},
            "output": attention + self.output,
            "mlp": mlp + "*",
            **gate,
            "up": mlp + self.up,
            "down": mlp + self.down,
            "head": self.head,
        }

    @property
    def heads(self) -> dict[str, Literal["out", "in"]]:
        """The layers that attention heads divide, as globs over their names, and the side that they divide."""
        sides: dict[str, Literal["out", "in"]] = {f"*.{self.attention}.{name}": "out" for name in self.projections}
        return {**sides, f"*.{self.attention}.{self.output}": "in"}

    def parameter_roles(self, standard: bool) -> dict[str, Literal["residual", "final_norm", "head"]]:
        """Roles of modules in a parameterization, by globs; `standard`: in the one that transformers has."""
        roles: dict[str, Literal["residual", "final_norm", "head"]] = {}
        if self.small_residuals or not standard:
            roles |= {f"*.{self.output}": "residual", f"*.{self.down}": "residual"}
        return {**roles, self.final_norm: "final_norm", self.head: "head"}


class _Families(Names[Family]):
    def register(self, name: str, family: Family) -> Family:
        """Give a family a name: `model.family`. Raises InputError for a name that another one has."""
        self._require_free(name)
        if not isinstance(family, Family):
            raise InputError(f"family '{name}' must be a Family, not {family!r}")
        if self._known(name) not in (None, family):  # the same, where a module is loaded anew
            raise InputError(f"family '{name}' is registered already, by {self.origin(name)}: take another name")
        self._entries[name] = family
        return family

    def of(self, model: object) -> Family | None:
        """The family of a model of transformers, of those that this program has loaded; None: of none."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        return next((family for family in self.loaded() if family.model_type == model_type), None)


FAMILIES = _Families("family", "sparsae.families")
