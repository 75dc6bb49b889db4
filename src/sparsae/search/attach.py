"""The calls of a Sparsifier, made by the optimizer's own step hooks.

A hook runs where the optimizer steps: after gradients were clipped, and only in a step that is really made. A gradient
scaler skips the call of `optimizer.step()` where a gradient is not finite; a fused optimizer it calls, and the kernel
does the skipping, so that is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsae.errors import InputError
from sparsae.optimizer_state import parts_of


class StepHooks:
    """Calls `before` and `after` around every step that the optimizer makes from now on.

    `before` gets the gradient scaler's factor that is still in the gradients (None: there is none), and that of
    `scaler`, if it is given, which was in the loss.

    Of an optimizer that wraps others the outermost with hooks is listened to. Where a class's `step` calls that of the
    class that it inherits from, torch runs hooks at both; the first before and the first after count.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[Tensor | None, float | None], None],
        after: Callable[[], object],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Raises InputError for an optimizer without hooks."""
        part = next((part for part in parts_of(optimizer) if _runs_hooks(part)), None)
        if part is None:
            raise InputError(
                f"{type(optimizer).__name__} does not run the step hooks of torch.optim.Optimizer: call before_step() "
                "and after_step() around its step yourself"
            )
        self._before, self._after, self._scaler = before, after, scaler
        self._nested = sum(_is_hooked(vars(kind).get("step")) for kind in type(part).__mro__) > 1
        self._began = self._is_inside = self._is_over = False
        # In a compiled step they stay what they are, between its graphs.
        pre, post = torch.compiler.disable(self._pre), torch.compiler.disable(self._post)
        self._handles = [part.register_step_pre_hook(pre), part.register_step_post_hook(post)]

    def forget(self) -> None:
        """A step that began and was not finished, since it raised, is not waited for."""
        self._began = False

    def remove(self) -> None:
        """Listen no more."""
        self._is_over = True
        if not self._is_inside:  # torch calls the hooks just then
            for handle in self._handles:
                handle.remove()

    def _pre(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if self._is_over or (found_inf is not None and bool(found_inf)):
            return None
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._closed(args[1], scale), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._closed(kwargs["closure"], scale)}
        self._begin(scale)
        return None

    def _begin(self, scale: Tensor | None) -> None:
        # One that began before, and is none of a class further down, raised.
        if not (self._began and self._nested):
            self._before(scale, None if self._scaler is None else self._scaler.get_scale())
            self._began = True

    def _post(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._began and not self._is_over:
            self._began, self._is_inside = False, True
            try:
                self._after()
            finally:
                self._is_inside = False

    def _closed(self, closure: Callable[[], Any], scale: Tensor | None) -> Callable[[], Any]:
        """A closure runs the backward pass inside the step."""

        def closed() -> Any:
            loss = closure()
            self._begin(scale)
            return loss

        return closed


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Whether it was made by torch's constructor, or does as that does: wrappers often are not."""
    return _is_hooked(type(optimizer).step) and "_optimizer_step_pre_hooks" in vars(optimizer)


def _is_hooked(step: object) -> bool:
    return bool(getattr(step, "hooked", False))
