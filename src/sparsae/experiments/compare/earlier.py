"""Results that an earlier version wrote, in the form of this one: a page can be written of them again."""

from __future__ import annotations

from typing import Any

from sparsae.experiments.compare.plan import LEARNING_RATE
from sparsae.experiments.compare.summary import verdict_of


def of_now(results: dict[str, Any]) -> dict[str, Any]:
    """The content of a results.json; what the version that wrote it did not know is filled in. Changes its argument.

    Before there was a test, losses of validation were compared; before there were further settings, and grids that
    extend, a method's trials were all of the learning rate. Stars were of unadjusted p values; they are of Holm's,
    which lay beside them.
    """
    results.setdefault("judged_by", "validation_loss")
    tuning = results.get("plan", {}).get("tuning", {})
    tuning.setdefault("grid", {})
    results.setdefault("trial_share", tuning.get("share", 1.0))
    results.setdefault("contrasts", [])
    for entry in results.get("summary", ()):
        if "planned" not in entry:
            entry["planned"] = False
            entry["verdict"] = verdict_of(entry, entry["method"] == results["reference"])
        entry.setdefault("settings", {})
        entry.setdefault("test_loss", None)
    for group in results.get("tuning", ()):
        if "looks" not in group:
            rates = [trial["learning_rate"] for trial in group["trials"]]
            losses = [trial["validation_loss"] for trial in group["trials"]]
            look = {"setting": LEARNING_RATE, "around": {}, "values": rates, "added": [], "losses": losses}
            group["looks"] = [look | {"best": group["learning_rate"]}]
            group["settings"] = {LEARNING_RATE: group["learning_rate"]}
            group["edges"] = [LEARNING_RATE] if group["at_edge"] else []
    return results
