"""Task files of lm-eval with data of their own, which need no network."""

from __future__ import annotations

from pathlib import Path

from tests.support.tasks import write_lines

_FORM = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}, train: {data}}}, cache_dir: {cache}}}
output_type: {kind}
validation_split: validation
training_split: train
metadata: {{version: 1.0}}
{rest}
"""
_PAIRS = """
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
num_fewshot: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_WORD = """
doc_to_text: "{{good.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+good.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_ROLLING = """
doc_to_text: ""
doc_to_target: "{{good}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


def write_tasks(folder: Path, count: int = 12) -> Path:
    """Tasks `toy_pairs`, `toy_word` and `toy_rolling`, and the group `toy` of the first two."""
    rows = [
        {"good": f"item {n} of list {n} has {n % 7} parts", "bad": f"parts {n % 7} has {n} list of {n} item"}
        for n in range(count)
    ]
    data = write_lines(folder / "pairs.jsonl", rows)
    kinds = {"multiple_choice": ("toy_pairs", _PAIRS), "loglikelihood": ("toy_word", _WORD)}
    kinds["loglikelihood_rolling"] = ("toy_rolling", _ROLLING)
    for kind, (name, rest) in kinds.items():
        text = _FORM.format(name=name, data=data, cache=folder / "cache", kind=kind, rest=rest)
        (folder / f"{name}.yaml").write_text(text)
    group = "group: toy\ntask: [toy_pairs, toy_word]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "toy.yaml").write_text(group + "metadata: {version: 1.0}\n")
    return folder
