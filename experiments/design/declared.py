"""Which test an experiment is judged by, and when it can be: declared before training.

`contrast` compares any dose with dose 0. `trend` asks for the slope per doubling of 1 + dose.
`omnibus` asks whether the arms differ from dose 0 at all, in whatever direction: a contrast of any
dose is blind to effects that change sign with the dose.
"""

from __future__ import annotations

from motet.core.errors import Problem
from motet.experiments.design.assignment import Question
from motet.experiments.design.experiment import Experiment
from motet.experiments.types import OutcomeSpec

FEWEST_CLUSTERS_PER_ARM = 2


def declared_test(experiment: Experiment, outcome: OutcomeSpec) -> str:
    """Return the test of an outcome: the experiment's, unless the outcome compares certain arms."""
    return "contrast" if outcome.contrast is not None else experiment.spec.test or "contrast"


def declared_problems(experiment: Experiment) -> list[Problem]:
    """Return why the declared test makes no sense for this experiment, and what would."""
    spec = experiment.spec
    if spec.test is None or spec.test == "contrast":
        return []
    found = []
    treated = [arm for arm in spec.arms if not arm.is_control]
    if experiment.role != "question":
        found.append("a control is judged by its contrast; leave it out")
    primary = [outcome for outcome in experiment.outcomes if outcome.primary]
    if primary and primary[0].contrast is not None:
        sides = " with ".join(", ".join(side) for side in primary[0].contrast)
        found.append(f"its primary outcome compares {sides}; use test: contrast")
    if spec.test == "omnibus" and len(treated) < 2:
        found.append("it has one arm with a dose, so this is a contrast; use test: contrast")
    if spec.test == "trend" and len({arm.dose for arm in treated}) < 2:
        found.append("a slope needs two different doses above 0; add one, or use test: contrast")
    if spec.test == "trend" and spec.dose_in != "exposures":
        message = f"its doses are totals in {spec.dose_in}, and a slope is per exposures of a unit"
        found.append(f"{message}; use dose_in: exposures, or test: omnibus")
    where = f"experiments.{spec.name}.test"
    return [Problem(where, f"is {spec.test!r}, but {why}") for why in found]


def cluster_problems(question: Question) -> list[Problem]:
    """Return the arms with too few clusters for a test of all arms at once: the spread within an
    arm is not known from one cluster.
    """
    spec = question.spec
    if spec.test != "omnibus":
        return []
    arm_of_cluster = {
        int(c): int(a) for c, a in zip(question.design.cluster_of_unit, question.arms, strict=True)
    }
    counts = [list(arm_of_cluster.values()).count(number) for number in range(len(spec.arms))]
    few = [
        f"{arm.name} ({count})"
        for arm, count in zip(spec.arms, counts, strict=True)
        if count < FEWEST_CLUSTERS_PER_ARM
    ]
    if not few:
        return []
    message = (
        f"is 'omnibus', but these arms have fewer than {FEWEST_CLUSTERS_PER_ARM} clusters: "
        f"{', '.join(few)}; give more units, or fewer arms"
    )
    return [Problem(f"experiments.{spec.name}.test", message)]
