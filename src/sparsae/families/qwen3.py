"""Qwen3 (Yang et al., 2025): Llama with norms of queries and keys, and heads of a size of their own."""

from dataclasses import replace

from sparsae.families import FAMILIES

FAMILIES.register(
    "qwen3",
    replace(
        FAMILIES["llama"],
        title="Qwen3",
        divides_width=False,
        model_type="qwen3",
        head_norms=("q_norm", "k_norm"),
        mlp_class="Qwen3MLP",
        model_class="Qwen3ForCausalLM",
        plain={"use_sliding_window": False},
    ),
)
