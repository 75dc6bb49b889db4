"""What tests of the native kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparsae.kernels.cpu import breakeven, native


@pytest.fixture(scope="module", params=["portable", "neon", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    if not native.select_isa(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    native.select_isa(before)


@pytest.fixture
def always_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakeven, "fusing_pays", lambda layouts, keeps, tokens: True)
