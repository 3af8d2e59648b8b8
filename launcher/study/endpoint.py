"""Where a run stands against the steps at which it was frozen to be judged.

The frozen run ends, for each experiment, at its step of judgement. What makes the weights there
other than they would have been, or shows figures of another step, is found here and told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motet.experiments.analysis.scores import first_segment
from motet.experiments.design.frozen import judged_steps
from motet.experiments.stream.ledger import Stretch
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.begun import flat
from motet.launcher.runs.lr_schedule import learning_rate
from motet.launcher.runs.rundir import RunDir

MOVING = re.compile(
    r"seed|(model|family|batch)\..*|data\.(seed|sequence_length|document_masks|corpora\.\d+\.weight)"
    r"|training\.(optimizer|schedule|bad_steps)\..*|training\.(clip_norm|z_loss|precision)"
)
"""Settings that decide the weights. How the run is laid out moves only their last digits."""


@dataclass(frozen=True)
class Standing:
    """What the verdicts of a run are worth now.

    Attributes:
        kind: "judged" at the frozen steps; "interim" before them; "exploratory" where the frozen
            judgement cannot be made.
        step: of the newest checkpoint.
        judged_at: the frozen step by experiment.
        told: what the first line of the report says of it; empty when there is nothing to say.
        why: why there are no verdicts, to end `No verdict: ...`; "" when judged.
        beyond: why figures of the newest weights are exploratory; "" when there are none.
        taken_back: whether the newest weights did not grow from those that are judged.
    """

    kind: str
    step: int
    judged_at: dict[str, int]
    told: list[str] = field(default_factory=list)
    why: str = ""
    beyond: str = ""
    taken_back: bool = False


@dataclass(frozen=True)
class Ends:
    """The steps of judgement of a run, and the segment of the ledger that was first measured at
    each; None where none was yet.
    """

    judged_at: dict[str, int]
    segments: dict[int, int | None]

    @classmethod
    def of(cls, run: RunDir, definition: Mapping[str, Any]) -> Ends:
        """Read them from the frozen definition and the run's probes."""
        steps = judged_steps(definition)
        return cls(steps, {step: first_segment(run.probes, step) for step in set(steps.values())})

    @property
    def reached(self) -> bool:
        """Whether every experiment was measured at its step. Controls vouch for all questions, so
        none is judged before the last of them is.
        """
        return all(segment is not None for segment in self.segments.values())

    def shown(self) -> str:
        """The steps in words: `step 80`, `steps 40 to 80`."""
        low, high = min(self.segments, default=0), max(self.segments, default=0)
        return f"step {high:,}" if low == high else f"steps {low:,} to {high:,}"


def standing(
    ends: Ends,
    step: int,
    stretches: Sequence[Stretch],
    spoiled: Sequence[str],
    run_steps: int | None = None,
) -> Standing:
    """Say what the verdicts of a run are worth.

    Args:
        ends: its steps of judgement.
        step, stretches: of the newest checkpoint, and the lineage that leads there.
        spoiled: why this is not the judgement that was frozen, in words.
        run_steps: how long the run is now meant to be; None is not known.
    """
    shown = ends.shown()
    if not ends.reached:
        missing = max(s for s, segment in ends.segments.items() if segment is None)
        if step >= missing:
            why = f"the model was not measured at step {missing:,}, at which it is judged"
            return Standing("exploratory", step, ends.judged_at, [f"Exploratory: {why}."], why)
        why = f"it is judged at {shown}, and the run stands at step {step:,}"
        if run_steps is not None and run_steps < missing:
            why += f", shortened to {run_steps:,} steps: it ends before it can be judged"
        line = f"Interim: {why}. Until then all figures are exploratory, and none is a verdict."
        return Standing("interim", step, ends.judged_at, [line], why)
    taken_back = _taken_back(ends, step, stretches)
    beyond = taken_back
    if step > min(ends.segments, default=step) and not taken_back:
        beyond = f"the run went on to step {step:,}"
    told: list[str] = []
    if taken_back or step > max(ends.segments, default=step):
        told.append(f"Judged at {shown}, as frozen; {beyond}, whose figures are exploratory.")
    kind = "exploratory" if spoiled else "judged"
    back = bool(taken_back)
    return Standing(kind, step, ends.judged_at, told, "; ".join(spoiled), beyond, back)


def _taken_back(ends: Ends, step: int, stretches: Sequence[Stretch]) -> str:
    """Say that the newest weights did not grow from those that are judged; "" when they did."""
    for judged, segment in sorted(ends.segments.items()):
        now = [s.segment.segment for s in stretches if s.start_step <= judged <= s.stop_step]
        if segment not in now:
            return (
                f"the run was measured there, taken back behind step {judged:,}, and stands at "
                f"step {step:,} of another training"
            )
    return ""


def changed_training(
    run: RunDir, manifest: Mapping[str, Any], stretches: Sequence[Stretch], frozen_steps: int
) -> list[str]:
    """Return the settings that made the weights of a lineage other than the frozen run's, in words.

    Args:
        stretches: the lineage up to the step of judgement.
        frozen_steps: length of the run when it was frozen.
    """
    found: list[str] = []
    frozen = flat(manifest.get("config") or {})
    for stretch in stretches:
        path = _settings_of(run, stretch.segment.attempt)
        if path is None or stretch.start_step >= stretch.stop_step:
            continue
        settings = run_yaml.load(path)
        now = flat(run_yaml.public(settings, whole=True))
        found += [
            f"{name} was {now[name]} instead of {then} from step {stretch.start_step:,} on"
            for name, then in frozen.items()
            if MOVING.fullmatch(name) and name in now and now[name] != then
        ]
        found += _other_length(settings, manifest, stretch, frozen_steps)
    return list(dict.fromkeys(found))


def _settings_of(run: RunDir, attempt: int) -> Path | None:
    """The settings that an attempt trained with: those of its launch, which restarts share."""
    paths = (run.launch_settings(number) for number in range(attempt, 0, -1))
    return next((path for path in paths if path.exists()), None)


def _other_length(
    settings: RunSettings, manifest: Mapping[str, Any], stretch: Stretch, frozen_steps: int
) -> list[str]:
    """A length that was changed before the judgement changes the learning rate of a schedule that
    falls towards the end; that of a family's stages, or of somebody else's loop, is not known.
    """
    if settings.steps == frozen_steps:
        return []
    steps = range(stretch.start_step, stretch.stop_step)
    schedule = settings.training.schedule
    if manifest.get("guest") or manifest.get("members"):
        moved: int | None = steps[0]
    else:
        then = [learning_rate(schedule, step, frozen_steps, 1.0) for step in steps]
        now = [learning_rate(schedule, step, settings.steps, 1.0) for step in steps]
        differing = [step for step, a, b in zip(steps, then, now, strict=True) if a != b]
        moved = differing[0] if differing else None
    if moved is None:
        return []
    return [
        f"the run was made {settings.steps:,} steps long instead of {frozen_steps:,} before step "
        f"{stretch.stop_step:,} of its judgement, which changed its learning rate from step "
        f"{moved:,} on"
    ]
