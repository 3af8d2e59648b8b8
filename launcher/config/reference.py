"""docs/reference.md, generated from the code: `python -m motet.launcher.config.reference
docs/reference.md`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from motet.launcher.config.model import ModelSettings
from motet.launcher.config.sections import RunSettings
from motet.launcher.config.typed import fields_of, options_of

_HEAD = """\
# Reference of run.yaml

Made from the code by `make docs`; a test fails when it is not current.

A run.yaml holds the sections below. Any setting can be given on the command line as well, as
`a.b.c=value` after the file: `motet train run.yaml training.steps=2000 data.corpora.0.weight=2`.
Unknown settings are errors, and every problem is told at once. Paths start from the folder of the
run.yaml (on the command line: from the working directory).

`${a.b.c}` takes the value of another setting and `${oc.env:NAME}` that of an environment variable.
Only places and logging (`runs`, `data.corpora.*.path`, `validation.corpora.*.path`,
`model.from_hf`, `layout.*`, `metrics.*`) may come from the environment, and their values are never
stored: `resolved.yaml`, the manifest and W&B keep `${oc.env:NAME}` as it was written.

Scalars are read as the type of their setting says: `name: no` is the text "no", `12:30` stays text,
and a whole number with a leading 0 is refused.
"""

# Keys of one experiment: (type, meaning). Defaults come from the class that `use` names.
EXPERIMENT_KEYS: dict[str, tuple[str, str]] = {
    "name": ("text", "unique; a lower-case letter, then letters, digits, `_` or `-`; required"),
    "use": (
        "text",
        "which experiment: a heading under 'Experiments', or a class of your own, "
        "`my_file.py:Class` or `package.module:Class`; required",
    ),
    "hypothesis": ("text", "a sentence, frozen before step 1 and printed in the report"),
    "items": ("path", "JSON lines, one unit per line; the fields are listed under 'Experiments'"),
    "generate": (
        "mapping",
        "`{count: 64, seed: 1}`: invent the units from a seed, instead of `items`",
    ),
    "doses": ("list", "how often a unit is shown, one arm per dose; must contain 0, the control"),
    "arms": (
        "list",
        "instead of `doses`: `{name, dose, variants: same|cycle, weight, window}`; `cycle` shows a "
        "unit's texts in turn; `window` is a part of a uniform schedule's, such as `[0.0, 0.1]`",
    ),
    "dose_in": (
        "text",
        "what a dose counts: {DOSE_UNITS}; the last three are totals of the arm, spread over its "
        "units",
    ),
    "weights": ("list", "whole numbers: how many units an arm gets relative to the others"),
    "schedule": (
        "mapping",
        "`kind`: {SCHEDULE_KINDS}; `window: [0.0, 0.9]`, `at`, `every`, `start` are fractions of "
        "the run when written with a "
        "point, steps otherwise; `token_range: [a, b]`",
    ),
    "placement": (
        "text",
        "{PLACEMENTS}: over any tokens, at the start of a sequence, or between two documents",
    ),
    "placebo": (
        "text",
        "{PLACEBOS}: units of dose 0 get i.i.d. base text of equal length, or nothing",
    ),
    "block_by": (
        "list",
        "attributes of the units; assignment is balanced within blocks, numbers are cut into "
        "quantiles",
    ),
    "cluster_by": (
        "text",
        "`auto` (near duplicates), `none`, or an attribute; units of a cluster get the same arm",
    ),
    "probe_at": (
        "mapping",
        "`{every: 0.1}`, `{steps: [...]}`, `{fractions: [...]}` or `{log_grid: 12}`",
    ),
    "judge_at": (
        "number",
        "when the primary outcome is judged, a fraction of the run or a step; the end of the run "
        "where left out. It is frozen: what later probes show is exploratory",
    ),
    "margin": (
        "number",
        "smallest effect of interest, in the outcome's unit; allows the verdict 'negligible'",
    ),
    "alpha": (
        "number",
        "not of one experiment: `experiments.alpha` holds for the whole run, and another value "
        "here is refused",
    ),
    "options": ("mapping", "settings of the class, listed under 'Experiments'"),
    "member": (
        "text",
        "the member of a family that the primary outcome is judged at, `whole` for the whole "
        "model; `experiments.member` where left out",
    ),
    "test": (
        "text",
        "{TESTS}: any dose against none (where left out), the slope per doubling of 1 + dose, or "
        "all arms against dose 0 at once, in whatever direction they differ",
    ),
    "shares_units_with": (
        "list",
        "names of other experiments whose texts tell of the same units, on purpose",
    ),
    "size_slope": (
        "true/false",
        "of a family: declares the slope of the effect over log2(parameters) as a further outcome "
        "with a verdict; Holm's correction counts it as one more question",
    ),
}


def table(rows: Iterable[Sequence[str]], heads: Sequence[str]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)]


def _type_name(hint: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true/false"}
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return f"list of {names.get(inner, 'mapping')}{'s' if inner in (int, float) else ''}"
    kinds = [option for option in options_of(hint) if option is not types.NoneType]
    return names.get(kinds[0], "mapping")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return "" if value == "" else str(value)


def _range(field: dataclasses.Field[Any]) -> str:
    if field.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    signs = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
    bounds = field.metadata["bounds"].items()
    return ", ".join(f"{signs[name]} {limit:,}" for name, limit in bounds)


def section_lines(cls: type, path: str, level: int) -> list[str]:
    """One section, then its sub-sections and the entries of its lists."""
    rows, inner = [], []
    for key, (field, hint) in fields_of(cls).items():
        full = f"{path}.{key}" if path else key
        element = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
        nested = hint if dataclasses.is_dataclass(hint) else element
        if dataclasses.is_dataclass(nested):
            where = full if nested is hint else f"{full}[]"
            inner += section_lines(typing.cast(type, nested), where, level + 1)
        if not dataclasses.is_dataclass(hint):
            kind = "path" if field.metadata["kind"] == "path" else _type_name(hint)
            unit, values = field.metadata["unit"], _range(field)
            rows.append((f"`{key}`", kind, _default(field), field.metadata["doc"], unit, values))
    title = f"{'#' * level} `{path}`" if path else "## The run"
    doc = inspect.getdoc(cls) or ""
    heads = ("setting", "type", "default", "meaning", "unit", "values")
    intro = " ".join(re.split(r"\n\w+:\n", doc)[0].split())  # what stands before "Attributes:"
    return ["", title, "", intro, "", *table(rows, heads), *inner]


def preset_lines() -> list[str]:
    """Sizes of the presets."""
    from motet.models import config as models
    from motet.models import counts

    rows = []
    for name, sizes in models.PRESETS.items():
        count = counts.parameters_non_embedding(models.preset(name, 1 << 15))
        columns = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ffn", "rope_theta")
        rows.append((f"`{name}`", *(f"{sizes[c]:,.0f}" for c in columns), f"{count:,}"))
    heads = ("preset", *columns, "parameters without embeddings")
    defaults = [
        (f"`model.{field.name}`", str(field.default))
        for field in dataclasses.fields(models.ModelConfig)
        if field.default is not dataclasses.MISSING and hasattr(ModelSettings, field.name)
    ]
    return [
        "",
        "## Presets of `model.preset`",
        "",
        *table(rows, heads),
        "",
        "Where `model` and the preset say nothing:",
        "",
        *table(defaults, ("setting", "value")),
    ]


def experiment_lines() -> list[str]:
    """Keys of one experiment, then every class of the library."""
    from motet.experiments.design import spec as specs
    from motet.experiments.library.kinds import LIBRARY

    words = {
        name: " ".join(f"`{word}`" for word in getattr(specs, name))
        for name in ("DOSE_UNITS", "SCHEDULE_KINDS", "PLACEMENTS", "PLACEBOS", "TESTS")
    }
    rows = []
    for key, (kind, meaning) in EXPERIMENT_KEYS.items():
        for name, shown in words.items():
            meaning = meaning.replace(f"{{{name}}}", shown)
        rows.append((f"`{key}`", kind, meaning))
    out = ["", "## One experiment", "", "An entry of `experiments.list`.", ""]
    out += table(rows, ("key", "type", "meaning"))
    out += ["", "## Experiments"]
    for use, experiment in LIBRARY.items():
        out += _class_lines(use, experiment)
    return out


def _class_lines(use: str, kind: Any) -> list[str]:
    out = [
        "",
        f"### `use: {use}`",
        "",
        f"{kind.description[0].upper()}{kind.description[1:]}. {kind.protocol}",
    ]
    needed = [
        *(f"`{name}`" for name in kind.fields),
        *(f"`{name}` (optional)" for name in kind.optional_fields),
    ]
    out += ["", f"Fields of a line of `items`: `id`, {', '.join(needed)}." if needed else ""]
    defaults = [(f"`{key}`", f"`{value}`") for key, value in kind.defaults.items()]
    out += ["", *table(defaults, ("setting", "default"))]
    options = dataclasses.fields(kind.Options)
    if options:
        doc = " ".join((inspect.getdoc(kind.Options) or "").split())
        rows = [(f"`options.{field.name}`", f"`{field.default}`") for field in options]
        out += ["", *table(rows, ("option", "default")), "", doc]
    return out


def reference() -> str:
    """The whole page."""
    lines = [
        _HEAD.rstrip(),
        *section_lines(RunSettings, "", 2),
        *preset_lines(),
        *experiment_lines(),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the page to the file that is named, or print it."""
    if arguments:
        Path(arguments[0]).write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
