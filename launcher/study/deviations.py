"""How what is asked and judged now differs from what was frozen before step 1, in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from motet.core.files import read_json
from motet.core.hashing import canonical_json
from motet.experiments.design.assignment import Question
from motet.experiments.design.frozen import judging_sha256
from motet.experiments.library.kinds import Library
from motet.experiments.stream.ledger import readable_segments
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.launcher.study.before_training import specs_of


def altered(run: RunDir, sha256: str) -> list[str]:
    """Return every sign that the definition is not the one that was frozen before step 1."""
    keepers = {"the run's manifest": read_json(run.manifest)["definition_sha256"]}
    for segment in readable_segments(run.ledger):
        keepers[f"segment {segment.segment} of the ledger"] = segment.definition_sha256
    for step in run.checkpoint_steps():
        manifest = read_checkpoint(run, step)
        keepers[f"the checkpoint after step {step:,}"] = manifest["definition_sha256"]
    differing = [keeper for keeper, kept in keepers.items() if kept != sha256]
    if not differing:
        return []
    return [
        f"the definition ({sha256[:12]}...) is not the one that {', '.join(differing[:3])} was "
        "frozen with"
    ]


def changed_settings(
    run: RunDir, settings: RunSettings, definition: Mapping[str, Any]
) -> list[str]:
    """Return how the settings now ask otherwise than was frozen; what was frozen is used."""
    deviations = []
    analysis = definition["analysis"]
    for name in ("draws", "alpha"):
        asked = getattr(settings.experiments, name)
        if analysis.get(name, asked) != asked:
            deviations.append(
                f"the settings now say experiments.{name}={asked}; the frozen "
                f"{analysis[name]} is used"
            )
    own = {entry["spec"]["alpha"] for entry in definition["experiments"]}
    if len(own) > 1:
        levels = ", ".join(f"{alpha:g}" for alpha in sorted(own))
        deviations.append(
            f"experiments were frozen with several alphas ({levels}); all are judged at the "
            "smallest"
        )
    try:
        specs, problems = specs_of(settings, Library(run.plugins))
        now = {spec.name: canonical_json(spec.to_json()) for spec in specs}
    except OSError as error:
        return [*deviations, f"a file of items cannot be read any more ({error.filename})"]
    frozen = {
        entry["spec"]["name"]: canonical_json(entry["spec"]) for entry in definition["experiments"]
    }
    changed = sorted(
        name for name in frozen.keys() | now.keys() if frozen.get(name) != now.get(name)
    )
    if changed or problems:
        what = ", ".join(changed) or "; ".join(str(problem) for problem in problems)
        deviations.append(
            f"the settings now define {what} differently; the frozen definition is used"
        )
    return deviations


def other_judging(
    run: RunDir, definition: Mapping[str, Any], questions: Sequence[Question]
) -> list[str]:
    """Return how this version of the code judges otherwise than the one that froze the run, and
    what to type to have it judged by that one.
    """
    frozen = definition.get("judged_by_sha256")
    found = []
    if frozen is not None and frozen != judging_sha256():
        found.append(
            "this Motet's analysis is not the one that the run was frozen with; "
            + own_code_told(run)
        )
    return found + [
        f"this version judges {question.name} by other outcomes than were frozen"
        for entry, question in zip(definition["experiments"], questions, strict=True)
        if canonical_json([outcome.frozen() for outcome in question.experiment.outcomes])
        != canonical_json(entry["outcomes"])
    ]


def own_code_told(run: RunDir) -> str:
    """How to report on a run with the code that it was frozen with, as a command to be typed."""
    if not (run.code / "motet").is_dir():
        return "its own is no longer in the run's folder (code/), so no verdict can be had"
    code, root = (shlex.quote(str(path.absolute())) for path in (run.code, run.root))
    return (
        f"its own is kept in the run's folder and judges it: PYTHONPATH={code} motet report {root} "
        "(once that was typed, its verdicts stay on every later page)"
    )
