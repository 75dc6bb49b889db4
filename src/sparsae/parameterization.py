"""Standard, maximal-update (µP) and sparse maximal-update (SµPar) parameterizations: every formula, in one place.

With m = width / base width and, under SµPar only, rho = a layer's density / base density, a hidden layer starts from
N(0, sigma^2 / (m rho)) and learns at eta / (m rho) (Dey, Bergsma & Hestness, 2024; with rho = 1 Yang & Hu et al.,
2022). Embeddings, norms and biases keep both. Embeddings have a multiplier, logits one of output_multiplier / m, and
the logits of attention 1 / d_head in place of 1 / sqrt(d_head).

No multiplier is ever computed. To AdamW, a parameter with a multiplier theta in front is the same as one without that
starts theta times as large, learns at theta times the rate with an epsilon of 1 / theta, and decays by the same share
in a step (the abc symmetry of Tensor Programs V). So the embeddings' multiplier lies in the embeddings and the logits'
in the head, or, where the head is tied to the embeddings, in the final norm before it; training, evaluation, decoding
and exported models know nothing of them. One thing is not symmetric: gradient clipping by the norm over all
parameters, in which a folded parameter's gradient counts 1 / theta times as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sparsae.config.parameterization import ParameterizationConfig
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.nn.arguments import require_arguments
from sparsae.nn.linear import SparseLinear
from sparsae.nn.names import modules_by_name

Role = Literal["embedding", "hidden", "residual", "vector", "final_norm", "head"]


@dataclass(frozen=True)
class Scale:
    """What a parameter's settings are multiplied by, its forward multiplier folded in.

    fan_in: what the initial variance is divided by before the multiplier. multiplier: of initial values. rate: of the
    learning rate. epsilon: of AdamW's. decay: of a weight decay that the optimizer multiplies by the scaled rate.
    """

    fan_in: float
    multiplier: float
    rate: float
    epsilon: float
    decay: float


@dataclass(frozen=True)
class Parameterization:
    """The parameterization of a model with a residual stream of `width` features and `blocks` transformer blocks.

    roles: of modules, by globs over their names: "residual" (projections into the residual stream), "head",
    "final_norm" (the norm before the head), "embedding" (without a glob: every `nn.Embedding`), "hidden" (without one:
    everything else that has a matrix). Norms and biases are "vector"s by themselves. tied: the head shares the
    embedding's weight. std: sigma, at the base width.

    Raises InputError for sizes that are none, for a role that does not exist, and for a tied head with multipliers and
    no "final_norm".
    """

    config: ParameterizationConfig
    width: int
    blocks: int
    roles: Mapping[str, Role] = field(default_factory=dict)
    tied: bool = False
    std: float = 0.02

    def __post_init__(self) -> None:
        for size in ("width", "blocks"):
            if not isinstance(value := getattr(self, size), Integral) or value < 1:
                raise InputError(f"{size}: must be a whole number of at least 1, not {value!r}")
        for glob, role in self.roles.items():
            if role not in get_args(Role):
                raise InputError(f"role '{role}' of {glob} does not exist: use one of {', '.join(get_args(Role))}")
        if self.tied and "final_norm" not in self.roles.values() and self.scale("final_norm").multiplier != 1.0:
            raise InputError("a tied head's multiplier lies in the norm before it: give that the role final_norm")

    @property
    def dynamic(self) -> bool:
        """Whether scales follow the live density."""
        return self.config.dynamic

    def role(self, name: str, module: nn.Module | None = None) -> Role:
        """The role of a module by its name, and by its type where no glob matches."""
        named = (role for glob, role in self.roles.items() if fnmatchcase(name, glob))
        return next(named, "embedding" if isinstance(module, nn.Embedding) else "hidden")

    def scale(self, role: Role, density: float | None = None) -> Scale:
        """The factors on a parameter of a layer of some density; None: of one that is as dense as at the base.

        Gradients shrink as 1 / m where the output is divided by m, whatever the density: with variances over m rho,
        rho takes as much from the number of terms as it adds to their squares. Epsilon goes with them. (Behind a
        sparse head, whose variance stays, they shrink as 1 / (m sqrt(rho)): that is left out.)
        """
        config, supar = self.config, self.config.name == "supar"
        m = 1.0 if config.name == "sp" else self.width / config.base_width
        rho = 1.0 if density is None or not supar else density / config.base_density
        # By what the variance makes up for the inputs that a layer does not have.
        active = rho if supar else (density or 1.0) if config.initial_fan_in == "active" else 1.0
        fan_in, multiplier, rate, gradient = 1.0, 1.0, 1.0, 1.0 / m
        if role in ("hidden", "residual"):
            fan_in, rate = m * active, 1.0 / (m * rho)
        elif role == "embedding":
            multiplier = config.embedding_multiplier
        elif role == "head":
            # Under SµPar its multiplier is over the inputs that it has, so its variance is not.
            fan_in = 1.0 if supar else active
            multiplier, gradient = config.output_multiplier / (m * rho), 1.0 / (m * rho)
        elif role == "final_norm" and self.tied:
            multiplier = config.output_multiplier / (m * config.embedding_multiplier)
        epsilon = (gradient if config.scale_epsilon else 1.0) / multiplier
        decay = (1.0 if config.weight_decay == "independent" else rate) / (multiplier * rate)
        return Scale(fan_in, multiplier, multiplier * rate, epsilon, decay)

    def initial_std(self, role: Role, density: float | None = None) -> float:
        """Standard deviation of the initial weights of an embedding, or of a layer of some density (see `scale`)."""
        scale = self.scale(role, density)
        std = self.std / math.sqrt(2 * self.blocks) if role == "residual" else self.std
        if role in ("hidden", "residual"):
            std *= self.config.hidden_scale
        return std / scale.fan_in**0.5 * scale.multiplier

    def attention_scale(self, head_size: int) -> float:
        """What the products of queries and keys are multiplied by."""
        return head_size**-0.5 if self.config.name == "sp" else 1.0 / head_size

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Role, float | None]]:
        """(name, parameter, role, density) of every parameter, each once however it is tied.

        What is dense in a sparse model is so at the base (None), and so is a dense head; the hidden layers of a dense
        model have a density of 1, which is more than the base's where that is sparse.

        Raises InputError for a glob that matches no module.
        """
        modules = modules_by_name(model)
        for glob in self.roles:
            if not any(fnmatchcase(name, glob) for name in modules):
                raise InputError(f"role {self.roles[glob]}: {glob} matches no module of this model")
        seen: set[int] = set()
        others = None if any(isinstance(module, SparseLinear) for module in modules.values()) else 1.0
        for module_name, module in modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    full = f"{module_name}.{name}" if module_name else name
                    yield full, parameter, *self._kind(module_name, module, parameter, others)

    def _kind(self, name: str, module: nn.Module, parameter: Tensor, others: float | None) -> tuple[Role, float | None]:
        role = self.role(name, module)
        if isinstance(module, SparseLinear) and parameter is module.values:
            return role, module.topology.density
        if parameter.dim() < 2 and role != "final_norm":
            return "vector", None
        return role, others if role in ("hidden", "residual") else None


@torch.no_grad()
def initialize(model: nn.Module, parameterization: Parameterization, seed: int) -> None:
    """Draw the initial weights of a model anew, in place: normal, a layer's active ones for its density.

    The final norm starts at its multiplier; other norms and biases stay. Each parameter has a generator of its own by
    (seed, name). Raises InputError for a glob of a role that matches no module, and for what is no model or none of its
    parameterization.
    """
    require_arguments(model=model, seed=seed)
    if not isinstance(parameterization, Parameterization):
        raise InputError(f"parameterization: must be a Parameterization, not {parameterization!r}")
    for name, parameter, role, density in parameterization.parameters(model):
        if role != "vector":
            parameter.copy_(initial_value(name, parameter.shape, role, density, parameterization, seed))


def initial_value(
    name: str, shape: torch.Size, role: Role, density: float | None, parameterization: Parameterization, seed: int
) -> Tensor:
    """The initial value of one parameter on the CPU; `name` is its full name."""
    if role in ("vector", "final_norm"):
        return torch.full(
            shape,
            0.0 if name.endswith("bias") else parameterization.scale(role).multiplier,
            dtype=torch.float32,
            device="cpu",
        )
    std = parameterization.initial_std(role, density)
    return torch.randn(shape, generator=generator(seed, "weights", name), dtype=torch.float32, device="cpu") * std
