"""What was made sparse, what was not and why: the choice of layers, and the report of it."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
)

from sparsae import AdamW, InputError, SparseLinear, Sparsifier, SparsifierConfig, densify, sparsify, summary
from sparsae.core.heads import HeadLayout
from sparsae.nn.linear import sparse_layers
from sparsae.nn.summary import Summary
from sparsae.rules import RiglConfig
from tests.support.shapes import (
    Block,
    Held,
    Inside,
    LitGPT,
    ResNet,
    Stacked,
    Switch,
    Timm,
    XTransformer,
    falcon,
    gpt2,
    mixtral,
    vgg,
)

BERT = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=3
)
# (a model, the linear layers of it that stay dense as heads, and as routers)
HEADS: dict[str, tuple[Any, set[str], set[str]]] = {
    "resnet": (ResNet, {"fc"}, set()),
    "vgg": (vgg, {"classifier.2"}, set()),
    "held": (lambda: Held(ResNet()), {"model.fc"}, set()),
    "held bert": (lambda: Held(BertForSequenceClassification(BERT)), {"model.classifier"}, set()),
    "block": (lambda: nn.Sequential(Block(), Block()), set(), set()),
    "litgpt": (LitGPT, {"lm_head"}, {"transformer.h.0.gate", "transformer.h.1.gate"}),
    "switch": (Switch, set(), {"router.classifier"}),
    "x-transformers": (XTransformer, {"to_logits"}, set()),
    "timm": (Timm, {"out_a", "out_b"}, set()),
    "bert": (lambda: BertForSequenceClassification(BERT), {"classifier"}, set()),
    "vocabulary": (lambda: nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(96, 64)), {"2"}, set()),
    "a chain": (lambda: nn.Sequential(nn.Linear(32, 96), nn.Linear(96, 32)), set(), set()),
    "positions": (
        lambda: nn.Sequential(nn.Embedding(64, 32), nn.Embedding(32, 32), nn.Linear(32, 96), nn.Linear(96, 32)),
        set(),
        set(),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_routers_stay_dense(name: str) -> None:
    make, heads, routers = HEADS[name]
    model = sparsify(make(), 0.5)
    report = summary(model)
    assert {row.name for row in report.dense if row.reason == "output head"} == heads
    assert {row.name for row in report.dense if row.reason == "router of experts"} == routers
    linear = {name for name, m in make().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(sparse_layers(model)) == linear - heads - routers
    assert not any(isinstance(model.get_submodule(name), SparseLinear) for name in heads | routers)
    asked = sparsify(make(), 0.5, sparsify_head=True)
    assert set(sparse_layers(asked)) == linear - routers


def test_a_head_inside_somebodys_own_module_stays_dense() -> None:
    model = Inside()
    model.lm.config.tie_word_embeddings = False
    model.lm.lm_head.weight = nn.Parameter(model.lm.lm_head.weight.detach().clone())
    sparsify(model, 0.5)
    assert [row.name for row in summary(model).dense if row.reason == "output head"] == ["lm.lm_head"]


def counted(report: Summary, model: nn.Module) -> None:
    """The numbers of a report against those of the model."""
    layers = sparse_layers(model)
    sparse = sum(layer.in_features * layer.out_features for layer in layers.values())
    nnz = sum(layer.topology.nnz for layer in layers.values())
    values = {id(layer.values) for layer in layers.values()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in values)
    assert report.weights == sparse + dense
    assert report.nnz == nnz
    assert report.sparse_share == sparse / (sparse + dense)
    assert report.sparsity == pytest.approx((sparse - nnz) / (sparse + dense), abs=1e-12)
    assert sum(report.by_reason.values()) == dense
    assert [(row.name, row.shape, row.nnz) for row in report.sparse] == [
        (name, layer.shape, layer.topology.nnz) for name, layer in layers.items()
    ]


MODELS: dict[str, Any] = {
    "gpt2": gpt2,
    "mixtral": mixtral,
    "litgpt": LitGPT,
    "resnet": ResNet,
    "encoder": lambda: nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64), nn.Linear(32, 32)),
    "inside": Inside,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("then", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_numbers_are_those_of_the_model_as_it_is(name: str, then: Any) -> None:
    model = then(sparsify(MODELS[name](), 0.75))
    counted(summary(model), model)
    assert summary(model).asked == 0.75
    densify(model)
    counted(summary(model), model)
    assert summary(model).asked is None
    assert "could be sparse" in str(summary(model))
    counted(summary(MODELS[name]()), MODELS[name]())


def test_a_report_follows_a_topology_that_moves() -> None:
    model = sparsify(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), 0.75)
    model[1].requires_grad_(False)
    optimizer = AdamW(model.parameters())
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=40, topology=RiglConfig(every=2)))
    before = model[0].indices
    for _ in range(6):
        model(torch.randn(8, 32)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
    assert not torch.equal(model[0].indices, before)
    counted(summary(model), model)
    assert [row.remark for row in summary(model).sparse] == ["", "frozen, last layer"]


REASONS = {
    "transformer.wte": "embedding",
    "lm_head": "tied to the weight of transformer.wte",
    "transformer.h.0.attn.c_attn": "left out by the patterns",
    "transformer.h.0.ln_1": "norms and other vectors",
}


def test_every_dense_module_has_its_reason() -> None:
    report = summary(sparsify(gpt2(), 0.5, exclude=["*.h.0.attn.*"]))
    reasons = {row.name: row.reason for row in report.dense}
    assert {name: reasons[name] for name in REASONS} == REASONS
    mixed = nn.Sequential(
        nn.TransformerEncoderLayer(32, 4, 64),
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
        prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.5),
        nn.LazyLinear(32),
        nn.Linear(32, 32),
        nn.Linear(32, 32),
        prune.l1_unstructured(nn.Linear(32, 32), "bias", 0.5),
        torch.compile(nn.Linear(32, 32), backend="eager"),
        nn.Linear(32, 32).to(torch.float8_e4m3fn),
        nn.Linear(32, 32),
    )
    mixed[9].compile(backend="eager")
    mixed[4].forward = lambda x: x  # type: ignore[method-assign]
    reasons = {row.name: row.reason for row in summary(sparsify(mixed, 0.5)).dense}
    assert reasons["0.linear1"] == "read directly by nn.TransformerEncoderLayer"
    assert reasons["0.self_attn.out_proj"] == "read directly by nn.MultiheadAttention"
    assert reasons["0.self_attn"] == "a weight of MultiheadAttention, which is no nn.Linear"
    assert "parametrized" in reasons["1"]
    assert "pruning" in reasons["2"]
    assert "LazyLinear" in reasons["3"]
    assert "forward was replaced" in reasons["4"]
    assert "pruning" in reasons["6"]
    assert reasons["7"] == reasons["9"] == reasons["4"]
    assert "float8_e4m3fn" in reasons["8"]
    assert list(sparse_layers(mixed)) == ["5"]
    reasons = {row.name: row.reason for row in summary(sparsify(nn.Sequential(Stacked()), 0.5)).dense}
    assert reasons["0"] == "stacked weights of Stacked, which is no nn.Linear"


def test_weights_that_a_model_writes_to_stay_dense() -> None:
    """RWKV divides some of its weights when it is evaluated, and multiplies them when it is trained again."""
    for every, dense in ((6, 4), (0, 0)):
        config = RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, context_length=16, rescale_every=every)
        model = sparsify(RwkvForCausalLM(config), 0.5)
        reasons = [row.reason for row in summary(model).dense]
        assert sum("rescaled in evaluation by RwkvModel" in reason for reason in reasons) == dense
        assert len(sparse_layers(model)) == 14 - dense
        with torch.no_grad():
            model.eval()(torch.arange(8)[None])
        model.train()(torch.arange(8)[None]).logits.sum().backward()


def test_a_part_that_was_made_sparse_keeps_its_reasons() -> None:
    model = Inside()
    sparsify(model.lm, 0.5, include=["*.mlp.*"])
    reasons = {row.name: row.reason for row in summary(model).dense}
    assert reasons["lm.transformer.h.1.attn.c_attn"] == "left out by the patterns"
    assert reasons["value"] == "not chosen: it could be sparse"
    densify(model)
    assert "left out" not in str(summary(model))


def test_the_table() -> None:
    assert str(summary(sparsify(gpt2(), 0.5, seed=3))) == TABLE.strip()


TABLE = """
sparse layer                 count  shape   unit  density    nnz
transformer.h.*.attn.c_attn      2  96x32   1x1   0.5      3,072
transformer.h.*.attn.c_proj      2  32x32   1x1   0.75     1,536
transformer.h.*.mlp.c_fc         2  128x32  1x1   0.4688   3,840
transformer.h.*.mlp.c_proj       2  32x128  1x1   0.4688   3,840

stays dense because                    weights  where
embedding                                2,112  transformer.wte, transformer.wpe
norms and other vectors                    896  transformer.h.*.ln_1, transformer.h.*.attn.c_attn, ...
tied to the weight of transformer.wte        0  lm_head

27,584 weights, 89.10% of them in sparse layers; sparsity of all weights 0.4455; 0.5 was asked of the layers made sparse
"""


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: nn.Sequential(nn.Conv1d(32, 64, 3), nn.Linear(32, 32)), "convolution"),
        (Stacked, "stacked weights of Stacked"),
        (lambda: nn.Sequential(nn.MultiheadAttention(32, 4), nn.Linear(32, 32)), "a weight of MultiheadAttention"),
        (lambda: gpt2(5000), "embedding"),
    ],
    ids=["convolution", "stacked", "attention", "vocabulary"],
)
def test_a_model_that_is_far_less_sparse_than_asked_is_told(
    make: Any, culprit: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = sparsify(make(), 0.9)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("sparsae.nn")]
    assert message.startswith(f"0.9 sparsity was asked for, and {summary(model).sparsity:.4g} is what all weights")
    assert culprit in message
    assert "\n" not in message


def test_what_somebody_left_out_is_no_surprise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    sparsify(gpt2(), 0.9)
    sparsify(gpt2(), 0.9, include=["*.h.0.mlp.c_fc", "*.h.0.mlp.c_proj"])
    sparsify(gpt2(5000), 0.0)
    assert not [record for record in caplog.records if record.name.startswith("sparsae.nn")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"include": ["*.mlp.*", "*.attnn.*"]},
            r"no layer to sparsify matches '\*\.attnn\.\*' of include: ",
        ),
        (
            {"include": ["*.mlp.*", "*.wte"]},
            r"matches '\*\.wte' of .*: names are such as transformer\.h\.0",
        ),
        ({"exclude": ["head*"]}, r"no layer matches 'head\*' of exclude: names are such as"),
        ({"exclude": ["transformer.h.0"]}, r"'transformer\.h\.0\.\*' names what is inside"),
        (
            {"heads": {"transformer.h.0.attn": HeadLayout("out", 8)}},
            r"heads: 'transformer\.h\.0\.attn' is no sparse layer",
        ),
        ({"head_min_density": 0.1}, "needs heads"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_by_name(arguments: Any, message: str) -> None:
    model = gpt2()
    with pytest.raises(InputError, match=message):
        sparsify(model, 0.5, **arguments)
    assert not sparse_layers(model)


def test_a_pattern_may_name_what_stays_dense_anyway() -> None:
    model = sparsify(gpt2(), 0.5, exclude=["lm_head", "*.wte", "*ln_*"])
    assert len(sparse_layers(model)) == 8


def test_a_model_that_cannot_be_sparse_says_why() -> None:
    for make, why in (
        (falcon, r"4 a subclass of nn\.Linear with a forward of its own \(FalconLinear\)"),
        (lambda: nn.TransformerEncoderLayer(32, 4, 64), "2 read directly by nn.TransformerEncoderLayer"),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 3)), "1 convolution$"),
        (lambda: nn.LSTM(4, 4), "1 a weight of LSTM, which is no nn.Linear$"),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 3), nn.LayerNorm(3)), "1 convolution; 1 norms and other vectors$"),
        (nn.Identity, "the model has no parameters$"),
        (lambda: sparsify(gpt2(), 0.5), r"8 sparse already \(densify\(model\) first\); 1 tied"),
    ):
        with pytest.raises(InputError, match=f"no layer to sparsify: {why}"):
            sparsify(make(), 0.5)
    with pytest.raises(InputError, match="8 left out by the patterns"):
        sparsify(gpt2(), 0.5, exclude=["transformer.h.*"])


def test_a_model_in_use_is_summed_up_while_wrapped() -> None:
    model = torch.compile(sparsify(gpt2(), 0.5), backend="eager")
    counted(summary(model), model)
    assert summary(model).asked == 0.5

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert summary(Half()).weights == summary(Half()).sparsity == 0
