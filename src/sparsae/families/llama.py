"""Llama (Touvron et al., 2023): rotary positions, RMSNorm, SwiGLU, heads that may share keys and values."""

from fractions import Fraction

from sparsae.families import FAMILIES, Family

FAMILIES.register(
    "llama",
    Family(
        title="Llama",
        model_type="llama",
        settings={
            "max_position_embeddings": "context",
            "hidden_size": "width",
            "num_hidden_layers": "layers",
            "num_attention_heads": "heads",
            "num_key_value_heads": "kv_heads",
            "head_dim": "head_size",
            "intermediate_size": "mlp_width",
        },
        blocks="model.layers",
        final_norm="model.norm",
        attention="self_attn",
        projections=("q_proj", "k_proj", "v_proj"),
        output="o_proj",
        mlp="mlp",
        mlp_class="LlamaMLP",
        up="up_proj",
        gate="gate_proj",
        down="down_proj",
        activation="act_fn",
        mlp_ratio=Fraction(8, 3),
        mlp_multiple=64,
        divides_width=True,
        norms=("input_layernorm", "post_attention_layernorm"),
        model_class="LlamaForCausalLM",
    ),
)
