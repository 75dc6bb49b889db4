"""What the saved state of a Sparsifier is held against, before anything of it is loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from sparsae.config.difference import differences
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.topology import digest
from sparsae.errors import InputError, require_state
from sparsae.nn.linear import SparseLinear

log = logging.getLogger(__name__)

# What every state has; those without an age of connections may lack "ramp", those of earlier versions "settings".
_KEYS = ("step", "rule", "search", "burn_in", "initial_densities", "topologies", "teacher")


def digests(layers: Mapping[str, SparseLinear]) -> dict[str, str]:
    """Of the connections of each layer, by its name."""
    return {name: digest(layer.topology.indices).hex() for name, layer in layers.items()}


def settings_digest(config: SparsifierConfig) -> bytes:
    """Of all settings."""
    return hashlib.blake2b(config.model_dump_json().encode(), digest_size=8).digest()


def refuse_other_state(
    state: Mapping[str, Any], rule: str, layers: Mapping[str, SparseLinear], has_teacher: bool
) -> None:
    """Raise InputError for a state of other layers or connections, of another rule, or with a teacher in one alone."""
    require_state("Sparsifier", state, _KEYS)
    if state["rule"] != rule:
        raise InputError(
            f"the state is of rule '{state['rule']}', not of '{rule}': make the Sparsifier with the rule that it had "
            "when it was saved"
        )
    if other := sorted(set(state["topologies"]) ^ set(layers)):
        raise InputError(f"the state is of other sparse layers: {other[0]} is in only one of state and model")
    for name, own in digests(layers).items():
        if state["topologies"][name] != own:
            raise InputError(
                f"the state is of other connections of {name}: load the model's state of the same step first"
            )
    if (state["teacher"] is None) != (not has_teacher):
        raise InputError("only one of the state and this Sparsifier has a teacher: make it with the same `teacher`")


def tell_other_settings(state: Mapping[str, Any], config: SparsifierConfig) -> None:
    """Log a warning where a state is of a training with other settings, but for a longer one, or is behind its end."""
    here, step = config.model_dump(mode="json"), int(state["step"])
    there = {**state.get("settings", here), "steps": config.steps}
    if changed := [f"{d.name} {d.here} (was {d.there})" for d in differences(there, here)]:
        log.warning("the state is of other settings; from here on: %s", ", ".join(changed))
    if step > config.steps:
        log.warning("the state is of step %d, and the schedules end at steps=%d: nothing moves", step, config.steps)
