"""Which test an experiment is judged by, and when it can be: declared before training.

`contrast` compares any dose with dose 0. `trend` asks for the slope per doubling of 1 + dose.
`omnibus` asks whether the arms differ from dose 0 at all, in whatever direction: a contrast of any
dose is blind to effects that change sign with the dose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from motet.core.errors import Problem, suggest
from motet.experiments.design.assignment import Question
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.spec import ExperimentSpec
from motet.experiments.types import OutcomeSpec

FEWEST_CLUSTERS_PER_ARM = 2


def declared_test(experiment: Experiment, outcome: OutcomeSpec) -> str:
    """Return the test of an outcome: the experiment's, unless the outcome compares certain arms."""
    return "contrast" if outcome.contrast is not None else experiment.spec.test or "contrast"


def declared_problems(experiment: Experiment) -> list[Problem]:
    """Return why the declared test makes no sense for this experiment, and what would."""
    spec = experiment.spec
    if wrong := _windows_wrong(spec):
        return [Problem(f"experiments.{spec.name}.arms", wrong)]
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


def _windows_wrong(spec: ExperimentSpec) -> str | None:
    """Say why arms cannot have windows of their own, None when they can or have none."""
    own = [arm for arm in spec.arms if arm.window is not None]
    if own and spec.schedule.kind != "uniform":
        kind = spec.schedule.kind
        return f"have windows of their own, which go with schedule.kind uniform, not {kind}"
    if idle := [arm.name for arm in own if arm.is_control]:
        return f"have a window for {idle[0]}, whose dose is 0; its placebos lie as the others do"
    return None


def member_problems(questions: Sequence[Question], sizes: Mapping[str, int]) -> list[Problem]:
    """Return the experiments that name a member which the run does not have, or declare a slope
    over sizes that it cannot have.

    Args:
        sizes: parameters by member, the whole model as "whole"; empty for a run of one model.
    """
    found = []
    known = ", ".join(sizes)
    for spec in (question.spec for question in questions):
        where = f"experiments.{spec.name}"
        if spec.member is not None and spec.member not in sizes:
            hint = suggest(spec.member, sizes)
            why = f"there are {known}{hint}" if sizes else "this run trains one model; leave it out"
            found.append(Problem(f"{where}.member", f"is {spec.member!r}; {why}"))
        if not spec.size_slope:
            continue
        wrong = ""
        if spec.role != "question":
            wrong = "a control is judged at every member instead; leave it out"
        elif len(set(sizes.values())) < 2:
            wrong = "it needs a family with members of different sizes; set family.kind: nested"
        elif spec.test == "omnibus":
            wrong = "test: omnibus has no single effect; use test: contrast or trend"
        if wrong:
            found.append(Problem(f"{where}.size_slope", f"is true, but {wrong}"))
    return found


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
