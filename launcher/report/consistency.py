"""Whether neighbours of a family that grows answer alike: what one knows and the one made of it
has lost. Pure functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.measured import Measured

WHOLE = "whole"


def neighbours(
    stages: Sequence[Mapping[str, Any]], measured: Sequence[Measured]
) -> list[dict[str, Any]]:
    """Return one row for each experiment and each two models that follow each other, both as they
    were at their ends.

    `lost`: units that the one before has right and the one made of it wrong (a flip). `gained`: the
    other way.
    A unit is right when the most likely token is the right one at every place of all its items.

    Args:
        stages: of the manifest, in order; a stage that was not measured has no rows.
        measured: of all members.
    """
    known = {(one.name, one.member or WHOLE): one for one in measured}
    experiments = list(dict.fromkeys(one.name for one in measured))
    found = []
    for before, after in itertools.pairwise(stages):
        for name in experiments:
            first, second = (known.get((name, stage["name"])) for stage in (before, after))
            if first is None or second is None or not first.scores or not second.scores:
                continue
            was, now = right(first), right(second)
            found.append(
                {
                    "experiment": name,
                    "before": before["name"],
                    "after": after["name"],
                    "units": len(was),
                    "both": int((was & now).sum()),
                    "lost": int((was & ~now).sum()),
                    "gained": int((~was & now).sum()),
                }
            )
    return found


def right(one: Measured) -> npt.NDArray[np.bool_]:
    """Return which units a model has right at its last probe, bool [U]."""
    sizes = [len(unit.items) for unit in one.units]
    wrong_I = ~one.scores[-1].greedy
    unit_I = np.repeat(np.arange(len(sizes)), sizes)
    return np.asarray(np.bincount(unit_I, weights=wrong_I, minlength=len(sizes)) == 0, dtype=bool)
