"""What transformers knows of the form: a quantization config and a quantizer in its registers, and how it saves.

Its plug has no part for saving that knows the directory, so the method of its models is taken into `keeping_sparse`.
"""

from __future__ import annotations

from typing import Any, final

from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsae.nn.stored import METHOD
from sparsae.nn.stored.loading import Stored, take_over_topologies
from sparsae.nn.stored.saving import keeping_sparse

PreTrainedModel.save_pretrained = keeping_sparse(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]


@register_quantization_config(METHOD)
@final
class SparsaeConfig(QuantizationConfigMixin):
    """The table of `config.json`, as it was read."""

    def __init__(self, **table: Any) -> None:
        self.quant_method: Any = METHOD
        self.table = table


@register_quantizer(METHOD)
@final
class SparsaeQuantizer(HfQuantizer):
    """Makes room for sparse layers before weights are loaded, and leaves nothing of itself on the model."""

    def update_attn_implementation(self, config: Any) -> Any:
        """The first call that gets the model's configuration: from here on the usual files are looked for."""
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    # The same call, before transformers 5.20.
    update_tp_plan = update_attn_implementation

    def preprocess_model(self, model: Any, dtype: Any = None, checkpoint_files: Any = None, **_: Any) -> None:
        table: SparsaeConfig = self.quantization_config  # type: ignore[assignment]
        stored = Stored(table.table)
        if checkpoint_files is not None:
            stored.require_files(checkpoint_files)
        stored.make_room(model)

    def postprocess_model(self, model: Any, **_: Any) -> None:
        # Trainers refuse what is marked as quantized; a dense copy is saved as if it had never been loaded from here.
        for owner, name in (
            (model, "hf_quantizer"),
            (model, "_weight_conversions"),
            (model.config, "quantization_config"),
        ):
            vars(owner).pop(name, None)
        take_over_topologies(model)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
