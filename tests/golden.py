"""Short runs of every method whose numbers must stay: old code beside new, bit for bit, and recorded numbers.

    make golden OLD=<commit>            trains every case by the command line with the code of that commit and with the
                                        working tree, float32 on the native kernels, and compares the runs bit for bit
    python -m tests.golden --record     writes tests/golden/*.json, which tests/train/test_golden.py compares with, anew

A run is compared by what its metrics say of each step, validation and update, and by its last weights. Only settings,
the command line and those fields are used, so the code beneath may take any form.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.runs import write_text

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "golden"
# Relative. Arithmetic is in float64, but runs that draw their grown weights part by 1e-8 between two processors. Other
# connections are seen at 1e-3.
TOLERANCE = 1e-6

COMMON = (
    # Bytes, without merges: no version of a tokenizer library moves a number.
    "data.tokenizer_vocab=257", "model.layers=1", "model.width=32", "model.heads=4", "model.context=16",
    "sparsity.sparsity=0.8", "training.steps=60", "training.batch_size=2", "training.learning_rate=0.01",
    "training.log_every=1", "training.validate_every=15", "training.validation_sequences=8", "training.device=cpu",
    "training.threads=1", "training.checkpoint_minutes=null", "tracking.sample_tokens=1",
)  # fmt: skip
TEACHER = ("teacher.enabled=true", "teacher.alpha=0.5")
TAUGHT = (*TEACHER, "teacher.warmup_fraction=0.1")
SUPAR = (
    "topology.proposer=shift", "parameterization.name=supar", "parameterization.dynamic=true",
    "parameterization.base_width=16",
)  # fmt: skip
WRITTEN = (
    "topology.every=6", "topology.candidates=3", "topology.mutation_rate=0.1", "topology.adaptation.patience=1",
    "topology.adaptation.mutation_rate=[0.03, 0.2]", "topology.proxy.terms.activity.weight=0.5",
    "topology.burn_in.steps=3", "topology.reset.probability=0.3", "topology.reset.patience=2",
    "topology.reset.boosted_probability=0.6",
    # So near to where the layers are that random candidates leave the bounds, are drawn again, and are given up.
    "sparsity.budget=uniform", "sparsity.min_density=0.19", "sparsity.max_density=0.21",
    "sparsity.head_min_density=0.1", "topology.redraws=2",
)  # fmt: skip

# name -> (method, settings): under these every rule moves connections, and the teacher teaches.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("dense", ("sparsity.sparsity=0.0", *TAUGHT)),
    "static": ("static", ()),
    "static-taught": ("static", (*TEACHER, "teacher.storage=dense", "teacher.warmup=validation")),
    "set": ("set", ("topology.every=7",)),
    "rigl": ("rigl", ("topology.every=7",)),
    "rigl-blocks": (
        "rigl",
        ("topology.every=7", "topology.accumulate=sum", "training.accumulation=2", "sparsity.unit=[4, 4]", *TAUGHT),
    ),
    "gse": ("gse", ("topology.every=7",)),
    "gse-grabo": ("gse", ("topology.every=7", "topology.sampling=grabo", "topology.scope=local")),
    "gse-graest": ("gse", ("topology.every=7", "topology.sampling=graest", "training.accumulation=2")),
    "gmp": ("gmp", ("topology.every=7",)),
    "gmp-global": ("gmp", ("topology.every=7", "topology.scope=global", "sparsity.unit=[4, 4]")),
    "granet": ("granet", ("topology.every=7",)),
    "granet-local": ("granet", ("topology.every=7", "topology.scope=local", *TAUGHT, "teacher.storage=union")),
    "magnitude": ("magnitude", ()),
    "sparsae-guided": ("sparsae-guided", TAUGHT),
    "sparsae-guided-blocks": ("sparsae-guided", (*TAUGHT, "sparsity.unit=[4, 4]", "training.accumulation=2")),
    "sparsae-one": ("sparsae-one", ("model.family=llama", "sparsity.head_min_density=0.05")),
    "sparsae-rigl": ("sparsae-rigl", ("topology.proxy.terms.activity.source=training",)),
    "random-search": ("random-search", ("topology.micro_batch.mode=static", "topology.micro_batch.study=true")),
    "supar-dynamic": ("sparsae-guided", SUPAR),
    "supar-normal": ("sparsae-guided", (*SUPAR, "topology.initialization=normal")),
    "sparsae-written": ("sparsae-written", WRITTEN),
    "sparsae-written-comma": (
        "sparsae-written",
        (
            *WRITTEN,
            "topology.selection=comma",
            "topology.burn_in.scope=all",
            "topology.micro_batch.mode=pooled",
            "topology.proxy.standardize=true",
            "topology.proxy.anneal=cosine",
        ),
    ),
}

# Normal draws differ between processors in float32's last bit, which no tolerance of float64 allows.
RECORDED = [case for case, (_, settings) in CASES.items() if "topology.initialization=normal" not in settings]

# Settings that had another name in commits without the file.
EARLIER = {
    ("sparsae/terms", "topology.proxy.terms.activity.weight"): "topology.proxy.activity_weight",
    ("sparsae/terms", "topology.proxy.terms.activity.source"): "topology.proxy.activity",
}

STEP = ("loss", "cross_entropy", "distillation", "gradient_norm", "nnz")
VALIDATION = ("loss", "teacher_loss")
UPDATE = ("nnz", "swaps", "accepted")
# Methods that had another name in commits without the file.
EARLIER_METHODS = {
    ("sparsae/config/methods/random-search.yaml", "random-search"): "random_search",
    ("sparsae/config/methods/sparsae-guided.yaml", "sparsae-guided"): "sparsae",
}
Columns = dict[str, list[Any]]


def settings_of(case: str, text: Path, cache: Path) -> tuple[str, list[str]]:
    """(method, overrides) of a case that trains on `text`."""
    method, own = CASES[case]
    return method, [f"data.source={text}", f"data.cache={cache}", *COMMON, *own]


def columns_of(run: Path) -> Columns:
    """What a run's metrics say that must not change. Raises KeyError where they do not say it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    columns: Columns = {}
    for kind, fields in (("train", STEP), ("validation", VALIDATION), ("topology", UPDATE)):
        of_kind = [row for row in rows if row["kind"] == kind]
        columns |= {f"{kind}.{name}": [row[name] for row in of_kind] for name in ("step", *fields)}
    return columns


def record(case: str, text: Path, out: Path, device: str = "cpu") -> Columns:
    """Train a case in this process, in float64 on the reference backend."""
    import torch

    from sparsae.config.load import resolve
    from sparsae.train import run

    def in_float64(*arguments: Any) -> Any:
        model = model_of(*arguments).double()
        for seed, weights in enumerate(model.parameters()):
            if weights.unique().numel() > 1:  # drawn; see RECORDED
                uniform = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                weights.data = ((uniform - 0.5) * 12**0.5 * float(f"{weights.std():.3g}")).to(weights.device)
        return model

    model_of = run.model_of
    method, overrides = settings_of(case, text, out / "cache")
    config = resolve(None, "demo", method, [*overrides, "sparsity.backend=reference", f"training.device={device}"])
    with mock.patch.object(run, "model_of", in_float64):
        run.start(config, out / case, quiet=True)
    return columns_of(out / case)


def recorded(case: str) -> Columns:
    """The numbers that the case had when it was recorded."""
    return json.loads((RECORDS / f"{case}.json").read_text("utf-8"))


def difference_from_record(case: str, folder: Path, device: str = "cpu") -> str | None:
    """Where a case that trains now parts from its recorded numbers; text and cache are kept in the folder."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    return first_difference(recorded(case), record(case, folder / "text", folder, device), TOLERANCE)


def write_record(case: str, columns: Columns) -> None:
    """Make these the numbers that a case shall have."""
    lines = [f'  "{name}": {json.dumps(values)}' for name, values in columns.items()]
    (RECORDS / f"{case}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def first_difference(old: Columns, new: Columns, tolerance: float = 0.0) -> str | None:
    """Where two runs' numbers part by more than the relative tolerance, None where they do not."""

    def equal(one: Any, two: Any) -> bool:
        return one == two or (None not in (one, two) and math.isclose(one, two, rel_tol=tolerance))

    if old.keys() != new.keys():
        return f"only one has {', '.join(old.keys() ^ new.keys())}"
    for name in old:
        steps = old[f"{name.partition('.')[0]}.step"]
        if len(old[name]) != len(new[name]):
            return f"{name}: {len(old[name])} rows and {len(new[name])}"
        for step, one, two in zip(steps, old[name], new[name], strict=True):
            if not equal(one, two):
                return f"{name} of step {step}: {one!r} and {two!r}"
    return None


def weights_of(run: Path) -> dict[str, bytes]:
    """The last checkpoint's model, tensor by tensor."""
    from safetensors.numpy import load_file

    newest = max((run / "checkpoints").glob("step-*"))
    return {name: tensor.tobytes() for name, tensor in load_file(newest / "model.safetensors").items()}


# An editable installation puts its own tree before any path; with its finder away, the first path counts.
_COMMANDS = """
import json, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
tree = sys.argv.pop(1)
sys.path.insert(0, tree)
import sparsae
from sparsae.cli import main
assert sparsae.__file__.startswith(tree), sparsae.__file__
for arguments in json.load(sys.stdin):
    sys.argv[1:] = arguments
    if main():
        raise SystemExit(f"failed: {arguments}")
"""


def train(cases: Sequence[str], source: Path, text: Path, out: Path) -> None:
    """Train cases by the command line of the package below `source`, in one process. SystemExit where one fails."""
    out.mkdir()
    commands = []
    for case in cases:
        method, overrides = settings_of(case, text, out / "cache")
        for (file, name), earlier in EARLIER_METHODS.items():
            if method == name and not (source / file).exists():
                method = earlier
        commands.append(["train", "--preset", "demo", "--method", method, "--out", str(out / case)])
        for override in overrides:
            for (file, name), earlier in EARLIER.items():
                if not (source / file).exists():
                    override = override.replace(f"{name}=", f"{earlier}=")
            commands[-1] += ["--set", override]
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, str(source)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=out,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit("\n".join([f"with {source}:", *done.stderr.splitlines()[-20:]]))


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The sources of a commit with native kernels: the working tree's where they are compiled from the same code."""

    def git(*arguments: str, check: bool = True) -> int:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=check, stdout=subprocess.DEVNULL).returncode

    tree = folder / "tree"
    git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        kernels = Path("src/sparsae/kernels/cpu")
        if git("diff", "--quiet", commit, "--", str(kernels / "csrc"), "CMakeLists.txt", check=False) == 0:
            for library in (ROOT / kernels).glob("_native.*"):
                shutil.copy(library, tree / kernels)
            yield tree / "src"
        else:
            site = folder / "site"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*pip, "--target", str(site), str(tree)], check=True)
            yield site
    finally:
        git("worktree", "remove", "--force", str(tree))


def compare(commit: str, cases: Sequence[str]) -> bool:
    """Print a row for each case, old code beside new; whether all are equal."""
    equal = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = write_text(folder / "text")
        with checked_out(commit, folder) as old:
            for side, source in {"old": old, "new": ROOT / "src"}.items():
                print(f"training {len(cases)} cases with the {side} code", flush=True)
                train(cases, source, text, folder / side)
        print(f"{'case':22} {'last loss':>19} {'validation':>19} {'nnz':>15} updates accepted  against {commit}")
        for case in cases:
            before, after = folder / "old" / case, folder / "new" / case
            new = columns_of(after)
            difference = first_difference(columns_of(before), new)
            if difference is None and weights_of(before) != weights_of(after):
                difference = "the last weights differ"
            equal = equal and difference is None
            nnz = f"{new['train.nnz'][0]:,}-{new['train.nnz'][-1]:,}"
            updates = f"{max(0, len(new['topology.step']) - 1):7} {sum(new['topology.accepted']):8}"
            row = f"{case:22} {new['train.loss'][-1]:19.16f} {new['validation.loss'][-1]:19.16f} {nnz:>15} {updates}"
            print(f"{row}  {'equal' if difference is None else difference}")
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", nargs="?", help="commit to compare the working tree with")
    parser.add_argument("--record", action="store_true", help="write tests/golden/*.json anew")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    if arguments.record == (arguments.old is not None):
        parser.error("name a commit to compare with, or --record")
    if not arguments.record:
        raise SystemExit(0 if compare(arguments.old, arguments.cases) else 1)
    with tempfile.TemporaryDirectory() as name:
        text = write_text(Path(name) / "text")
        for case in [case for case in RECORDED if case in arguments.cases]:
            columns = record(case, text, Path(name))
            write_record(case, columns)
            print(f"{case:22} {columns['train.loss'][-1]!r}, {sum(columns['topology.swaps'])} swaps")


if __name__ == "__main__":
    main()
