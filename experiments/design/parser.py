"""YAML entry -> `ExperimentSpec`: one small checker per setting, all problems collected."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from motet.core.errors import Problem
from motet.core.plugins import PluginError, is_plugin, mistakes_of
from motet.core.schema import MappingReader, is_flag, is_number, is_sequence, is_whole
from motet.experiments.design.declared import declared_problems
from motet.experiments.design.experiment import Experiment, Kinds
from motet.experiments.design.shares import declaration_problems
from motet.experiments.design.spec import (
    ALPHA,
    DOSE_UNITS,
    PLACEBOS,
    PLACEMENTS,
    PROBE_KINDS,
    SCHEDULE_KINDS,
    TESTS,
    VARIANTS,
    Arm,
    ExperimentSpec,
    Schedule,
    is_part,
)
from motet.experiments.design.treatments import arms_wrong

NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
MEMBER = re.compile(r"[a-z0-9][a-z0-9._-]*")
KEYS = (
    "name",
    "use",
    "hypothesis",
    "items",
    "generate",
    "doses",
    "arms",
    "dose_in",
    "weights",
    "schedule",
    "placement",
    "placebo",
    "block_by",
    "cluster_by",
    "probe_at",
    "judge_at",
    "margin",
    "alpha",
    "options",
    "member",
    "test",
    "shares_units_with",
    "size_slope",
)


class _Reader(MappingReader):
    UNKNOWN = "is not a setting"
    WRONG = "is {value}; it must be {what}"


def is_time(value: Any) -> bool:
    """A step (int >= 0) or a fraction of the run (float in [0, 1])."""
    return is_number(value) and (value >= 0 if isinstance(value, int) else 0.0 <= value <= 1.0)


def _is_period(value: Any) -> bool:
    return is_time(value) and value > 0


def parse_experiments(
    entries: Sequence[Mapping[str, Any]], base: Path, kinds: Kinds, alpha: float = ALPHA
) -> tuple[list[ExperimentSpec], list[Problem]]:
    """Read the `experiments:` list.

    Args:
        entries: as YAML has them.
        base: folder that paths are relative to.
        kinds: the classes that `use` may name.
        alpha: the run's significance level, which all its experiments share.

    Returns:
        the entries that could be read, and every problem found in any of them; a caller that wants
        to stop raises `raise_problems(problems)`.
    """
    specs: list[ExperimentSpec] = []
    problems: list[Problem] = []
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        message = f"is {type(entries).__name__}; it must be a list of experiments (- name: ...)"
        return [], [Problem("experiments", message)]
    for number, entry in enumerate(entries):
        spec, found = parse_entry(entry, number, base, kinds, alpha)
        problems += found
        if spec is not None:
            specs.append(spec)
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            message = "is the name of two experiments; names must be unique"
            problems.append(Problem(f"experiments.{spec.name}.name", message))
        seen.add(spec.name)
    if len(specs) == len(entries):
        problems += declaration_problems(specs)
    return specs, problems


def parse_entry(
    entry: Any, number: int, base: Path, kinds: Kinds, alpha: float = ALPHA
) -> tuple[ExperimentSpec | None, list[Problem]]:
    """Read one entry of the list. The spec is None when its name or class is unknown."""
    problems: list[Problem] = []
    where = f"experiments[{number}]"
    if not isinstance(entry, Mapping):
        message = f"is {entry!r}; it must be a mapping with at least name and use"
        return None, [Problem(where, message)]
    name = entry.get("name")
    if isinstance(name, str) and NAME.fullmatch(name):
        where = f"experiments.{name}"
    else:
        rule = "a lower-case letter, then up to 62 letters a-z, digits, _ or -"
        problems.append(Problem(f"{where}.name", f"is {name!r}; a name is {rule}"))
    use = entry.get("use")
    try:
        kind = kinds.kind(use if isinstance(use, str) else repr(use), f"{where}.use")
        use_sha256 = kinds.source_sha256(str(use), f"{where}.use")
    except PluginError as error:
        problems.append(error.problem)
        _Reader(entry, where, problems, KEYS)
        return None, problems
    given = {key: value for key, value in entry.items() if value is not None or key == "margin"}
    values = {**_inherited(kind.defaults, given), **given, **_scheduled(kind.defaults, given)}
    reader = _Reader(values, where, problems, KEYS)
    spec = ExperimentSpec(
        name=str(name),
        use=str(use),
        hypothesis=reader.text("hypothesis").strip(),
        items=_items(reader, base),
        generate=_generate(reader),
        arms=_arms(reader, kind.treatment == "global"),
        dose_in=reader.choice("dose_in", DOSE_UNITS, "exposures"),
        schedule=_schedule(reader),
        placement=reader.choice("placement", PLACEMENTS, "anywhere"),
        placebo=reader.choice("placebo", PLACEBOS, "matched"),
        block_by=_block_by(reader),
        cluster_by=reader.text("cluster_by").strip() or "auto",
        probe_at=_probe_at(reader),
        margin=_margin(reader),
        alpha=_alpha(reader, alpha),
        options=_options(reader, kind),
        role=kind.role,
        member=_member(reader),
        test=reader.choice("test", TESTS, "") or None,
        judge_at=_judge_at(reader),
        use_sha256=use_sha256,
        shares_units_with=_shares(reader),
        size_slope=reader.checked("size_slope", None, is_flag, "true or false") or None,
    )
    if not problems and isinstance(name, str):
        try:
            with mistakes_of(kind, f"{where}.use"):
                experiment = kind(spec)
                problems += experiment.definition_problems() + declared_problems(experiment)
        except PluginError as error:
            problems.append(error.problem)
    return (spec if isinstance(name, str) and NAME.fullmatch(name) else None), problems


def _alpha(reader: _Reader, alpha: float) -> float:
    """The run's: Holm's method over tests of different levels bounds no rate of errors, and a level
    of one's own turns a weak answer into a found one.
    """
    own = reader.values.get("alpha", alpha)
    if own != alpha:
        message = (
            f"is {own!r}; a run has one significance level for all its experiments and controls: "
            f"leave it out here (it is {alpha:g}), or set experiments.alpha before training"
        )
        reader.problem("alpha", message)
    return alpha


def _options(reader: _Reader, kind: type[Experiment]) -> dict[str, Any]:
    """Return the experiment's own options; its dataclass may refuse values as it is made."""
    try:
        return asdict(reader.options("options", kind.Options))
    except (ValueError, TypeError) as error:
        if not is_plugin(kind):
            raise
        reader.problems.append(Problem(f"{reader.where}.options", str(error)))
        return {}


def _inherited(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The class's defaults, less those that the entry replaces by an alternative setting."""
    inherited = dict(defaults)
    for one, other in (("doses", "arms"), ("items", "generate")):
        if one in given:
            inherited.pop(other, None)
        if other in given:
            inherited.pop(one, None)
    if ("doses" in given or "arms" in given) and "weights" not in given:
        inherited.pop("weights", None)
    return inherited


def _scheduled(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule that names no kind changes the class's schedule; one that names a kind replaces
    it.
    """
    schedule = given.get("schedule")
    if not isinstance(schedule, Mapping) or "kind" in schedule:
        return {}
    return {"schedule": {**defaults.get("schedule", {}), **schedule}}


def _member(reader: _Reader) -> str | None:
    accepts = lambda v: isinstance(v, str) and MEMBER.fullmatch(v)  # noqa: E731
    what = "the name of a member of the family, or whole"
    name = cast("str | None", reader.checked("member", None, accepts, what))
    return None if name == "whole" else name


def _judge_at(reader: _Reader) -> float | None:
    what = "a step >= 1, or a fraction of the run above 0.0 and up to 1.0"
    return cast("float | None", reader.checked("judge_at", None, _is_period, what))


def _shares(reader: _Reader) -> tuple[str, ...] | None:
    value = reader.values.get("shares_units_with", ())
    value = [value] if isinstance(value, str) else value
    if is_sequence(value) and all(isinstance(name, str) for name in value):
        return tuple(dict.fromkeys(value)) or None
    reader.refuse("shares_units_with", value, "a list of names of other experiments")
    return None


def _items(reader: _Reader, base: Path) -> Path | None:
    value = reader.values.get("items")
    if value is None:
        return None
    if "generate" in reader.values:
        reader.problem("generate", "is given together with items; keep one of the two")
    path = base / str(value)
    if not path.is_file():
        reader.problem("items", f"is {str(value)!r}; there is no file {path}")
    return path


def _generate(reader: _Reader) -> dict[str, Any]:
    if reader.values.get("items") is not None:
        return {}
    inner = reader.inner("generate", ("count", "seed"))
    return {"count": inner.whole("count", 64, 2), "seed": inner.whole("seed", 0, 0)}


def _arms(reader: _Reader, whole_run: bool) -> tuple[Arm, ...]:
    if "arms" in reader.values and "doses" in reader.values:
        reader.problem("arms", "is given together with doses; keep one of the two")
    if "arms" in reader.values:
        if "weights" in reader.values:
            reader.problem("weights", "goes with doses; with arms, give each arm its weight")
        arms = [_arm(reader, index, arm) for index, arm in enumerate(reader.sequence("arms"))]
        setting = "arms"
    else:
        doses = reader.sequence("doses")
        weights = reader.sequence("weights") or [1] * len(doses)
        if len(weights) != len(doses):
            reader.problem("weights", f"has {len(weights)} numbers for {len(doses)} doses")
            weights = [1] * len(doses)
        arms = [
            Arm(f"dose-{dose:g}" if is_number(dose) else str(dose), dose, "same", weight)
            for dose, weight in zip(doses, weights, strict=True)
        ]
        setting = "doses"
    _check_arms(reader, setting, arms, whole_run)
    return tuple(arms)


def _arm(reader: _Reader, index: int, value: Any) -> Arm:
    keys = ("name", "dose", "variants", "weight", "window")
    inner = _Reader(value, f"{reader.where}.arms[{index}]", reader.problems, keys)
    if not isinstance(value, Mapping):
        return Arm(f"arm-{index}", 0)
    name = inner.values.get("name")
    if not isinstance(name, str) or not name:
        inner.refuse("name", name, "text")
    if "dose" not in value:
        inner.problem("dose", "is missing; the control arm has dose: 0")
    variants = inner.choice("variants", VARIANTS, "same")
    what = "two shares of the schedule's window, [0.0, 0.1]"
    window = cast("list[float] | None", inner.checked("window", None, is_part, what))
    part = None if window is None else (float(window[0]), float(window[1]))
    return Arm(str(name), value.get("dose", 0), variants, value.get("weight", 1), part)


def _check_arms(reader: _Reader, setting: str, arms: Sequence[Arm], whole_run: bool) -> None:
    dose_in = reader.values.get("dose_in", "exposures")
    whole = dose_in != "share"
    for arm in arms:
        if not is_number(arm.dose) or arm.dose < 0 or (not whole and arm.dose >= 1):
            limit = "a number >= 0" if whole else "a share from 0 up to, not including, 1"
            reader.problem(setting, f"has the dose {arm.dose!r}; a dose is {limit}")
            return
        if whole and arm.dose != int(arm.dose):
            reader.problem(setting, f"has the dose {arm.dose!r}; doses in {dose_in} are whole")
        if not is_whole(arm.weight) or arm.weight < 1:
            reader.problem("weights", f"has {arm.weight!r}; a weight is a whole number >= 1")
    if wrong := arms_wrong(arms, whole_run):
        reader.problem(setting, wrong)
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        what = "doses" if setting == "doses" else "arm names"
        reader.problem(setting, f"repeats one of its {what}: {', '.join(names)}")


def _schedule(reader: _Reader) -> Schedule:
    inner = reader.inner("schedule", [field.name for field in fields(Schedule)])
    kind = inner.choice("kind", SCHEDULE_KINDS, "uniform")
    default = Schedule()
    at = tuple(inner.sequence("at"))
    if kind == "steps" and not at:
        inner.problem("at", "is empty; kind: steps needs the steps, e.g. at: [1000, 2000]")
    if wrong := [step for step in at if not is_time(step)]:
        inner.problem("at", f"has {wrong[0]!r}; a time is a step >= 0 or a fraction (0.0 to 1.0)")
        at = ()
    every = inner.checked("every", default.every, _is_period, "steps >= 1 or a fraction of the run")
    start = inner.checked("start", default.start, is_time, "a step >= 0 or a fraction of the run")
    return Schedule(kind, _window(inner), at, every, start, _token_range(inner, kind))


def _window(reader: _Reader) -> tuple[float, float]:
    default = Schedule().window
    value = reader.sequence("window") if "window" in reader.values else list(default)
    if len(value) != 2 or not all(is_time(edge) for edge in value):
        what = "two fractions of the run, [0.0, 0.9], or two steps, [100, 900]"
        reader.refuse("window", value, what)
        return default
    low, high = value
    if all(isinstance(edge, int) for edge in value) and high <= 1:
        reader.problem("window", f"is {value!r}, one step; for the whole run write [0.0, 1.0]")
    elif isinstance(low, int) != isinstance(high, int) and low != 0:
        reader.problem("window", f"is {value!r}; give two fractions (0.5) or two steps (500)")
    elif low >= high:
        reader.problem("window", f"is {value!r}; its end must come after its start")
    if isinstance(high, float):
        low = float(low)
    return low, high


def _token_range(reader: _Reader, kind: str) -> tuple[int, int] | None:
    value = reader.sequence("token_range")
    if kind == "tokens" and not value:
        reader.problem("token_range", "is missing; kind: tokens needs it, e.g. [0, 1000000]")
    if not value:
        return None
    if not (len(value) == 2 and all(map(is_whole, value)) and 0 <= value[0] < value[1]):
        reader.refuse("token_range", value, "[first, end] with 0 <= first < end")
        return None
    return value[0], value[1]


def _block_by(reader: _Reader) -> tuple[str, ...]:
    value = reader.values.get("block_by", ())
    value = [value] if isinstance(value, str) else value
    if is_sequence(value) and all(isinstance(name, str) for name in value):
        return tuple(value)
    reader.refuse("block_by", value, "a list of attribute names")
    return ()


def _probe_at(reader: _Reader) -> dict[str, Any]:
    inner = reader.inner("probe_at", PROBE_KINDS)
    values = dict(inner.values) or {"every": 0.1}
    if "every" in values:
        inner.checked("every", 0.1, _is_period, "a fraction of the run or steps >= 1")
    if "log_grid" in values:
        accepts = lambda v: isinstance(v, int) and v >= 1  # noqa: E731
        inner.checked("log_grid", 1, accepts, "how many points, at least 1")
    for kind, numbers in (("steps", int), ("fractions", (int, float))):
        if kind not in values:
            continue
        value = values[kind]
        if not (is_sequence(value) and all(is_time(v) and isinstance(v, numbers) for v in value)):
            inner.refuse(kind, value, f"a list of {kind}")
        elif kind == "fractions":
            if any(v > 1 for v in value):
                inner.problem(kind, f"is {value!r}; fractions lie between 0 and 1")
            values[kind] = [float(v) for v in value]
    return values


def _margin(reader: _Reader) -> float | None:
    accepts = lambda v: is_number(v) and v > 0  # noqa: E731
    value = reader.checked("margin", None, accepts, "above 0, in the unit of the outcome")
    return None if value is None else float(value)
