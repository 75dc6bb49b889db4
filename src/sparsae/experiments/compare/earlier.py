"""Results that an earlier version wrote, in the form of this one: a page can be written of them again."""

from __future__ import annotations

from typing import Any

from sparsae.core.record import decode
from sparsae.errors import InputError
from sparsae.experiments.compare.plan import LEARNING_RATE
from sparsae.experiments.compare.record import SummaryRow
from sparsae.experiments.compare.summary import verdict_of


def of_now(content: dict[str, Any], origin: str) -> dict[str, Any]:
    """The content of a results.json; what the version that wrote it did not know is filled in. Changes its argument.

    Before there was a test, losses of validation were compared; before there were further settings, and grids that
    extend, a method's trials were all of the learning rate. Stars were of unadjusted p values; they are of Holm's,
    which lay beside them. Raises InputError for what no version wrote.
    """
    try:
        return _of_now(content, origin)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{origin}: no version of sparsae wrote this ({error!r}); the file is damaged") from None


def _of_now(content: dict[str, Any], origin: str) -> dict[str, Any]:
    content.setdefault("judged_by", "validation_loss")
    tuning = content["plan"].setdefault("tuning", {})
    tuning.setdefault("grid", {})
    content.setdefault("trial_share", tuning.get("share", 1.0))
    content.setdefault("contrasts", [])
    for index, entry in enumerate(content.get("summary", ())):
        if "planned" not in entry:
            entry |= {"planned": False, "verdict": "undecided"}
            read = decode(SummaryRow, entry, f"{origin}: summary[{index}]")
            entry["verdict"] = verdict_of(read, read.method == content["reference"])
    for group in content.get("tuning", ()):
        if "looks" not in group:
            rates = [trial["learning_rate"] for trial in group["trials"]]
            losses = [trial["validation_loss"] for trial in group["trials"]]
            look = {"setting": LEARNING_RATE, "around": {}, "values": rates, "added": [], "losses": losses}
            group["looks"] = [look | {"best": group["learning_rate"]}]
            group["settings"] = {LEARNING_RATE: group["learning_rate"]}
            group["edges"] = [LEARNING_RATE] if group["at_edge"] else []
    return content
