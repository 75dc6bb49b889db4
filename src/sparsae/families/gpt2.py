"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, one layer for queries, keys and values, GELU."""

from fractions import Fraction

from sparsae.families import FAMILIES, Family

FAMILIES.register(
    "gpt2",
    Family(
        title="GPT-2",
        model_type="gpt2",
        settings={
            "n_positions": "context",
            "n_embd": "width",
            "n_layer": "layers",
            "n_head": "heads",
            "n_inner": "mlp_width",
            "resid_pdrop": "dropout",
            "embd_pdrop": "dropout",
            "attn_pdrop": "dropout",
        },
        # Its own "gelu_new" is the same function in eight passes over memory instead of one.
        constants={"activation_function": "gelu_pytorch_tanh"},
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        positions="transformer.wpe",
        attention="attn",
        projections=("c_attn",),
        output="c_proj",
        mlp="mlp",
        mlp_class="GPT2MLP",
        up="c_fc",
        down="c_proj",
        activation="act",
        mlp_ratio=Fraction(4),
        norms=("ln_1", "ln_2"),
        biases=True,
        small_residuals=True,
        model_class="GPT2LMHeadModel",
        plain={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
    ),
)
