"""The simulated GPU: tensors over one memory, operators that refuse two devices, and what would wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.gpu import simulated

pytestmark = pytest.mark.skipif(simulated.absence() is not None, reason=f"not simulated: {simulated.absence()}")


@pytest.fixture
def x() -> Tensor:
    return torch.arange(12.0).reshape(3, 4).to("cuda")


def test_views_share_memory_and_what_is_written_in_place_stays_itself(x: Tensor) -> None:
    assert x.is_cuda
    row, before = x[1], x
    row.zero_()
    x += 1
    assert x is before
    assert x.tolist() == [[1, 2, 3, 4], [1, 1, 1, 1], [9, 10, 11, 12]]
    assert x.view(4, 3).data_ptr() == x.data_ptr()
    assert x.t().contiguous().untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_results_have_the_sizes_that_operators_give_them(x: Tensor) -> None:
    out = torch.empty(0, device="cuda")
    assert torch.add(x, 1, out=out) is out
    assert out.tolist() == (x.cpu() + 1).tolist()
    out.resize_(20)
    assert out.shape == (20,)
    other = torch.empty(0, device="cuda").set_(x.untyped_storage(), 4, (4,), (1,))
    assert other.tolist() == [4, 5, 6, 7]
    assert [part.tolist() for part in x.split([1, 2])] == [part.tolist() for part in x.cpu().split([1, 2])]


def test_gradients_and_optimizers_are_those_of_the_cpu(x: Tensor) -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(x.to(device)).square().mean().backward()
            optimizer.step()
        found.append([parameter.detach().cpu() for parameter in model.parameters()])
    torch.testing.assert_close(found[0], found[1])


def test_inference_mode(x: Tensor) -> None:
    layer = nn.Linear(4, 2).to("cuda")
    with torch.inference_mode():
        assert torch.equal(layer(x).cpu(), layer.cpu()(x.cpu()))


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.cat([x, torch.ones(3, 4)]),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.index_add_(0, torch.tensor([0]), x[:1]),
        lambda x: nn.functional.linear(x, torch.ones(2, 4)),
        lambda x: x.where(torch.ones(3, 4) > 0, x),
        lambda x: torch.zeros(()).add_(x.sum()),
        lambda x: x.index_select(0, torch.tensor(0)),
        lambda x: x.take(torch.tensor(0)),
        lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda x: x.normal_(generator=torch.Generator()),
        lambda x: torch.zeros(3, device="cuda:1"),
    ],
)
def test_two_devices_do_not_meet(mixed: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"same device|devices|device type|ordinal"):
        mixed(x)


def test_pinned_memory_is_known() -> None:
    here = torch.ones(8).pin_memory()
    assert here.is_pinned()
    assert here[3:].is_pinned()
    assert not torch.ones(8).is_pinned()


def test_numbers_of_the_host_and_its_indices_are_taken(x: Tensor) -> None:
    assert (x * torch.tensor(2.0)).is_cuda
    assert x[torch.tensor([2, 0])][:, 0].tolist() == [8, 0]


@pytest.mark.parametrize(
    ("waiting", "times"),
    [
        (lambda x: float(x.sum()), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 3], 1),
        (lambda x: x.unique(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: torch.tensor([1.0], device="cuda"), 1),
        (lambda x: torch.cuda.current_stream().synchronize(), 1),
        (lambda x: torch.cuda.synchronize(), 1),
        (lambda x: x.index_put_((torch.tensor([1], device="cuda").long(),), torch.tensor(1.0)), 2),
        (lambda x: x.masked_scatter(x > 3, x), 0),
        (lambda x: torch.isin(x, torch.arange(100.0, device="cuda")), 1),
        (lambda x: torch.isin(x, torch.arange(100.0, device="cuda"), assume_unique=True), 0),
        (lambda x: x.to("cpu", non_blocking=True), 0),
        (lambda x: torch.empty(3, 4).copy_(x, non_blocking=True), 1),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), 1),
        (lambda x: torch.empty(3, 4, pin_memory=True).copy_(x, non_blocking=True), 0),
        (lambda x: x.masked_fill(x > 3, 0.0), 0),
        (lambda x: x.sort(), 0),
        (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
        (lambda x: torch.full((3,), 2.0, device="cuda"), 0),
        (lambda x: nn.utils.clip_grad_norm_([nn.Parameter(x)], 1.0), 0),
    ],
)
def test_what_waits_is_counted(waiting: Callable[[Tensor], object], times: int, x: Tensor) -> None:
    with simulated.waits() as found:
        waiting(x)
    assert found.total() == times
