"""AdamW that counts steps per weight where connections are dropped and grown.

A connection that was regrown has zero moments. Under the layer's old step count its bias correction would be that of a
long average, and its first update (1 - beta1) / sqrt(1 - beta2) of a fresh start's: 3.2 times too large at (0.9,
0.999). With a step of its own it starts as a weight of a new model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsae.core.shards import local, whole
from sparsae.errors import InputError
from sparsae.kernels.availability import absence
from sparsae.kernels.fused.torch_adamw import update_by_parameter
from sparsae.nn.arguments import require_arguments
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.parameterization import Parameterization, Scale

STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter

# Weights that are updated at once, but for a parameter with more: on a GPU, and on a CPU, whose cache holds them.
_TOGETHER, _CACHED = 2**24, 2**15


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019).

    A group with `per_weight_step=True` keeps `state["step"]` as an int32 tensor of the parameter's shape; elsewhere
    it is a float32 scalar. Other state: "exp_avg", "exp_avg_sq". Parameters without a gradient are left alone. The
    learning rate is a number or, for those who change it in place, a tensor with one element.

    Such a group may have a "ramp", in steps (a Sparsifier sets it by its rule): a grown weight then learns at
    min(1, age / ramp) of the rate, its age being the steps that it has made; its weight decay stays. Where the first
    weights shall not ramp, state["total"] counts the parameter's steps: they are as old as it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        per_weight_step: bool = False,
    ) -> None:
        """Raises ValueError for settings outside their ranges, and for complex parameters."""
        _require_number("lr", lr, lambda value: value >= 0, "of at least 0")
        _require_number("eps", eps, lambda value: value > 0, "above 0")
        _require_number("weight_decay", weight_decay, lambda value: value >= 0, "of at least 0")
        if not hasattr(betas, "__len__") or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, such as (0.9, 0.999), not {betas!r}")
        for beta in betas:
            _require_number("betas", beta, lambda value: 0 <= value < 1, "from 0 to below 1")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "per_weight_step": per_weight_step},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step_together([self])
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises ValueError for complex parameters."""
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            del self.param_groups[-1]
            raise ValueError("sparsae.AdamW takes real parameters: give it torch.view_as_real of complex ones")

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        state, per_weight = self.state[p], group["per_weight_step"]
        if not state:
            state["step"] = (
                torch.zeros_like(p, dtype=torch.int32)
                if per_weight
                else torch.zeros((), dtype=torch.float32, device="cpu")
            )
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        if not per_weight or not group.get("ramp") or group.get("ramp_first"):
            state.pop("total", None)  # it is counted while it is wanted
        elif "total" not in state:
            oldest = float(whole(state["step"]).max()) if p.numel() else 0.0
            state["total"] = torch.full((), oldest, dtype=torch.float32, device="cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but nothing is shared with `state_dict`, and a step per weight goes to its parameter's device.

        torch keeps the tensors that it is given where their dtype and device fit, and leaves every "step" where it is.
        The state of a `torch.optim.AdamW` fits too: groups keep the settings that it does not know, and where they
        count per weight each weight takes over the common step. Raises InputError for a state of torch's that this
        class would read otherwise: of `amsgrad`, `maximize`, or Adam's coupled weight decay.
        """
        state_dict = state_dict | {"param_groups": [_readable(group) for group in state_dict["param_groups"]]}
        if len(state_dict["param_groups"]) == len(self.param_groups):
            pairs = zip(self.param_groups, state_dict["param_groups"], strict=True)
            state_dict["param_groups"] = [{**own, **given} for own, given in pairs]
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        per_weight = {id(p) for group in self.param_groups if group["per_weight_step"] for p in group["params"]}
        for place, p in zip(places, parameters, strict=True):
            given, state = state_dict["state"].get(place, {}), self.state.get(p, {})
            for key, value in given.items():
                if key == "step" and value.dim():
                    state[key] = value.detach().to(p.device, copy=True)
                elif key == "step" and id(p) in per_weight:
                    state[key] = torch.full_like(p, float(value), dtype=torch.int32)
                elif state[key] is value:
                    state[key] = value.detach().clone()


@torch.no_grad()
def step_together(optimizers: Iterable[AdamW]) -> None:
    """Each optimizer's step without its hooks.

    What is elementwise with equal settings is one launch on a GPU, whichever optimizer it is of.
    """
    kinds: dict[_Kind, list[_Own]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kind, rate, decay = _Kind.of(group), float(group["lr"]), group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    optimizer._prepare(p, group)
                    kinds.setdefault(kind, []).append(_Own(p, optimizer.state[p], rate, decay))
    for kind, own in kinds.items():
        for together in _batches(own):
            _update(kind, together)


def _require_number(name: str, value: Any, fits: Callable[[Any], Any], what: str) -> None:
    """Raises ValueError for no number, or one that does not fit; a tensor with one element counts as one."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: a tensor in its place has one element")
    if isinstance(value, bool | str) or not hasattr(value, "__float__") or not fits(value):
        raise ValueError(f"{name} must be a number {what}, not {value!r}")


class _Kind(NamedTuple):
    """What decides how a parameter is updated, but for its rates."""

    betas: tuple[float, float]
    eps: float
    per_weight: bool
    ramp: int
    ramp_first: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> _Kind:
        ramp = group.get("ramp") or 0 if group["per_weight_step"] else 0
        first = bool(ramp and group.get("ramp_first"))
        return cls(tuple(group["betas"]), group["eps"], group["per_weight_step"], ramp, first)


class _Own(NamedTuple):
    """A parameter with its optimizer's state and its group's rates."""

    p: Tensor
    state: dict[str, Any]
    lr: float
    weight_decay: float


def _update(kind: _Kind, own: Sequence[_Own]) -> None:
    """theta <- theta - lr wd theta - lr m^ / (sqrt(v^) + eps), m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t)."""
    beta1, beta2 = kind.betas
    # All of it is elementwise: of what is sharded over ranks each moves its part.
    grads = [local(each.p.grad) for each in own if each.p.grad is not None]
    steps, averages, squares = ([local(each.state[key]) for each in own] for key in STATE)
    parameters = [local(each.p) for each in own]
    if _fits_one_launch(kind, [*parameters, *grads, *averages, *squares], steps):
        _in_one_launch(kind, own, parameters, grads, averages, squares, steps)
        return
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(averages, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    if any(each.weight_decay for each in own):
        torch._foreach_mul_(parameters, [1 - each.lr * each.weight_decay for each in own])
    if not kind.per_weight:
        denominators = list(torch._foreach_sqrt(squares))
        counts = [float(step) for step in steps]
        torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in counts])
        torch._foreach_add_(denominators, kind.eps)
        rates = [-each.lr / (1 - beta1**t) for each, t in zip(own, counts, strict=True)]
        torch._foreach_addcdiv_(parameters, averages, denominators, rates)
        return
    ages = [step.to(p.dtype) for p, step in zip(parameters, steps, strict=True)]
    shares = _shares_of_rate(kind, own, ages)
    denominators = list(torch._foreach_div(squares, _bias_corrections(ages, beta2)))
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, kind.eps)
    torch._foreach_mul_(denominators, _bias_corrections(ages, beta1, last=True))
    if shares:
        torch._foreach_div_(denominators, shares)
    torch._foreach_addcdiv_(parameters, averages, denominators, [-each.lr for each in own])


def _fits_one_launch(kind: _Kind, tensors: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Whether a GPU's fused kernels can update them: float32, each in one piece, as are steps by weight, of int32."""
    if not all(t.is_cuda and t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        return False
    return not kind.per_weight or not (absence() or any(s.dtype != torch.int32 or not s.is_contiguous() for s in steps))


def _in_one_launch(
    kind: _Kind,
    own: Sequence[_Own],
    parameters: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
) -> None:
    """The same: by a kernel of ours where steps are counted by weight, elsewhere by torch's."""
    if kind.per_weight:
        from sparsae.kernels.fused.adamw import update_by_weight

        is_ramped = kind.ramp > 0 and not kind.ramp_first
        for each in own if is_ramped else ():
            each.state["total"] += 1
        update_by_weight(
            *(parameters, grads, averages, squares, steps),
            rates=[each.lr for each in own],
            decays=[1 - each.lr * each.weight_decay for each in own],
            totals=[float(each.state["total"]) if is_ramped else -1.0 for each in own],
            betas=kind.betas,
            eps=kind.eps,
            ramp=kind.ramp,
        )
        return
    counts = [float(step) for step in steps]
    torch._foreach_add_(steps, 1)
    rates = [(each.lr, each.weight_decay) for each in own]
    update_by_parameter(parameters, grads, averages, squares, counts, rates, kind.betas, kind.eps)


def _shares_of_rate(kind: _Kind, own: Sequence[_Own], ages: list[Tensor]) -> list[Tensor]:
    """min(1, age / ramp) of each weight of each parameter; none where all learn at the whole rate."""
    if not kind.ramp:
        return []
    shares = list(torch._foreach_div(ages, kind.ramp))
    torch._foreach_clamp_max_(shares, 1.0)
    for each, age, share in zip(own, ages, shares, strict=True):
        if kind.ramp_first:
            continue
        each.state["total"] += 1
        if (total := float(each.state["total"])) < kind.ramp:
            share.masked_fill_(age == total, 1.0)  # the first weights
    return shares


def _readable(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group; InputError where torch's optimizer does with its state what this one does not."""
    coupled = group.get("weight_decay") and not group.get("decoupled_weight_decay", True)
    other = [key for key in ("amsgrad", "maximize") if group.get(key)] + ["Adam's weight decay"] * bool(coupled)
    if other:
        raise InputError(f"this optimizer state is of an AdamW with {other[0]}, which sparsae.AdamW does not have")
    return group


def _batches(own: Sequence[_Own]) -> list[list[_Own]]:
    """What is updated together: many small parameters.

    A launch takes longer than a small one's arithmetic; temporaries are twice as large as what is updated.
    """
    batches: list[list[_Own]] = []
    room = 0
    for each in own:
        p = each.p
        if not batches or p.numel() > room or p.device != batches[-1][0].p.device:
            batches.append([])
            room = _CACHED if p.device.type == "cpu" else _TOGETHER
        batches[-1].append(each)
        room -= p.numel()
    return batches


def ramp_share(age: Tensor, steps: int) -> Tensor:
    """min(1, age / steps): the share of its learning rate at which a connection learns in the step number `age`."""
    return (age / steps).clamp_(max=1.0)


def _bias_corrections(ages: list[Tensor], beta: float, *, last: bool = False) -> list[Tensor]:
    """1 - beta^t for steps t >= 1 of any shape, by expm1: the plain difference loses float32 digits near beta = 1.

    last: in place of the ages, which nobody wants any more.
    """
    rate = math.log(beta) if beta else -math.inf
    corrections = ages if last else list(torch._foreach_mul(ages, rate))
    if last:
        torch._foreach_mul_(corrections, rate)
    torch._foreach_expm1_(corrections)
    torch._foreach_neg_(corrections)
    return corrections


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> Tensor:
    """The norm of all gradients together, which are then scaled to have at most `largest` (None: they stay)."""
    learning = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(learning, largest, norm)
    return norm


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    parameterization: Parameterization | None = None,
    *,
    lr: float | Tensor | None = None,
    eps: float = 1e-8,
    sparse_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for `AdamW`: sparse values (decayed, steps per weight), matrices (decayed), vectors (not decayed).

    Under a parameterization each of the three is divided by the scales of its parameters. Its groups have their own
    "lr", "eps" and "weight_decay", which every optimizer of the Adam family understands, and as "lr_scale" the factor
    in their learning rate: a schedule sets `group["lr"] = rate * group["lr_scale"]`. Where scales follow the density,
    each sparse layer is a group. sparse_factor: on the learning rate of sparse values, beside their scales; a weight
    decay that is independent of rates stays.

    Raises ValueError for a parameterization without `lr` and a wrong weight decay, InputError for what is no model, and
    for a role that matches no module.
    """
    require_arguments(model=model)
    _require_number("weight_decay", weight_decay, lambda value: value >= 0, "of at least 0")
    sparse = {id(layer.values) for layer in sparse_layers(model).values()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    values = [p for p in parameters if id(p) in sparse]
    matrices = [p for p in parameters if id(p) not in sparse and p.dim() >= 2]
    vectors = [p for p in parameters if id(p) not in sparse and p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": values, "weight_decay": weight_decay, "per_weight_step": True},
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if parameterization is None:
        return groups
    if lr is None:
        raise ValueError("a parameterization scales the learning rate: give lr")
    scales = {id(p): parameterization.scale(role, d) for _, p, role, d in parameterization.parameters(model)}
    scaled = []
    for group in groups:
        divided: dict[Any, list[nn.Parameter]] = {}
        for p in group["params"]:
            scale, alone = scales[id(p)], parameterization.dynamic and id(p) in sparse
            divided.setdefault(id(p) if alone else (scale.rate, scale.epsilon, scale.decay), []).append(p)
        for together in divided.values():
            scale = scales[id(together[0])]
            # A tensor is scaled in place: each group has its own.
            rate = lr.clone() if isinstance(lr, Tensor) else lr
            own = {"params": together, "lr": rate, "lr_scale": 1.0, "eps": eps * scale.epsilon}
            factor = sparse_factor if id(together[0]) in sparse else 1.0
            is_independent = parameterization.config.weight_decay == "independent"
            decay = group["weight_decay"] / (factor if is_independent else 1.0)
            scaled.append(group | own | {"base_weight_decay": decay, "rate_factor": factor})
            _rescale(scaled[-1], scale)
    return scaled


def follow_density(
    optimizer: torch.optim.Optimizer, layers: Mapping[str, SparseLinear], parameterization: Parameterization
) -> None:
    """Give the group of each sparse layer the scale of the density that the layer has.

    Its learning rate changes in proportion. Raises InputError where a layer has no group of its own that
    `parameter_groups` made.
    """
    groups = {id(group["params"][0]): group for group in optimizer.param_groups}
    for name, layer in layers.items():
        group = groups.get(id(layer.values), {})
        if "lr_scale" not in group or len(group["params"]) > 1:
            raise InputError(
                f"the optimizer has no group for {name} alone: build it from parameter_groups with the parameterization"
            )
        _rescale(group, parameterization.scale(parameterization.role(name), layer.topology.density))


def _rescale(group: dict[str, Any], scale: Scale) -> None:
    lr_scale = scale.rate * group["rate_factor"]
    group["lr"] *= lr_scale / group["lr_scale"]
    group["lr_scale"] = lr_scale
    group["weight_decay"] = group["base_weight_decay"] * scale.decay
