"""Forgetting: one exposure at a known step, probes on a log grid of steps since.

Source: the forgetting curves of AdEMAMix (Pagliardini et al., arXiv 2409.03137) and of
"Train Once, Answer All" (arXiv 2509.23383): a held-out text is shown once, and its likelihood is
followed before and after. The held-out units of the same run say what training alone would have
done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.library import generate
from motet.experiments.types import (
    F64,
    I64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)


class Forgetting(Experiment):
    """What one exposure gives, and how much of it is left.

    The primary outcome is the gain at lag 1, right after the update that saw the text. It is fixed
    by the design (no search for a peak), it comes before anything can be forgotten, so it has the
    most power, and without it a curve of forgetting means nothing. What is left at the end of the
    run is the first secondary outcome.
    """

    description = "what one exposure gives and how fast it is forgotten"
    protocol = (
        "Each unit is a document, shown once at one given step or never; the log-probability of "
        "its "
        "text is followed from just before that step to the end of the run."
    )
    follows_exposure = True
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,)}
    optional_fields: ClassVar[dict[str, tuple[type, ...]]] = {"prompt": (str,)}
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "One exposure makes a text more likely, and most of the gain is soon lost.",
        "generate": {"count": 64, "seed": 0},
        "doses": [0, 1],
        "schedule": {"kind": "steps", "at": [0.5]},
        "placement": "anywhere",
        "probe_at": {"log_grid": 12},
    }

    def definition_problems(self) -> list[Problem]:
        where = f"experiments.{self.spec.name}"
        schedule, found = self.spec.schedule, []
        if schedule.kind != "steps" or len(schedule.at) != 1:
            message = "must be {kind: steps, at: [one step]}: the curve is counted from that step"
            found.append(Problem(f"{where}.schedule", message))
        doses = sorted(set(self.spec.doses))
        if doses != [0, 1] or self.spec.dose_in != "exposures":
            message = f"are {doses} {self.spec.dose_in}; forgetting compares 0 with 1 exposure"
            found.append(Problem(f"{where}.doses", message))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        return (
            OutcomeSpec(
                "gain",
                "gain right after the exposure (lag 1)",
                "nats/token",
                "more learned",
                primary=True,
                secondary=False,
                baseline="logprob",
            ),
            OutcomeSpec(
                "remaining",
                "gain that is left at the end of the run",
                "nats/token",
                "more retained",
                baseline="logprob",
            ),
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        return generate.texts((self.spec.use, self.spec.name, seed), count, "document")

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        text = row["text"].strip()
        prompt = row.get("prompt")
        if prompt is None:
            cut = text.find(" ", max(1, len(text) // 5))
            if cut < 0:
                raise ValueError(f"has the text {text!r:.60}, too short to cut; give a prompt")
            prompt = text[:cut]
        prompt = prompt.rstrip()
        if not text.startswith(prompt) or len(prompt) >= len(text):
            raise ValueError("has a prompt that is not the beginning of its text")
        item = ProbeItem("rest", "rest", prompt, text[len(prompt) :])
        return Unit(row["id"], (text,), (item,))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        return {"logprob": ItemTable(units).mean(per_token(scores), "rest")}

    def summarize(
        self,
        units: Sequence[Unit],
        arms: I64,
        steps: I64,
        series: Mapping[str, F64],
        exposure_steps: Sequence[I64],
    ) -> dict[str, F64]:
        shown = [int(when[0]) for when in exposure_steps if len(when)]
        step = min(shown, default=self.exposure_step(int(steps[-1])))
        values_SU = series["logprob"]
        missing = np.full(len(units), np.nan)
        before = np.flatnonzero(steps == step)
        after = np.flatnonzero(steps == step + 1)
        if len(before) == 0:
            return {"gain": missing, "remaining": missing}
        base_U = values_SU[before[0]]
        return {
            "gain": values_SU[after[0]] - base_U if len(after) else missing,
            "remaining": values_SU[-1] - base_U if steps[-1] > step else missing,
        }

    def exposure_step(self, steps_total: int) -> int:
        """The step at which every treated unit is shown."""
        return self.spec.schedule.first_step(steps_total)

    def probe_steps(self, steps_total: int) -> set[int]:
        step = self.exposure_step(steps_total)
        wanted = super().probe_steps(steps_total) | {step, step + 1}
        return {at for at in wanted if 0 <= at <= steps_total}
