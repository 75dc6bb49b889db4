"""The compiled kernels themselves: every instruction set of this machine, thread counts, odd shapes, bad input."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels import registry
from sparsae.kernels.backend import Gradients, Layout, Needs
from sparsae.kernels.cpu import library, native
from sparsae.kernels.reference import Reference
from sparsae.nn.linear import SparseLinear
from tests.support.strategies import topologies

pytestmark = pytest.mark.skipif(native.absence() is not None, reason=str(native.absence()))

UNITS = [(1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (2, 3), (5, 1), (1, 7)]


def asked_for(gradients: Gradients) -> list[Tensor]:
    found = [gradient for gradient in gradients if gradient is not None]
    assert len(found) == 3
    return found


class Case:
    """One layer with its activations, and its products in float64."""

    def __init__(self, topology: Topology, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        rng = generator(seed, "case")
        out_features, in_features = topology.shape
        self.layout = Layout(topology.shape, topology.unit, topology.indices)
        self.index = native.make_index(self.layout)
        self.values = torch.randn(topology.values_shape, generator=rng)
        self.bias = torch.randn(out_features, generator=rng)
        self.x = torch.randn(tokens, in_features, generator=rng).to(dtype)
        self.dy = torch.randn(tokens, out_features, generator=rng).to(dtype)

    def run(self) -> tuple[Tensor, ...]:
        y = native.forward(self.values, self.layout, self.index, self.x, self.bias)
        gradients = native.backward(self.layout, self.index.col_ptr, self.dy, self.values, self.x, bias=True)
        return y, *asked_for(gradients)

    def exact(self) -> tuple[Tensor, ...]:
        values, x, dy = self.values.double(), self.x.double(), self.dy.double()
        y = Reference().spmm(values, self.layout, x, self.bias.double())
        return y, *asked_for(Reference().backward(values, self.layout, dy, x, Needs(x=True, values=True, bias=True)))

    def check(self) -> None:
        # The error of a sum of products is in proportion to its terms, not to what remains of them.
        size = 1 + max(self.x.shape[0], *self.layout.shape) ** 0.5
        rtol = 1e-2 if self.x.dtype == torch.bfloat16 else 1e-5
        for got, want in zip(self.run(), self.exact(), strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=5e-6 * size)


@given(topologies(UNITS, most=40), st.integers(0, 150), st.integers(0, 2**32))
def test_random_shapes(isa: str, topology: Topology, tokens: int, seed: int) -> None:
    Case(topology, tokens, seed).check()


@given(topologies(UNITS, most=30), st.integers(0, 70), st.integers(0, 2**32))
def test_bfloat16(isa: str, topology: Topology, tokens: int, seed: int) -> None:
    case = Case(topology, tokens, seed, torch.bfloat16)
    case.check()
    assert [result.dtype for result in case.run()] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(isa: str) -> None:
    x = torch.tensor([[1.00390625], [1.01171875], [float("nan")], [float("-inf")], [3.4e38]] * 20).bfloat16()
    weights = torch.tensor([1.0, 1.00390625, 1.01171875, -1.0])
    layout = Layout((4, 1), (1, 1), torch.arange(4, dtype=torch.int32))
    y = native.forward(weights, layout, native.make_index(layout), x, None)
    assert torch.equal(y.view(torch.int16), (x.float() * weights).bfloat16().view(torch.int16)) or torch.equal(
        y.nan_to_num(7), (x.float() * weights).bfloat16().nan_to_num(7)
    )


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "INTERFACE", 0)
    assert "install sparsae again" in library._load.__wrapped__()


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1), (3, 66_000), (1, 1), (17, 1), (1, 17)])
def test_extreme_shapes(isa: str, shape: tuple[int, int]) -> None:
    count = max(1, shape[0] * shape[1] // 10)
    Case(Topology.random(shape, count, generator(0, "extreme")), 37, 0).check()


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_empty_and_full_rows_and_columns(isa: str, unit: tuple[int, int]) -> None:
    mask = torch.zeros(40, 36, dtype=torch.bool)
    mask[[0, 7, 39]] = True
    mask[:, [0, 20, 35]] = True
    mask[5] = False
    indices = mask.T.reshape(-1).nonzero().squeeze(1)
    topology = Topology.from_indices((40 * unit[0], 36 * unit[1]), indices, unit)
    Case(topology, 100, 0).check()


def test_wide_indices(isa: str) -> None:
    topology = Topology.random((50, 40), 300, generator(0, "wide"))
    narrow = Case(topology, 33, 0)
    wide = Case(Topology(topology.shape, topology.indices.long()), 33, 0)
    for got, want in zip(wide.run(), narrow.run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("unit", [(1, 1), (4, 4), (2, 3)])
def test_results_do_not_depend_on_the_number_of_threads(isa: str, unit: tuple[int, int]) -> None:
    topology = Topology.random((101 * unit[0], 77 * unit[1]), 900, generator(0, "threads"), unit)
    case = Case(topology, 200, 0)
    alone = case.run()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for got, want in zip(case.run(), alone, strict=True):
            assert torch.equal(got, want)


def test_blocks_of_columns_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    # Wide enough for several blocks of columns and dense enough that rows have weights in each.
    case = Case(Topology.random((300, 1700), 51_000, generator(0, "blocks")), 200, 0)
    case.check()
    alone = case.run()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for got, want in zip(case.run(), alone, strict=True):
            assert torch.equal(got, want)


def test_threads_that_meet_several_times_in_one_pass(isa: str) -> None:
    # So many rows that the tiles of 300 tokens do not fit between two barriers.
    case = Case(Topology.random((16_384, 64), 30_000, generator(0, "barriers")), 300, 0)
    alone = case.run()
    torch.set_num_threads(2)
    for got, want in zip(case.run(), alone, strict=True):
        assert torch.equal(got, want)


def test_parts_of_the_backward_pass_equal_the_whole(isa: str) -> None:
    case = Case(Topology.random((60, 50), 700, generator(0, "parts")), 90, 0)
    _, dx, dvalues, dbias = case.run()
    index = case.index.col_ptr
    only_dx = native.backward(case.layout, index, case.dy, case.values)
    assert only_dx.values is None
    assert only_dx.bias is None
    assert torch.equal(only_dx.x, dx)
    only_dvalues = native.backward(case.layout, index, case.dy, x_TI=case.x, bias=True)
    assert only_dvalues.x is None
    assert torch.equal(only_dvalues.values, dvalues)
    assert torch.equal(only_dvalues.bias, dbias)
    only_dbias = native.backward(case.layout, index, case.dy, bias=True)
    assert only_dbias.x is None
    assert only_dbias.values is None
    torch.testing.assert_close(only_dbias.bias, dbias, rtol=1e-5, atol=1e-5)


def test_index_structures_take_at_most_twelve_bytes_a_value() -> None:
    for shape, count in (((768, 768), 5898), ((100, 70_000), 700_000)):
        topology = Topology.random(shape, count, generator(0, "memory"))
        index = native.make_index(Layout(shape, (1, 1), topology.indices))
        assert sum(t.nbytes for t in (topology.indices, *index)) <= 4 * count + 8 * (shape[0] + shape[1])
        assert torch.equal(index.row_ptr.diff(), topology.rows.bincount(minlength=shape[0]).int())
    for shape, unit in (((768, 768), (4, 4)), ((4, 280_000), (4, 4))):
        topology = Topology.random(shape, 3000, generator(0, "memory"), unit)
        index = native.make_index(Layout(shape, unit, topology.indices))
        assert sum(t.nbytes for t in (topology.indices, *index)) <= 12 * 3000 + 8 * (shape[0] + shape[1])
        order = topology.rows.argsort(stable=True)
        bits = 0xFFFF if index.columns.dtype == torch.int16 else -1
        assert torch.equal(index.columns.int() & bits, topology.columns[order].int())
        assert torch.equal(index.source.long(), order)


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [([0, 12], "inside the grid"), ([-1, 3], "inside the grid"), ([3, 3], "ascending"), ([5, 2], "ascending")],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bad_indices_are_refused(indices: list[int], complaint: str, dtype: torch.dtype) -> None:
    layout = Layout((3, 4), (1, 1), torch.tensor(indices, dtype=dtype))
    with pytest.raises(ValueError, match=complaint):
        native.make_index(layout)
    with pytest.raises(ValueError, match=complaint):
        native.point_columns(layout)


def test_what_the_library_would_misread_is_refused() -> None:
    case = Case(Topology.random((6, 5), 12, generator(0, "bad")), 4, 0)
    layout, index = case.layout, case.index
    with pytest.raises(ValueError, match=r"x have shape \(4, 6\), not \(4, 5\)"):
        native.forward(case.values, layout, index, torch.zeros(4, 6), None)
    with pytest.raises(ValueError, match="values have dtype"):
        native.forward(case.values.double(), layout, index, case.x, None)
    with pytest.raises(ValueError, match="values have shape"):
        native.forward(case.values[:-1], layout, index, case.x, None)
    with pytest.raises(ValueError, match="bias have shape"):
        native.forward(case.values, layout, index, case.x, case.bias[:-1])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        native.forward(case.values, layout, index, case.x.half(), None)
    with pytest.raises(ValueError, match="contiguous"):
        native.forward(torch.zeros(24)[::2], layout, index, case.x, None)
    with pytest.raises(ValueError, match="sources have shape"):
        native.forward(case.values, layout, index._replace(source=torch.zeros(3, dtype=torch.int32)), case.x, None)
    with pytest.raises(ValueError, match="columns have dtype"):
        native.forward(case.values, layout, index._replace(columns=index.columns.int()), case.x, None)
    with pytest.raises(ValueError, match="x have dtype"):
        native.backward(layout, index.col_ptr, case.dy, case.values, case.x.bfloat16())
    with pytest.raises(ValueError, match="column starts have shape"):
        native.backward(layout, index.col_ptr[:-1], case.dy, case.values, case.x)
    with pytest.raises(ValueError, match="int32 or int64"):
        native.make_index(layout._replace(indices=layout.indices.short()))


def test_strided_activations_are_taken() -> None:
    case = Case(Topology.random((6, 5), 12, generator(0, "strided")), 4, 0)
    want = case.run()
    case.x, case.dy = case.x.T.contiguous().T, case.dy.T.contiguous().T
    for got, expected in zip(case.run(), want, strict=True):
        assert torch.equal(got, expected)


def test_auto_prefers_native_kernels_where_they_pay() -> None:
    sparse = Layout((512, 512), (1, 1), Topology.random((512, 512), 2_000, generator(0, "auto")).indices)
    full = sparse._replace(indices=torch.arange(512 * 512, dtype=torch.int32))
    assert registry.choose_backend("auto", sparse, torch.float32).name == "cpu"
    assert registry.choose_backend("auto", sparse, torch.float64).name == "reference"
    assert registry.choose_backend("auto", full, torch.float32).name == "reference"
    with pytest.raises(InputError, match="float32 and bfloat16, not in float64"):
        registry.choose_backend("cpu", sparse, torch.float64)
    for density, name in ((0.35, "cpu"), (0.37, "reference")):
        indices = torch.arange(round(density * 512 * 512), dtype=torch.int32)
        assert registry.choose_backend("auto", sparse._replace(indices=indices), torch.float32).name == name


def test_without_the_library_auto_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "LIBRARY", Path("/nowhere/_native.so"))
    monkeypatch.setattr(registry, "_logged", set())
    library._load.cache_clear()
    try:
        topology = Topology.random((8, 8), 9, generator(0, "absent"))
        for _ in range(2):
            layer = SparseLinear(topology, torch.ones(9))
            layer(torch.ones(2, 8))
            assert layer.kernel == "reference"
        assert len([r for r in caplog.records if "not compiled" in r.message]) == 1
        with pytest.raises(InputError, match="not compiled"):
            SparseLinear(topology, torch.ones(9), backend="cpu")
    finally:
        library._load.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_one_openmp_runtime_is_shared_with_torch() -> None:
    # In a process of its own: other libraries bring runtimes of their own.
    program = "from sparsae.kernels.cpu import native; native.isa(); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "_native" in done.stdout
    assert len({line.split()[-1] for line in done.stdout.splitlines() if "libgomp" in line}) <= 1


def test_a_product_for_one_token_equals_the_general_one_and_spreads_no_infinity(isa: str) -> None:
    case = Case(Topology.random((60, 50), 700, generator(0, "decode")), 1, 0)
    product = native.Product(case.values, case.layout, case.index, case.bias)
    torch.testing.assert_close(product(case.x), case.run()[0], rtol=1e-5, atol=1e-5)
    case.x[0, 0] = torch.inf
    touched = torch.zeros(60, dtype=torch.bool).index_fill(
        0, case.layout.indices[case.layout.indices < 60].long(), True
    )
    assert torch.equal(~product(case.x)[0].isfinite(), touched)


def test_an_arm_compiler_takes_the_neon_kernels() -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++; make soak runs the kernels in an emulator")
    source = Path(library.__file__).parent / "csrc" / "isa_neon.cpp"
    flags = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    checked = subprocess.run([compiler, *flags, source], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
