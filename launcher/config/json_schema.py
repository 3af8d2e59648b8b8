"""JSON Schema (draft 2020-12) of a run.yaml, from the same sections that read it.

Editors complete and check with it while one writes; `motet experiments check` and every start say
more. A value may be an interpolation, `${...}`, anywhere.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from motet.launcher.config.reference import EXPERIMENT_KEYS
from motet.launcher.config.sections import RunSettings
from motet.launcher.config.typed import fields_of, options_of

_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean"}
_BOUNDS = {
    "least": "minimum",
    "above": "exclusiveMinimum",
    "most": "maximum",
    "below": "exclusiveMaximum",
}
INTERPOLATION = {"type": "string", "pattern": r"^.*\$\{.+\}.*$"}


def run_schema() -> dict[str, Any]:
    """The schema of a whole run.yaml."""
    schema = _section(RunSettings)
    listed = schema["properties"]["experiments"]
    listed["anyOf"] = [listed["anyOf"][0], {"type": "array", "items": _experiment()}, _NULL]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "run.yaml of Motet",
        **schema,
        "required": ["name"],
    }


_NULL: dict[str, Any] = {"type": "null"}


def _section(cls: type) -> dict[str, Any]:
    properties = {}
    for key, (field, hint) in fields_of(cls).items():
        found = _value(field, hint)
        properties[key] = {"description": _told(field), **found}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _told(field: dataclasses.Field[Any]) -> str:
    unit = field.metadata["unit"]
    return f"{field.metadata['doc']} ({unit})" if unit else str(field.metadata["doc"])


def _value(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    free = field.metadata["kind"] == "free"
    if dataclasses.is_dataclass(hint):
        return {"anyOf": [_section(typing.cast(type, hint)), _NULL]}
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        if free:
            inner = _experiment()
        elif dataclasses.is_dataclass(element):
            inner = _section(typing.cast(type, element))
        else:
            inner = _scalar(field, element)
        return {"anyOf": [{"type": "array", "items": inner}, _NULL]}
    return {"type": ["object", "null"]} if free else _scalar(field, hint)


def _scalar(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    options = options_of(hint)
    wanted = next(option for option in options if option is not types.NoneType)
    # Text stays as it is written, a number or a date too: the reader takes it by the setting.
    plain: dict[str, Any] = {"type": ["string", "number", "boolean"]}
    if wanted is not str:
        plain = {"type": _KINDS[wanted]}
    if field.metadata["choices"]:
        plain = {"enum": list(field.metadata["choices"])}
    bounds = field.metadata["bounds"].items()
    plain |= {_BOUNDS[name]: limit for name, limit in bounds}
    found = [plain, INTERPOLATION] + ([_NULL] if types.NoneType in options else [])
    default = field.default
    told: dict[str, Any] = {}
    if default is not dataclasses.MISSING and default != "" and not isinstance(default, tuple):
        told["default"] = default
    return {"anyOf": found, **told}


def _experiment() -> dict[str, Any]:
    properties = {key: {"description": why} for key, (_, why) in EXPERIMENT_KEYS.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "use"],
        "additionalProperties": False,
    }
