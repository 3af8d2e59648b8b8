"""Whether neighbours of a family answer alike: what one knows and the one made of it has lost, and
how far their distributions lie apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.core.files import read_fields
from motet.experiments.analysis.measured import Measured
from motet.launcher.runs.kept_models import chains, step_of
from motet.launcher.runs.metrics import read_metrics, rows_of
from motet.launcher.runs.rundir import RunDir
from motet.models.family.base import WHOLE


def neighbours(manifest: Mapping[str, Any], measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return one row for each experiment and each two models that follow each other, as they grew
    or, of slices of one model, by size; all as they were at their ends.

    `lost`: units that the one before has right and the one made of it, or the larger one, wrong (a
    flip). `gained`: the other way.
    A unit is right when the most likely token is the right one at every place of all its items.

    Args:
        manifest: with stages; a member that was not measured has no rows.
        measured: of all members.
    """
    known = {(one.name, one.member or WHOLE): one for one in measured}
    experiments = list(dict.fromkeys(one.name for one in measured))
    sizes = {one["name"]: one.get("parameters") or 0 for one in manifest.get("members") or ()}
    sizes[WHOLE] = math.inf
    orders = chains(manifest, sorted(sizes, key=sizes.__getitem__))
    found = []
    for before, after in itertools.chain.from_iterable(map(itertools.pairwise, orders)):
        for name in experiments:
            first, second = (known.get((name, member)) for member in (before, after))
            if first is None or second is None or not first.scores or not second.scores:
                continue
            was, now = right(first), right(second)
            found.append(
                {
                    "experiment": name,
                    "before": before,
                    "after": after,
                    "units": len(was),
                    "both": int((was & now).sum()),
                    "lost": int((was & ~now).sum()),
                    "gained": int((~was & now).sum()),
                }
            )
    return found


def divergence_of(rundir: RunDir) -> dict[str, Any] | None:
    """Return what `motet family divergence` found, or else the run itself as its stages ended; None
    where neither was asked, or a file is damaged. `outdated`: a newer checkpoint has one of the
    models.
    """
    try:
        if rundir.divergence.exists():
            found = read_fields(rundir.divergence, {"pairs": list, "unseen": bool})
        else:
            found = _in_the_run(rundir)
        if not found["pairs"]:
            return None
        newest = max(rundir.checkpoint_steps(), default=0)
        rows = []
        for row in found["pairs"]:
            now = [step_of(rundir, newest, row[key]) for key in ("before", "after")]
            rows.append({**row, "outdated": row["steps"] != now})
    except (UserError, KeyError, TypeError):
        return None
    return {"unseen": found["unseen"], "pairs": rows}


def _in_the_run(rundir: RunDir) -> dict[str, Any]:
    """Return what the run found of each two neighbours the last time that it measured them."""
    events = rows_of(read_metrics(rundir.metrics), "event")
    measured = [row for row in events if row.get("event") == "divergence"]
    pairs = {(row["before"], row["after"]): row for one in measured for row in one["pairs"]}
    return {"unseen": all(one["unseen"] for one in measured), "pairs": list(pairs.values())}


def right(one: Measured) -> npt.NDArray[np.bool_]:
    """Return which units a model has right at its last probe, bool [U]."""
    sizes = [len(unit.items) for unit in one.units]
    wrong_I = ~one.scores[-1].greedy
    unit_I = np.repeat(np.arange(len(sizes)), sizes)
    return np.asarray(np.bincount(unit_I, weights=wrong_I, minlength=len(sizes)) == 0, dtype=bool)
