"""The CUDA backend without a GPU: index structures and choices anywhere, kernels in Triton's interpreter.

`make test-triton` runs the kernels, against the reference in float64 on the same rounded inputs; and compiles them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.availability import interpreted
from sparsae.kernels.backend import Layout, Needs
from sparsae.kernels.cuda import thresholds
from sparsae.kernels.cuda.index import make_index, row_tiles, run_starts
from sparsae.kernels.reference import Reference
from sparsae.kernels.registry import BACKENDS, choose_backend
from sparsae.kernels.structures import multiplied
from sparsae.losses import _sums, language_model_loss
from sparsae.optim import AdamW
from tests.support.strategies import topologies

BACKEND, ORACLE = BACKENDS["cuda"], Reference()
BLOCKS = [(16, 16), (32, 32), (32, 16), (64, 64)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
in_interpreter = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not 1 (make test-triton)")
few = settings(max_examples=6)


def layout_of(topology: Topology) -> Layout:
    return Layout(topology.shape, topology.unit, topology.indices, BACKEND.derive(topology))


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of `dtype`, by the largest number."""
    assert got.shape == want.shape
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=TOLERANCE[dtype] * max(largest, 1e-3))


def test_it_refuses_what_it_cannot_do_and_is_not_chosen_on_a_cpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    if not interpreted():
        assert BACKEND.refusal((1, 1), cpu, torch.float32) == "it runs on CUDA, not on cpu"
    assert "float64" in str(BACKEND.refusal((1, 1), gpu, torch.float64))
    layout = Layout((4, 4), (1, 1), torch.arange(15, dtype=torch.int32))
    assert choose_backend("auto", layout, torch.float32).name != "cuda"


def test_without_triton_the_reference_computes_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsae.kernels.cuda import backend

    monkeypatch.setattr(backend, "absence", lambda: "Triton is not installed")
    assert BACKEND.refusal((1, 1), torch.device("cuda"), torch.float32) == "Triton is not installed"
    assert BACKEND.missing(torch.device("cuda")) == "Triton is not installed"
    assert BACKEND.missing(torch.device("cpu")) is None


@given(topologies([(1, 1), (16, 16), (4, 8)], most=40))
def test_index_structures_say_where_runs_and_rows_lie(topology: Topology) -> None:
    layout = Layout(topology.shape, topology.unit, topology.indices)
    index = make_index(layout)
    tiles, (_, columns) = row_tiles(layout), topology.grid
    assert index.starts.tolist() == run_starts(layout).tolist()
    assert index.starts.numel() == columns * tiles + 1
    for run in range(columns * tiles):
        inside = range(int(index.starts[run]), int(index.starts[run + 1]))
        tops = torch.full((topology.count,), run % tiles * thresholds.TILE_ROWS)
        of_run = topology.columns == run // tiles
        if topology.unit == (1, 1):
            of_run &= (topology.rows >= tops) & (topology.rows < tops + thresholds.TILE_ROWS)
        assert list(inside) == of_run.nonzero().flatten().tolist()
    if not thresholds.by_blocks(layout):
        assert index.by_row.numel() == index.row_ptr.numel() == 0
        return
    for row in range(topology.grid[0]):
        found = index.by_row[int(index.row_ptr[row]) : int(index.row_ptr[row + 1])]
        assert found.tolist() == (topology.rows == row).nonzero().flatten().tolist()


def test_runs_of_a_column_of_several_row_tiles() -> None:
    topology = Topology.random((300, 5), 400, generator(0, "tall"))
    starts = run_starts(Layout(topology.shape, (1, 1), topology.indices)).view(-1)
    assert starts.numel() == 5 * 3 + 1
    tile = topology.columns * 3 + topology.rows // thresholds.TILE_ROWS
    assert starts.diff().tolist() == torch.bincount(tile, minlength=15).tolist()


@pytest.mark.parametrize("side", thresholds.BLOCKS)
def test_the_way_of_a_product_is_chosen_by_unit_and_density(side: int) -> None:
    def layout(unit: tuple[int, int], density: float) -> Layout:
        return Layout((10 * unit[0], 10 * unit[1]), unit, torch.arange(round(100 * density), dtype=torch.int32))

    limit = thresholds.BLOCKS[side]
    assert thresholds.by_blocks(layout((side, side), limit))
    assert not thresholds.by_blocks(layout((side, side), limit + 0.01))
    assert not thresholds.by_blocks(layout((side, 8), 0.01))
    assert not thresholds.by_tiles(layout((side, side), 0.01), torch.bfloat16)


def check(topology: Topology, dtype: torch.dtype, tokens: int, bias: bool, seed: int) -> None:
    """All products of float32 values with inputs of `dtype`, as under autocast."""
    rng = generator(seed, "cuda")
    layout = layout_of(topology)
    (out_features, in_features), values = topology.shape, torch.randn(topology.values_shape, generator=rng)
    x, dy = (torch.randn(tokens, n, generator=rng).to(dtype) for n in (in_features, out_features))
    vector = torch.randn(out_features, generator=rng).to(dtype) if bias else None
    exact = values.to(dtype).double()
    want_y = ORACLE.spmm(exact, layout, x.double(), None if vector is None else vector.double())
    want = ORACLE.backward(exact, layout, dy.double(), x.double(), Needs(True, True, True))
    y = BACKEND.spmm(values, layout, x, vector)
    got = BACKEND.backward(values, layout, dy, x, Needs(True, True, True))
    assert y.dtype == got.x.dtype == dtype
    assert got.values.dtype == torch.float32
    close(y, want_y, dtype)
    close(got.x, want.x, dtype)
    close(got.values, want.values, dtype)
    inactive = topology.sample_inactive(min(9, topology.units - topology.count), rng).flip(0)
    sampled = Layout(topology.shape, topology.unit, torch.cat([inactive, inactive]))
    close(BACKEND.sddmm(dy, x, sampled), ORACLE.sddmm(dy.double(), x.double(), sampled), dtype)


@in_interpreter
@pytest.mark.parametrize("dtype", TOLERANCE)
@few
@given(topologies([(1, 1), (2, 3), (16, 16)], most=20), st.integers(0, 70), st.booleans(), st.integers(0, 2**32))
def test_dense_products_around_kernels(
    dtype: torch.dtype, topology: Topology, tokens: int, bias: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(thresholds, "BLOCKS", {})
        check(topology, dtype, tokens, bias, seed)


@in_interpreter
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_of_several_tiles(dtype: torch.dtype) -> None:
    check(Topology.random((150, 140), 1500, generator(0, "tiles")), dtype, 70, True, 0)


@in_interpreter
@pytest.mark.parametrize("dtype", TOLERANCE)
@few
@given(topologies(BLOCKS, most=4), st.integers(0, 150), st.booleans(), st.integers(0, 2**32))
def test_products_of_blocks(dtype: torch.dtype, topology: Topology, tokens: int, bias: bool, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(thresholds, "BLOCKS", dict.fromkeys(thresholds.BLOCKS, 1.0))
        check(topology, dtype, tokens, bias, seed)


@in_interpreter
@pytest.mark.parametrize("unit", [(1, 1), (4, 4), (16, 16)])
def test_other_indices_than_the_layers_own_give_nan(unit: tuple[int, int]) -> None:
    topology = Topology.random((4 * unit[0], 5 * unit[1]), 2, generator(0, "seen"), unit)
    layout, x = layout_of(topology), torch.ones(3, topology.shape[1])
    values, other = torch.ones(topology.values_shape), topology.indices.clone()
    want = BACKEND.spmm(values, layout, x)
    assert torch.equal(BACKEND.spmm(values, layout._replace(seen=other), x), want)
    other[1] += 1
    got = BACKEND.spmm(values, layout._replace(seen=other), x)
    assert bool(got.isnan().any(1).all())
    assert bool(want.isfinite().all())


def test_a_backend_that_compares_gets_the_indices_of_the_layer() -> None:
    topology = Topology.random((4, 5), 7, generator(0, "seen"))
    layout, values = Layout(topology.shape, (1, 1), topology.indices.to("meta")), torch.ones(7, device="meta")
    indices = topology.indices.to("meta")
    got, with_seen = multiplied(BACKEND, values, indices, layout)
    assert got is values
    assert with_seen.seen is indices
    assert multiplied(ORACLE, values, indices, layout)[1].seen is None
    with pytest.raises(InputError, match="written in place"):
        multiplied(BACKEND, values, indices[1:], layout)


@in_interpreter
def test_a_block_of_128() -> None:
    check(Topology.random((256, 384), 3, generator(0, "wide"), (128, 128)), torch.float16, 130, True, 0)


@in_interpreter
@few
@given(
    st.lists(st.sampled_from([0, 1, 5, 1023, 1024, 1500, 3000]), min_size=1, max_size=4),
    st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.9, 0.99999)]),
    st.sampled_from([(0, False), (3, False), (3, True)]),
    st.integers(0, 2**32),
)
def test_one_launch_updates_every_parameter(
    sizes: list[int], betas: tuple[float, float], ramp: tuple[int, bool], seed: int
) -> None:
    """As the optimizer's many passes do, with weights that were grown in between."""
    rng = generator(seed, "adamw")
    first = [torch.randn(size, generator=rng) for size in sizes]
    pairs = [[nn.Parameter(t.clone()) for t in first] for _ in range(2)]
    optimizers = [
        AdamW([{"params": [p], "lr": 0.1 / (1 + at), "weight_decay": 0.1 * at} for at, p in enumerate(own)],
              betas=betas, per_weight_step=True)
        for own in pairs
    ]  # fmt: skip
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(ramp=ramp[0], ramp_first=ramp[1])
    for step in range(5):
        grads = [torch.randn(size, generator=rng) for size in sizes]
        for is_fused, (own, optimizer) in enumerate(zip(pairs, optimizers, strict=True)):
            for p, grad in zip(own, grads, strict=True):
                p.grad = grad.clone()
                if step == 3:
                    for state in optimizer.state[p].values():
                        state.view(-1)[::2] = state.view(-1)[::2] if state.dim() == 0 else 0
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("sparsae.optim._fits_one_launch", lambda *_, fused=bool(is_fused): fused)
                patched.setattr("sparsae.optim._CACHED", 2**20)
                optimizer.step()
    for p, q in zip(*pairs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
        for key, state in optimizers[0].state[p].items():
            torch.testing.assert_close(state, optimizers[1].state[q][key], rtol=1e-5, atol=1e-7)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(max_examples=20)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 2, 40, 2048, 2500]),
    st.none() | st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_losses_of_rows_and_their_gradient(
    dtype: torch.dtype, tokens: int, vocabulary: int, taught: int | None, ignores: bool, gradient: bool, seed: int
) -> None:
    from sparsae.kernels.fused.loss import losses_and_gradient

    rng = generator(seed, "loss")
    logits = (4 * torch.randn(tokens, vocabulary, generator=rng)).to(dtype)
    teacher = None if taught is None else (4 * torch.randn(min(taught, tokens), vocabulary, generator=rng)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=rng)
    if ignores:
        targets[torch.rand(tokens, generator=rng) < 0.3] = -100
    exact = logits.double().requires_grad_()
    want = _sums(exact, None if teacher is None else teacher.double(), targets, -100 if ignores else None)
    (0.3 * want[0] + 0.7 * want[1]).backward()
    ce, kl, found = losses_and_gradient(logits, targets, teacher, -100 if ignores else None, 0.3, 0.7, gradient)
    torch.testing.assert_close(torch.stack([ce, kl]).double(), torch.stack(want).detach(), rtol=1e-5, atol=1e-5)
    assert (found is not None) == gradient
    if found is not None and exact.grad is not None:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact.grad, rtol=0.0, atol=TOLERANCE[dtype])


@in_interpreter
def test_targets_may_lie_apart() -> None:
    from sparsae.kernels.fused.loss import losses_and_gradient

    rng = generator(0, "apart")
    logits, targets = torch.randn(6, 10, generator=rng), torch.randint(0, 10, (6, 2), generator=rng)
    found = [losses_and_gradient(logits, t, None, -100, 1.0, 0.0, True) for t in (targets[:, 0], targets[:, 0].clone())]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


@in_interpreter
@pytest.mark.parametrize(("target", "ignore_index"), [(20, None), (-1, None), (-1, -100), (-100, None)])
def test_the_loss_of_a_target_that_is_no_class_is_no_number(target: int, ignore_index: int | None) -> None:
    from sparsae.kernels.fused.loss import losses_and_gradient

    cross_entropy, _, _ = losses_and_gradient(
        torch.zeros(4, 20), torch.tensor([1, 2, target, 3]), None, ignore_index, 0.3, 0.7, True
    )
    assert bool(cross_entropy.isnan())


@in_interpreter
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_the_loss_of_a_model_by_the_kernel(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, a teacher of some tokens, tokens that do not count: loss and gradients of hidden states and head."""
    rng = generator(0, "loss")
    head, teacher = nn.Linear(6, 30), nn.Linear(6, 30)
    hidden, targets = torch.randn(23, 6, generator=rng), torch.randint(30, (23,), generator=rng)
    targets[[3, 9]] = -100
    how: dict[str, object] = {"teacher_hidden_TD": torch.randn(11, 6, generator=rng), "teacher_head": teacher}
    found = []
    for backend in (None, BACKEND):
        monkeypatch.setattr("sparsae.losses.losses_backend", lambda *_, chosen=backend: chosen)
        at = hidden.clone().requires_grad_()
        parts = language_model_loss(at, head, targets, **how, alpha=alpha, chunk=5)  # type: ignore[arg-type]
        found.append([*parts, *torch.autograd.grad(parts.total, [at, *head.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@in_interpreter
@pytest.mark.parametrize(("gpu", "dtype"), [(80, "bf16"), (89, "bf16"), (90, "bf16"), (90, "fp32")])
def test_every_kernel_compiles_for_gpus_within_their_shared_memory(gpu: int, dtype: str) -> None:
    from tests.kernels.compile_for_gpus import SHARED

    program = [sys.executable, "-m", "tests.kernels.compile_for_gpus", str(gpu), dtype]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} >= {"_scatter", "_gather", "_forward", "_backward", "_gradient"}
    assert "_rows" in {row["kernel"] for row in rows}
    assert ("_adamw" in {row["kernel"] for row in rows}) == (dtype == "fp32")
    for row in rows:
        if (gpu, row.get("B_OUT")) != (89, 128):
            assert row["shared"] <= SHARED[gpu], row
