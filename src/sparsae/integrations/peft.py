"""peft's LoRA over sparse layers: `get_peft_model(model, over_sparse(LoraConfig(...)))`.

The base is frozen by peft, so its connections stay; what trains is the adapter, of low rank and dense.
"""

from __future__ import annotations

from typing import Any, final

from peft import LoraConfig
from peft.tuners import lora

from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear


def over_sparse(config: LoraConfig) -> LoraConfig:
    """The configuration, which then also adapts sparse layers; returns it."""
    config._register_custom_module({SparseLinear: SparseLora})
    return config


@final
class SparseLora(lora.Linear):
    """y = sparse(x) + scale * B A x."""

    def __init__(self, base_layer: Any, *arguments: Any, **settings: Any) -> None:
        """Raises InputError for a sparse layer that is no linear one."""
        layer = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
        if not layer.kind.is_linear:
            raise InputError(
                f"LoRA: a sparse {type(layer.kind).__name__} is no linear layer: leave it out of the targets"
            )
        super().__init__(base_layer, *arguments, **settings)

    def update_layer(self, adapter_name: str, *arguments: Any, **settings: Any) -> None:
        """Raises InputError for DoRA where an output has no connection."""
        super().update_layer(adapter_name, *arguments, **settings)
        layer = self.get_base_layer()
        if self.use_dora.get(adapter_name) and isinstance(layer, SparseLinear):
            lone = layer.out_features - layer.topology.rows.unique().numel() * layer.unit[0]
            if lone:
                raise InputError(
                    f"DoRA divides by the norm of each output's weights, and {lone} outputs of a layer of "
                    f"{layer.out_features} have no connection: use LoRA (use_dora=False), or sparsify so that each has "
                    "one (fan_in)"
                )

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        # peft's own takes a sparse layer's after a warning that it does not know the layer.
        return module.in_features, module.out_features

    def merge(self, *arguments: Any, **settings: Any) -> None:
        """Raises InputError while the base is sparse: the sum with a product of low rank is not."""
        if isinstance(self.get_base_layer(), SparseLinear):
            raise InputError(
                "LoRA: a merged sparse layer would be dense: keep the adapter beside it (save_pretrained), or call "
                "sparsae.densify(model) before merging"
            )
        super().merge(*arguments, **settings)
