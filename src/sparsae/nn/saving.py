"""What transformers' `save_pretrained` does with sparse layers, said before it does it.

It writes `values` and `indices`, for which `from_pretrained` builds dense layers that it fills at random. A model is
told apart by an attribute of its own: nothing of transformers is changed, and copies and pickles have theirs.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn

from sparsae.nn.linear import sparse_layers

log = logging.getLogger(__name__)

_METHOD = "save_pretrained"


class SavePretrained:
    """Stands before a model's `save_pretrained`."""

    def __init__(self, model: nn.Module) -> None:
        # Weakly, or a model would live until the garbage collector comes.
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Warn where there are sparse layers, and save as the model's class does."""
        model = self._model()
        assert model is not None
        if count := len(sparse_layers(model)):
            log.warning(
                "save_pretrained: from_pretrained will fill these %d sparse layers with RANDOM weights. For one that "
                "loads, save densify(copy.deepcopy(model)) instead (of a run: sparsae export); to continue training, "
                "keep model.state_dict() by torch.save and load it after sparsify",
                count,
            )
        return getattr(type(model), _METHOD)(model, *args, **kwargs)

    def __reduce__(self) -> tuple[type[SavePretrained], tuple[nn.Module | None]]:
        # A copy, and what is read back from a pickle, belongs to the copy of the model.
        return type(self), (self._model(),)


def tell_when_saving(model: nn.Module) -> None:
    """Let every model of transformers inside `model` that has sparse layers say what saving does."""
    for module in model.modules():
        if callable(getattr(type(module), _METHOD, None)) and _METHOD not in vars(module) and sparse_layers(module):
            vars(module)[_METHOD] = SavePretrained(module)


def save_as_before(model: nn.Module) -> None:
    """Undo `tell_when_saving`."""
    for module in model.modules():
        if isinstance(vars(module).get(_METHOD), SavePretrained):
            del vars(module)[_METHOD]
