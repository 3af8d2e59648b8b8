"""JSON Schema (draft 2020-12) of a cluster.yaml, from the bounds that `file` checks with."""

from __future__ import annotations

from typing import Any

from motet.parallel.cluster import file
from motet.parallel.cluster.devices import DEVICES, LINKS, NETWORK_LATENCY_US

_Schema = dict[str, Any]


def cluster_schema() -> _Schema:
    """The schema of a whole cluster.yaml."""
    group = _object(
        file._GROUP_KEYS,
        name=_TEXT,
        device={"anyOf": [{"enum": sorted(DEVICES)}, _device()]},
        nodes=_whole(1, 1_000_000),
        devices_per_node=_whole(1, 1024),
        intra_node={"anyOf": [{"enum": sorted(LINKS)}, _link()]},
        inter_node=_link(),
        nics=_link(count=_whole(1, 64)),
        calibration=_object(
            file._CALIBRATION_KEYS, constants={"type": "object", "minProperties": 1}
        ),
    )
    group["required"] = ["device", "nodes", "devices_per_node"]
    ends = {"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    link = _link(between=ends)
    link["required"] = ["between"]
    top = _object(
        file.TOP_KEYS,
        groups={"type": "array", "items": group, "minItems": 1},
        links={"type": ["array", "null"], "items": link},
        currency={"type": ["string", "null"], "maxLength": file.MOST_CURRENCY},
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cluster.yaml of Motet",
        **top,
        "required": ["groups"],
    }


_TEXT: _Schema = {"type": "string", "minLength": 1}


def _object(keys: tuple[str, ...], **known: _Schema) -> _Schema:
    """A mapping with these keys and no others; what is said of some of them."""
    properties = {key: known.get(key, {}) for key in keys}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _whole(least: int, most: int) -> _Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _number(least: float, most: float, told: str = "") -> _Schema:
    found: _Schema = {"type": "number", "minimum": least, "maximum": most}
    return found | ({"description": told} if told else {})


def _device() -> _Schema:
    bounds = {name: _number(*limits) for name, limits in file.BOUNDS.items()}
    rates = {
        name: _object(file.DTYPES, **{one: _number(*file.PEAK_TFLOPS) for one in file.DTYPES})
        for name in ("peak_tflops", "measured_tflops")
    }
    likes = {"kind": _TEXT, "like": {"enum": sorted(DEVICES)}}
    return _object(file._DEVICE_KEYS, **likes, **bounds, **rates)


def _link(**more: _Schema) -> _Schema:
    return _object(
        (*file._LINK_KEYS, *more),
        gb_s=_number(1e-4, 1e6, "of one direction, gigabytes per second"),
        gbit_s=_number(1e-4, 8e6, "of one direction, gigabits per second"),
        latency_us=_number(0.1, 1e6),
        kind={"examples": sorted(NETWORK_LATENCY_US)},
        measured={"type": "boolean"},
        **more,
    )
