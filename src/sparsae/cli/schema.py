"""`sparsae schema`: what editors complete and check settings and plans by."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsae.config.complaints import nearest, shown
from sparsae.config.editors import json_schema, plan_schema
from sparsae.errors import InputError
from sparsae.experiments.registry import KINDS
from sparsae.files import to_json

_RUN = "run"


def schema(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help=f"Of what: {_RUN}, or a plan of kind {', '.join(KINDS)}.")
    ] = _RUN,
) -> None:
    """Write the JSON schema of a settings file, or of a plan, for editors."""
    if kind != _RUN and kind not in KINDS:
        raise InputError(f"KIND: no kind {shown(kind)}; {nearest(kind, (_RUN, *KINDS))}")
    typer.echo(to_json(json_schema() if kind == _RUN else plan_schema(KINDS[kind].plan), indent=2))
