"""JSON schemas of settings files, by which editors complete and check what is written."""

from __future__ import annotations

from typing import Any

from sparsae.config.rules import RuleConfig, TermConfig
from sparsae.config.schema import Config, ModelConfig
from sparsae.config.section import Section
from sparsae.config.shipped import methods, presets
from sparsae.families import FAMILIES
from sparsae.registry import RULES, TERMS

_DIALECT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def json_schema() -> dict[str, Any]:
    """Of a run's settings, those of every rule and term that is known here among them."""
    schema = Config.model_json_schema()
    rules, terms = [], {}
    for name in RULES.names():
        rules.append(_schema_of(RULES[name].settings, schema["$defs"]))
        rules[-1]["properties"]["rule"] |= {"const": name, "default": name}
    for name in TERMS.names():
        terms[name] = {"anyOf": [_schema_of(TERMS[name].settings, schema["$defs"]), {"type": "null"}]}
    schema["$defs"][ModelConfig.__name__]["properties"]["family"] |= {"enum": list(FAMILIES.names())}
    schema["properties"]["preset"] |= {"enum": list(presets())}
    schema["properties"]["method"] |= {"enum": list(methods())}
    # Some settings are those of several rules, and the rule itself may be named elsewhere.
    schema["properties"]["topology"] = {"anyOf": rules, "title": "Topology"}
    own = {"additionalProperties": {"anyOf": [*rules, {"type": "null"}]}}
    schema["properties"]["rules"] |= own
    for definition in schema["$defs"].values():
        for field in definition.get("properties", {}).values():
            if f"/{TermConfig.__name__}" in str(field.get("additionalProperties")):
                field |= {"properties": terms, "additionalProperties": False}
    for base in (RuleConfig, TermConfig):
        schema["$defs"].pop(base.__name__, None)
    return {**_DIALECT, **schema}


def plan_schema(plan: type[Section]) -> dict[str, Any]:
    """Of a plan's file: wherever it has `settings`, they are a run's."""
    run, schema = json_schema(), plan.model_json_schema()
    run.pop("$schema")
    definitions = schema.get("$defs", {}) | run.pop("$defs")
    for section in (schema, *definitions.values()):
        for name, field in section.get("properties", {}).items():
            if name == "settings":
                field |= {"$ref": f"#/$defs/{Config.__name__}"}
                field.pop("additionalProperties", None)
    properties = schema["properties"]
    properties["preset"] |= {"enum": list(presets())}
    # How many seeds, in place of a list.
    properties["seeds"] = {"anyOf": [properties["seeds"], {"type": "integer", "minimum": 1, "maximum": 1000}]}
    return {**_DIALECT, **schema, "$defs": {**definitions, Config.__name__: run}}


def _schema_of(section: type[Section], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a registered section; those that it refers to are put beside the others."""
    schema = section.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= schema.pop("$defs", {})
    return schema
