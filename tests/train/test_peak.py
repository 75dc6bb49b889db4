"""Operations a second, and what they are held against."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sparsae.config.training import TrainingConfig
from sparsae.report.page import write_report
from sparsae.runs.directory import RunDirectory
from sparsae.runs.rows import TrainRow
from sparsae.train.peak import peak_flops, published
from sparsae.train.run import start
from tests.support.runs import config_of, write_text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_device_is_known_by_its_name_and_no_other_by_one_that_is_like_it(name: str, peak: float | None) -> None:
    assert published(name) == peak


def test_the_setting_goes_before_what_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert peak_flops(TrainingConfig(precision="bfloat16"), cuda) == 989e12
    assert peak_flops(TrainingConfig(precision="bfloat16", peak_flops=5e14), cuda) == 5e14
    assert peak_flops(TrainingConfig(), cuda) is None  # whose products in float32 have another peak
    assert peak_flops(TrainingConfig(), cpu) is None
    assert peak_flops(TrainingConfig(peak_flops=1e11), cpu) == 1e11


@pytest.mark.parametrize("peak", [None, 2e11])
def test_rows_summary_and_report_say_what_was_achieved(tmp_path: Path, peak: float | None) -> None:
    text, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    setting = [] if peak is None else [f"training.peak_flops={peak}"]
    start(config_of(text, cache, *setting, method="set"), tmp_path / "run", quiet=True)
    run = RunDirectory(tmp_path / "run")
    rows, summary = run.read_metrics(TrainRow), run.read_summary()
    assert summary is not None
    counted = [b.train_flops - a.train_flops for a, b in pairwise(rows)]
    for row, flops in zip(rows, [rows[0].train_flops, *counted], strict=True):
        tokens = 3 * 2 * 16  # since the row before
        assert row.flops_per_second == pytest.approx(flops * row.tokens_per_second / tokens)
        assert row.mfu == (None if peak is None else pytest.approx(row.flops_per_second / peak))
    seconds = summary.tokens / summary.tokens_per_second  # type: ignore[operator]
    assert summary.flops_per_second == pytest.approx(summary.train_flops / seconds)
    assert summary.mfu == (None if peak is None else pytest.approx(summary.flops_per_second / peak))  # type: ignore[operator]
    page = write_report(tmp_path / "run").read_text("utf-8")
    assert "FLOP a second" in page
    assert ("of the peak (MFU)" in page) == ("Model FLOPs utilization" in page) == (peak is not None)
