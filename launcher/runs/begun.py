"""A run that has begun: its settings against those of now, and its run.yaml as it is stored."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from motet.core.errors import Problem, UserError
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.output.terminal import cell
from motet.launcher.runs.rundir import RunDir

# What may differ when a run goes on. Everything else decides its tokens, its updates or its
# questions.
RESUMABLE = (
    r"layout\..*",
    r"family\.options\.stages\.\d+\.layout(\..*)?",
    r"(metrics|tracking|alerts)\..*",
    r"checkpoint\..*",
    r"probes\.batch_tokens",
    r"data\.verify",
    r"(data|validation)\.corpora\.\d+\.path",
    r"training\.(steps|tokens|compile)",
    r"training\.bad_steps\..*",
    r"training\.max_restarts",
    r"training\.hooks.*",  # hooks only read; new ones are refused: they are not in the snapshot
    r"slurm\..*",
    r"scheduler(_options\..*)?",
)


def yaml_with_overrides(text: str, overrides: Sequence[str]) -> str:
    """The user's file as it is stored: the settings of the command line follow as comments."""
    if not overrides:
        return text
    lines = "".join(f"#   {line}\n" for o in overrides for line in o.splitlines())
    return f"{text.rstrip()}\n\n# Given on the command line:\n{lines}"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> scalar."""
    if isinstance(value, Mapping | list) and value:
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        out: dict[str, Any] = {}
        for key, child in pairs:
            out |= flat(child, f"{path}.{key}" if path else str(key))
        return out
    return {path: value}


def differences(before: RunSettings, after: RunSettings) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: path -> (before, after). Where the folders lie does not count."""
    old, new = (flat(run_yaml.public(one, whole=True)) for one in (before, after))
    return {
        path: (old.get(path), new.get(path))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and path != "runs"
    }


def frozen_problems(before: RunSettings, after: RunSettings) -> list[Problem]:
    """Settings that may not change in the middle of a run; it may become longer, not shorter."""
    shorter = [
        Problem(
            "training.steps",
            f"{after.steps:,} steps are fewer than the {before.steps:,} that the plan was made "
            "for; a run can only be extended",
        )
    ]
    return [
        Problem(
            path,
            f"is {cell(old)} in this run and cannot become {cell(new)} when it goes "
            "on; "
            "start another run for that",
        )
        for path, (old, new) in differences(before, after).items()
        if not any(re.fullmatch(pattern, path) for pattern in RESUMABLE)
    ] + (shorter if after.steps < before.steps else [])


def unlike_frozen(manifest: Mapping[str, Any], settings: RunSettings) -> list[Problem]:
    """What may not change in a run, against the copy of its settings that was frozen with it.

    Settings that this version knows and that one did not are compared with their default.
    """
    if not manifest.get("config"):
        return []
    defaults = flat(run_yaml.public(RunSettings(), whole=True))
    frozen, now = flat(manifest["config"]), flat(run_yaml.public(settings, whole=True))
    return [
        Problem(path, f"is {cell(now.get(path))} and was {cell(then)}")
        for path in sorted(frozen.keys() | now.keys())
        if (then := frozen.get(path, defaults.get(path))) != now.get(path, defaults.get(path))
        and path not in ("runs", "base")
        and not any(re.fullmatch(pattern, path) for pattern in RESUMABLE)
    ]


def refuse_existing(settings: RunSettings, rundir: RunDir) -> None:
    """Never train over another run: `UserError` that says what is there and what would work."""
    if not rundir.resolved_yaml.exists():
        if rundir.root.is_dir() and any(rundir.root.iterdir()):
            raise UserError(f"name: {rundir.root} exists and is no run; choose another name=...")
        return
    try:
        changed = differences(run_yaml.load(rundir.resolved_yaml), settings)
    except UserError:
        changed = {"resolved.yaml": ("settings of another version", "these")}
    state = "is finished" if rundir.done.exists() else "exists"
    if not changed:
        advice = f"`motet report {_shown(rundir)}`" if rundir.done.exists() else ""
        advice = advice or f"`motet resume {_shown(rundir)}` goes on with it"
        raise UserError(f"name: the run {rundir.root} {state}, with these settings; {advice}")
    shown = [f"{p}: {cell(a)} there, {cell(b)} here" for p, (a, b) in changed.items()]
    more = f"\n  and {len(shown) - 8} more" if len(shown) > 8 else ""
    raise UserError(
        f"name: the run {rundir.root} {state}, with other settings; choose another name=...\n  "
        + "\n  ".join(shown[:8])
        + more
    )


def _shown(rundir: RunDir) -> str:
    relative = os.path.relpath(rundir.root)
    return str(rundir.root) if relative.startswith("..") else relative
