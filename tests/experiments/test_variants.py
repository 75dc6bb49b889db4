"""Ablations and sensitivity: the variants they name, and what a study of candidates measures and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from sparsae.cli import main
from sparsae.config import TeacherConfig
from sparsae.config.load import resolve
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.compare.ranking import rank_agreement
from sparsae.experiments.compare.variants import ABLATIONS, WRITTEN, ablation_variants, sensitivity_variants
from sparsae.experiments.plan import parse_plan
from sparsae.rules import StaticConfig
from sparsae.search.rows import CandidateRow
from tests.support.records import candidate_row, topology_row

TINY = {
    "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
    "data": {"tokenizer_vocab": 300},
    "training": {"steps": 20, "batch_size": 2, "validation_sequences": 4, "device": "cpu", "log_every": 5},
    "topology": {"every": 4},
}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan file with the settings of tiny runs, whose topology is updated every four steps."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"item {j} has {j % 7} parts and {j % 3} colours" for j in range(3000)))
    settings = {**TINY, "data": {**TINY["data"], "source": str(text), "cache": str(tmp_path / "cache")}}
    (tmp_path / "plan.yaml").write_text(json.dumps({"settings": settings}))
    return tmp_path / "plan.yaml"


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


class TestAblations:
    @pytest.mark.parametrize("method", ABLATIONS)
    def test_each_changes_one_thing_of_the_method(self, method: str) -> None:
        whole = resolve(method=method)
        seen = []
        for number, (name, variant) in enumerate(ablation_variants(method).items()):
            config = parse_plan({"variants": {name: variant}, "cadence": None}, "here", ComparisonPlan).config(
                name, 0.9, 0
            )
            assert (config == whole) == (number == 0)
            assert config.training == whole.training
            assert config not in seen
            seen.append(config)

    def test_without_evolution_the_teacher_stays(self) -> None:
        variants = ablation_variants(WRITTEN, ["no-evolution-static", "no-teacher"])
        plan = parse_plan({"variants": variants, "settings": {"topology": {"every": 7}}}, "here", ComparisonPlan)
        still, untaught = (plan.config(name, 0.9, 0) for name in variants)
        assert still.topology == StaticConfig()
        assert still.teacher == resolve(method=WRITTEN).teacher
        assert untaught.teacher == TeacherConfig(**{**still.teacher.model_dump(), "enabled": False})
        assert untaught.topology == resolve(method=WRITTEN, overrides=["topology.every=7"]).topology

    def test_the_command_compares_with_sparsae_written(self, plan: Path, tmp_path: Path) -> None:
        command = ["ablate", str(plan), "--method", WRITTEN, "--variants", "written,no-teacher"]
        assert main([*command, "--seeds", "2", "--match", "steps", "--out", str(tmp_path / "out")]) == 0
        found = results(tmp_path / "out")
        assert (found["kind"], found["reference"]) == ("ablation", "written")
        teacher = {row["method"]: row["train_flops_by_part"]["teacher"] for row in found["rows"]}
        assert teacher["written"] > 0 == teacher["no-teacher"]
        assert "Ablation" in (tmp_path / "out" / "report.html").read_text()

    @pytest.mark.slow
    def test_the_default_is_compared_with_itself_less_its_parts(self, plan: Path, tmp_path: Path) -> None:
        command = ["ablate", str(plan), "--seeds", "2", "--match", "steps", "topology.every=10"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        found = results(tmp_path / "out")
        assert found["reference"] == "sparsae"
        assert {row["method"] for row in found["rows"]} == set(ABLATIONS["sparsae"])
        assert all((row["updates"] > 0) == (row["method"] != "no-updates") for row in found["rows"])

    @pytest.mark.parametrize(
        ("options", "hint"),
        [
            (["--variants", "no-rump"], "no ablation 'no-rump' of sparsae; did you mean no-ramp"),
            (["--variants", "no-teacher"], "no ablation 'no-teacher' of sparsae"),
            (["--method", "rigl"], "--method: no ablations of 'rigl'; one of: sparsae, sparsae-written"),
        ],
    )
    def test_an_unknown_one_is_refused(
        self, options: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["ablate", *options, "--out", str(tmp_path / "out")]) == 2
        assert hint in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestSensitivity:
    def test_variants_cover_sizes_and_modes(self) -> None:
        variants = sensitivity_variants("sparsae-guided", [1, 16], ["static", "pooled"])
        assert list(variants) == ["static-1", "static-16", "pooled-1", "pooled-16"]
        config = parse_plan({"variants": variants}, "here", ComparisonPlan).config("pooled-16", 0.9, 0)
        assert config.topology.rule == "evolution"
        batch = config.topology.micro_batch
        assert (batch.mode, batch.sequences, batch.study) == ("pooled", 16, True)

    def test_a_method_that_scores_nothing_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for method in ("static", "sparsae-one"):
            assert main(["sensitivity", "--method", method, "--out", str(tmp_path / "out")]) == 2
            assert f"--method: {method} compares no candidates" in capsys.readouterr().err

    def test_the_command_ranks_candidates_on_all_validation_text(self, plan: Path, tmp_path: Path) -> None:
        command = ["sensitivity", str(plan), "--sequences", "1,8", "--modes", "resampled", "--seeds", "2"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        found = results(tmp_path / "out")
        assert [entry["method"] for entry in found["ranking"]] == ["resampled-1", "resampled-8"]
        for row in found["rows"]:
            assert row["steps"] == 20
            assert row["study_flops"] > 0
            assert row["train_flops"] == sum(row["train_flops_by_part"].values())
            assert row["ranking"]["updates"] == row["updates"] == 4
            assert -1 <= row["ranking"]["kendall_tau"] <= 1
        assert 'id="ranking"' in (tmp_path / "out" / "report.html").read_text()

    def test_a_study_changes_nothing_but_the_rows(self, plan: Path, tmp_path: Path) -> None:
        variants = {
            "plain": {"method": WRITTEN},
            "studied": {"method": WRITTEN, "settings": {"topology": {"micro_batch": {"study": True}}}},
        }
        tree = {**json.loads(plan.read_text()), "variants": variants, "seeds": [3], "match": "steps"}
        plan.write_text(json.dumps(tree))
        assert main(["compare", str(plan), "--out", str(tmp_path / "out")]) == 0
        plain, studied = results(tmp_path / "out")["rows"]
        same = ("validation_loss", "train_flops", "accepted_updates", "nnz")
        assert [plain[key] for key in same] == [studied[key] for key in same]
        assert plain["study_flops"] == 0 < studied["study_flops"]


def candidate(score: float, micro: float, whole: float | None) -> CandidateRow:
    return candidate_row(score, terms={"cross_entropy": micro}, validation_cross_entropy=whole)


def test_agreement_of_rankings_by_hand() -> None:
    """Three of four and one of one: tau 1 - 2 (1 / 6) of six pairs, one swapped, and -1 of one pair."""
    three = (candidate(1, 1.0, 5.0), candidate(2, 1.1, 5.2), candidate(3, 1.2, 5.1))
    first = topology_row(1, candidates=three, current=candidate(4, 1.3, 5.9))
    two = (candidate(1, 2.0, 7.0), candidate(9, 9.0, None))
    second = topology_row(2, candidates=two, current=candidate(2, 2.1, 6.5))
    unstudied = topology_row(3, candidates=(candidate(1, 2.0, None),))
    found = encode(rank_agreement([first, second, unstudied]))
    assert found["updates"] == 2
    assert found["kendall_tau"] == pytest.approx((2 / 3 - 1) / 2)
    micro = [-0.15, -0.05, 0.05, 0.15, -0.05, 0.05]
    whole = [-0.3, -0.1, -0.2, 0.6, 0.25, -0.25]
    assert found["correlation"] == pytest.approx(stats.pearsonr(micro, whole).statistic)
    assert encode(rank_agreement([unstudied])) == {"updates": 0, "kendall_tau": None, "correlation": None}


class TestDenseSmall:
    @pytest.mark.parametrize("preset", ["demo", "tiny", "llama-130m"])
    @pytest.mark.parametrize("sparsity", [0.8, 0.95])
    def test_it_has_as_many_parameters_as_are_active(self, preset: str, sparsity: float) -> None:
        from sparsae.train.forecast import forecast

        given = {"--sparsity": ("sparsity.sparsity", sparsity)}
        sparse = forecast(resolve(None, preset, "static", options=given))
        config = resolve(None, preset, "dense-small", options=given)
        small = forecast(config)
        assert small["parameters"] == small["parameters_dense"]
        assert small["parameters"] == pytest.approx(sparse["parameters"], rel=0.01)
        full = resolve(None, preset, "static").model
        assert (config.model.layers, config.model.heads) == (full.layers, full.heads)
        assert config.model.width < full.width

    def test_its_settings_are_settled_once(self, tmp_path: Path) -> None:
        from sparsae.config.text import dump

        config = resolve(method="dense-small")
        (tmp_path / "config.yaml").write_text(dump(config))
        assert resolve(tmp_path / "config.yaml") == config
        # The file run again with another method is that method's, at the preset's width.
        assert resolve(tmp_path / "config.yaml", method="static") == resolve(method="static")

    def test_what_cannot_be_as_small_is_refused(self) -> None:
        with pytest.raises(InputError, match="no width has as few"):
            resolve(method="dense-small", overrides=["sparsity.sparsity=0.999", "model.heads=128", "model.layers=24"])
