"""The ranks that train one model together, and all that they tell each other.

Ranks are the processes of torch's default process group, each with its share of every batch. What decides anything
(gradients, scores, losses, requests to stop) goes through here first, and is the same on all of them afterwards: each
then decides by itself, and alike. One process alone is a rank too; its calls give back what they get, so nobody has to
ask whether there are others.

What ranks tell each other has a process group of its own, so that it cannot be mixed up with what data parallelism
sends in the same backward pass. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sparsae.errors import RankLostError, RanksError


class Ranks:
    """This process among the `count` that train a model: number `rank`, from 0 on.

    sent: bytes that this rank has given to reductions and gatherings, by purpose. All ranks have to make the same calls
    in the same order. Each raises RanksError where another rank does not answer.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group
        self.sent: Counter[str] = Counter()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes for all."""
        return self.rank == 0

    def mean_(self, tensor: Tensor, purpose: str) -> Tensor:
        """Its mean over the ranks, in its place; the same bits on all of them."""
        return tensor if self.count == 1 else self._reduced(tensor.div_(self.count), purpose)

    def sum_(self, tensor: Tensor, purpose: str) -> Tensor:
        """Its sum over the ranks, in its place."""
        return tensor if self.count == 1 else self._reduced(tensor, purpose)

    def means(self, numbers: list[float], purpose: str = "losses") -> list[float]:
        """The mean of each number over the ranks."""
        if self.count == 1:
            return numbers
        found: list[float] = self.mean_(self._control(numbers, torch.float64), purpose).tolist()
        return found

    def sums(self, numbers: list[int], purpose: str = "counts") -> list[int]:
        """The sum of each whole number over the ranks."""
        if self.count == 1:
            return numbers
        found: list[int] = self.sum_(self._control(numbers, torch.int64), purpose).tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return flag if self.count == 1 else self.sums([int(flag)])[0] > 0

    def gather(self, value: Any, purpose: str = "scores") -> list[Any]:
        """The values of all ranks, in their order; each is anything that JSON holds, numbers that are none included."""
        if self.count == 1:
            return [value]
        own = json.dumps(value).encode()
        sizes = self.sums([len(own) if rank == self.rank else 0 for rank in range(self.count)], purpose)
        filled = own + b" " * (max(sizes) - len(own))
        parts = self._gathered(torch.tensor(list(filled), dtype=torch.uint8, device=self._device), purpose)
        return [json.loads(bytes(part.tolist())) for part in parts]

    def gather_bytes(self, value: bytes) -> list[bytes]:
        """Those of all ranks, in their order, where all have as many."""
        if self.count == 1:
            return [value]
        own = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self._device)
        return [bytes(part.tolist()) for part in self._gathered(own, "agreement")]

    def from_first(self, value: Any) -> Any:
        """The value of the first rank, as `gather` has it."""
        return value if self.count == 1 else self.gather(value if self.is_first else None, "agreement")[0]

    def whole(self, sharded: Any, purpose: str = "sharded tensors") -> Tensor:
        """All of a DTensor, a new tensor, without gradient."""
        with torch.no_grad():
            self.sent[purpose] += sharded.to_local().nbytes
            try:
                found: Tensor = sharded.full_tensor()
            except RuntimeError as error:
                raise _lost(error) from error
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def require_same(self, what: Mapping[str, bytes]) -> None:
        """Raise RanksError, on every rank, where something of these names is not the same on all of them.

        what: as many bytes of each as on the other ranks, under a name that "are not the same" can be said of.
        """
        if self.count == 1:
            return
        everything = self.gather_bytes(b"".join(what.values()))
        start = 0
        for name, own in what.items():
            found = [part[start : start + len(own)] for part in everything]
            start += len(own)
            common = max(found, key=found.count)
            if others := [rank for rank, part in enumerate(found) if part != common]:
                raise RanksError(
                    f"{name} are not the same on rank {others[0]} as on rank {found.index(common)} (of {self.count})"
                )

    @property
    def _device(self) -> torch.device:
        """Where small tensors may be for the group: the CPU where it serves that."""
        devices: list[torch.device] = self._group._device_types
        kinds = [device.type for device in devices]
        host = torch.device("cpu")
        return host if host.type in kinds else torch.device(kinds[0], torch.cuda.current_device())

    def _control(self, numbers: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self._device)

    def _reduced(self, tensor: Tensor, purpose: str) -> Tensor:
        self.sent[purpose] += tensor.nbytes
        try:
            dist.all_reduce(tensor, group=self._group)
        except RuntimeError as error:
            raise _lost(error) from error
        return tensor

    def _gathered(self, tensor: Tensor, purpose: str) -> list[Tensor]:
        self.sent[purpose] += tensor.nbytes
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        try:
            dist.all_gather(parts, tensor, group=self._group)
        except RuntimeError as error:
            raise _lost(error) from error
        return parts


ALONE = Ranks()
_joined: tuple[Any, Ranks] = (None, ALONE)


def ranks() -> Ranks:
    """Those of the default process group, if there is one.

    Of a group that was not met yet, this makes the group by its side, for which all ranks have to come here.
    """
    global _joined
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if dist.get_world_size() == 1:
        return ALONE
    if _joined[0] is not dist.group.WORLD:
        _joined = dist.group.WORLD, Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group())
    return _joined[1]


def _lost(error: RuntimeError) -> RankLostError:
    return RankLostError(f"another rank has ended, or does not answer: {str(error).splitlines()[0]}")
