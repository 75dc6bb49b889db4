"""Who owns what of a backend: its folder everything of its device, the rest of the package nothing; guests come in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import sparsae
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.evaluate.decoding import FastDecoder, ModelDecoder, open_decoder
from sparsae.kernels import registry
from sparsae.kernels.backend import Backend, Layout, MlpGradients, Weight
from sparsae.kernels.mlp import composed_backward
from sparsae.kernels.probe import new_key
from sparsae.kernels.reference import Reference
from sparsae.kernels.registry import BACKENDS, register_backend
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from tests.support.mlp_cases import close

PACKAGE = Path(sparsae.__file__).parent
FOLDERS = {file.parent.name: file.parent for file in PACKAGE.glob("kernels/*/backend.py")}


def named_outside(source: str, name: str) -> Iterator[str]:
    """Where code imports a backend's folder or names the backend, as it may not outside of it.

    The name may be that of a torch device too: as an argument `device`, in `torch.device(...)`, `.to(...)` or
    `.startswith(...)`, compared with a `device` or its `type`, or one of what is called `devices`.
    """
    tree = ast.parse(source)
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            into = getattr(node, "module", None)
            modules = [f"{into}.{alias.name}" if into else alias.name for alias in node.names]
            if any(module.startswith(f"sparsae.kernels.{name}") for module in modules):
                yield f"line {node.lineno}: imports {', '.join(modules)}"
        elif isinstance(node, ast.Constant) and node.value == name and not of_a_device(node, above):
            yield f"line {node.lineno}: names '{name}'"


def of_a_device(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    while not isinstance(node, ast.stmt):
        node = above[node]
        if isinstance(node, ast.keyword):
            return node.arg == "device"
        if isinstance(node, ast.arguments):
            return any(a.arg == "device" for a in (*node.args, *node.kwonlyargs))
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Attribute) and node.func.attr in ("device", "to", "startswith")
        if isinstance(node, ast.Compare):
            return isinstance(node.left, ast.Attribute) and node.left.attr in ("type", "device")
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == "devices" for target in targets)


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_outside_its_folder_names_a_backend_or_imports_its_inside(name: str) -> None:
    found = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if not file.is_relative_to(FOLDERS[name]) and (lines := list(named_outside(file.read_text(), name)))
    }
    assert found == {}


def test_what_names_a_backend_is_seen() -> None:
    for wrong in (
        "from sparsae.kernels.cpu import native",
        "from sparsae.kernels import cpu",
        "import sparsae.kernels.cpu.backend",
        "if layer.kernel == 'cpu': pass",
        "BACKENDS['cpu']",
        "sparsify(model, 0.9, backend='cpu')",
        "backends = ('cpu', 'cuda')",
        "f(torch.device('cuda'), 'cpu')",
    ):
        assert len(list(named_outside(wrong, "cpu"))) == 1, wrong
    for right in (
        "x.to('cpu')",
        "device.startswith('cpu')",
        "devices = ('cpu', 'cuda')",
        "devices: tuple[str, ...] = ('cpu',)",
        "torch.device('cuda' if there else 'cpu')",
        "torch.zeros(1, device='cpu')",
        "if device.type not in ('cpu', 'cuda'): pass",
        "def make(seed, *, device='cpu'): pass",
    ):
        assert list(named_outside(right, "cpu")) == [], right


def test_every_folder_is_a_backend_and_the_reference_comes_last() -> None:
    assert list(BACKENDS) == [*sorted(FOLDERS), "reference"]
    assert {name: PACKAGE / "kernels" / name for name in ("cpu", "cuda")}.items() <= FOLDERS.items()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_backend_is_found_whichever_module_is_imported_first(name: str) -> None:
    program = f"import sparsae.kernels.{name}.backend as b; from sparsae.kernels.registry import BACKENDS as all_; "
    subprocess.run([sys.executable, "-c", program + f"assert all_['{name}'] is b.BACKEND"], check=True)


class Guest(Reference):
    """The reference with a whole MLP and a product for one token, which count their calls."""

    name = "guest"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def derive(self, topology: Topology) -> list[Tensor]:
        return [topology.rows]

    def mlp_refusal(self, layouts: Sequence[Layout], activation: str, dtype: torch.dtype) -> str | None:
        return None if activation == "gelu_tanh" else "it knows one activation"

    def mlp_forward(
        self, weights: Sequence[Weight], x_TI: Tensor, activation: str, kept: Tensor | None = None
    ) -> Tensor:
        assert kept is None
        self.calls.append("forward")
        up, down = weights
        hidden = nn.functional.gelu(self.spmm(up.values, up.layout, x_TI, up.bias), approximate="tanh")
        return self.spmm(down.values, down.layout, hidden, down.bias)

    def mlp_backward(
        self, weights: Sequence[Weight], dy_TO: Tensor, x_TI: Tensor, activation: str, kept: Tensor | None = None
    ) -> MlpGradients:
        assert kept is None
        self.calls.append("backward")
        return composed_backward(self, weights, [new_key() for _ in weights], dy_TO, x_TI, activation)

    def token_refusal(self, layout: Layout, dtype: torch.dtype) -> str | None:
        return None

    def token_product(self, values: Tensor, layout: Layout, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        self.calls.append("token")
        return lambda x: self.spmm(values, layout, x, bias)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    assert register_backend(made) is made
    yield made
    del BACKENDS["guest"]


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_a_guest_fuses_mlps_that_it_does_not_refuse(guest: Guest, activation: str) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    x = torch.randn(7, 16, generator=generator(0, "x"))
    torch.manual_seed(0)
    model = sparsify(
        nn.Sequential(GPT2MLP(32, GPT2Config(n_embd=16, activation_function=activation, resid_pdrop=0.0))),
        0.6,
        backend="guest",
    )
    got = gradients(model)
    assert guest.calls == (["forward", "backward"] if activation == "gelu_new" else [])
    model.zero_grad()
    assert isinstance(model[0], nn.Module)
    close(got, gradients(nn.Sequential(model[0].original)), 1e-5)


def test_a_guest_multiplies_single_tokens(guest: Guest) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=12, vocab_size=20, bos_token_id=0, eos_token_id=0)
    model = sparsify(GPT2LMHeadModel(config).eval(), 0.6, backend="guest")
    fast, slow = open_decoder(model, 12), ModelDecoder(model)
    assert isinstance(fast, FastDecoder)
    assert guest.calls.count("token") == len(sparse_layers(model))
    torch.testing.assert_close(fast.read([1, 2, 3]), slow.read([1, 2, 3]))
    torch.testing.assert_close(fast.step(4), slow.step(4), rtol=1e-4, atol=1e-5)


PACKAGED = """
from sparsae import register_backend
from sparsae.kernels.reference import Reference


class Packaged(Reference):
    name = "packaged"


register_backend(Packaged())
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a package with one module and its backend where they are found."""
    before = set(sys.modules), dict(BACKENDS)

    def installed(name: str, code: str) -> None:
        information = tmp_path / f"{name}-1.0.dist-info"
        information.mkdir()
        (tmp_path / f"{name}_backend.py").write_text(code)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[sparsae.kernels]\n{name} = {name}_backend\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(registry._NAMES, "_known_points", None)

    yield installed
    for module in [module for module in set(sys.modules) - before[0] if module.endswith("_backend")]:
        del sys.modules[module]
    for name in set(BACKENDS) - set(before[1]):
        del BACKENDS[name]


def test_a_backend_of_an_installed_package_is_loaded_where_it_is_named(install: Callable[[str, str], None]) -> None:
    install("packaged", PACKAGED)
    assert "packaged" in registry.backend_names()
    assert "packaged" not in BACKENDS
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, backend="packaged")
    assert {layer.kernel for layer in sparse_layers(model).values()} == {"packaged"}
    x = torch.ones(2, 8)
    torch.testing.assert_close(model(x), model(x).detach())
    assert "packaged_backend" in sys.modules


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        (f"{PACKAGED}\nimport nothing_of_the_kind", "cannot be loaded: No module named"),
        ("", "registers no backend of that name"),
    ],
)
def test_one_that_cannot_be_loaded_is_told_in_a_line(
    code: str, message: str, install: Callable[[str, str], None]
) -> None:
    install("packaged", code)
    for _ in range(2):
        with pytest.raises(
            InputError, match="backend 'packaged': the entry point packaged = packaged_backend"
        ) as caught:
            sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, backend="packaged")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "packaged" not in BACKENDS


def test_auto_takes_no_guest(guest: Guest) -> None:
    topology = Topology.random((8, 8), 9, generator(0, "guest"))
    layout = Layout(topology.shape, topology.unit, topology.indices)
    assert registry.choose_backend("auto", layout, torch.float64).name == "reference"
    assert registry.choose_backend("guest", layout, torch.float64) is guest


@pytest.mark.usefixtures("guest")
def test_what_cannot_be_registered() -> None:
    class Other(Guest):
        pass

    class Cpu(Guest):
        name = "cpu"

    class Auto(Guest):
        name = "auto"

    class Nameless(Guest):
        name = ""

    for taken in (Other(), Cpu(), Auto()):
        with pytest.raises(InputError, match=f"backend '{taken.name}' is there already"):
            register_backend(taken)
    for wrong in (Nameless(), Guest, "guest"):
        with pytest.raises(InputError, match="a backend is an instance"):
            register_backend(wrong)  # type: ignore[arg-type]
    again = Guest()  # as where its module is loaded anew
    assert register_backend(again) is again


def test_a_backend_refuses_what_it_does_not_have() -> None:
    reference: Backend = Reference()
    topology = Topology.random((8, 8), 9, generator(0, "refusal"))
    layout = Layout(topology.shape, topology.unit, topology.indices)
    assert reference.mlp_refusal([layout, layout], "relu", torch.float32) == "it computes MLPs layer by layer"
    assert reference.token_refusal(layout, torch.float32) == "it has no product for single tokens"
    assert reference.limits(torch.device("cpu")) == "backend 'reference' does not measure what cpu does at most"
