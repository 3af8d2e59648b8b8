"""Global treatments: what a run measured under its one arm, and that it cannot say what that does.

No p-value, no interval, no verdict: every document of the run had the treatment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from motet.experiments.analysis.declared import primary_of
from motet.experiments.analysis.measured import Measured
from motet.experiments.design.trial import final_of, series_of

SENTENCE = (
    "One arm per run: all of this run has the treatment, so nothing inside it can say what the "
    "treatment does. Compare with runs of the other arm, several seeds each (motet compare RUN "
    "RUN shows them side by side)."
)


def whole_run(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return one entry for each global treatment: its arm, the mean of the primary outcome over its
    units at the last probe, and why that is no effect.
    """
    found = []
    for m in measured:
        spec, primary = m.experiment.spec, primary_of(m.experiment)
        probes = [series_of(m.experiment, m.units, scores) for scores in m.scores]
        over_time = {name: np.stack([one[name] for one in probes]) for name in probes[-1]}
        steps = [m.exposure_steps[number] for number in range(len(m.units))]
        values = final_of(m.experiment, m.units, m.arms, m.steps, over_time, steps)[primary.name]
        finite = values[np.isfinite(values)]
        found.append(
            {
                "name": m.name,
                "use": spec.use,
                "role": m.experiment.role,
                "hypothesis": spec.hypothesis,
                "arm": spec.arms[0].name,
                "member": m.member,
                "label": primary.label,
                "unit": primary.unit,
                "step": int(m.steps[-1]),
                "mean": float(finite.mean()) if len(finite) else None,
                "n": len(finite),
                "sentence": SENTENCE,
            }
        )
    return found
