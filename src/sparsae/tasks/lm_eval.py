"""A run as a model of lm-evaluation-harness, called `sparsae`: its sparse weights, multiplied by the run's own kernels.

    python -m sparsae.tasks.lm_eval run --model sparsae --model_args path=RUN --tasks blimp

is lm-eval's own command line, with the model registered: lm-eval knows the models of its own list, and those of modules
that were imported before it begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sparsae.evaluate.loading import load_run
from sparsae.train.model import choose_device


@register_model("sparsae")
class SparsaeLM(HFLM):
    """What lm-eval's `hf` does with a model of transformers, with the model and the tokenizer of a run.

    path: the run. teacher: its average in the place of the student. best: its best checkpoint, not its newest.
    device: auto, cpu or cuda; None, or cuda where there is none: as the run has it.
    other: what `hf` takes beside a model, such as add_bos_token.

    Raises InputError as `load_run` does.
    """

    def __init__(
        self,
        path: str | Path,
        teacher: bool = False,
        best: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        **other: Any,
    ) -> None:
        loaded = load_run(Path(path), teacher, best)
        model: Any = loaded.model
        # lm-eval's command line names cuda:0 where its user names nothing; `hf` too stays on the CPU without one.
        if device is not None and not (device.startswith("cuda") and not torch.cuda.is_available()):
            model.to(choose_device(device, "device"))
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=loaded.tokenizer.to_transformers(),
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length or loaded.config.model.context,
            **other,
        )
        self.step = loaded.step

    def get_model_info(self) -> dict[str, Any]:
        """What results say of the model; `hf` asks the Hub, which knows nothing of a run."""
        return {"model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters())}


def main() -> None:
    """lm-eval's command line, by `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
