"""What probes may cost: a share of the time that is spent training, held by leaving out probes that
no answer needs.

Never left out: step 0, the last step before any exposure, the step at which a question is judged,
the end of the run, and every step that a class itself asks for (its outcomes are made of them).
What remains are the points of curves that `probe_at` or `probes.every` asks for. Rank 0 decides by
its own clock, all ranks act on it, and each decision is a row of the metrics: when a step is
trained again after a restart, what was measured or left out there before is so again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

THINNED = "thinned"


@dataclass
class ProbeBudget:
    """How much was spent, and what may still be.

    Attributes:
        share: of the time spent training; the setting `probes.budget`.
        needed: by experiment, the steps that are never left out.
        work: by experiment, tokens of one probe.
        train_s, probe_s: spent so far in the run, this attempt's and those before.
        worked: tokens that went through the model in `probe_s`.
        decided: {step: experiments that were left out there} of before.
    """

    share: float
    needed: Mapping[str, set[int]]
    work: Mapping[str, int]
    train_s: float = 0.0
    probe_s: float = 0.0
    worked: int = 0
    decided: dict[int, list[str]] = field(default_factory=dict)

    def recall(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over what earlier attempts spent and decided, from the rows of the metrics."""
        for row in rows:
            if row["kind"] == "step":
                seconds = row.get("seconds") or {}
                self.train_s += float(seconds.get("train", 0)) + float(seconds.get("data", 0))
            elif row["kind"] == "probe":
                names = set(row.get("experiments") or {})
                self.spent(float(row.get("seconds") or 0), names)
                self.decided.setdefault(int(row["step"]), [])
            elif row["kind"] == "event" and row.get("event") == THINNED:
                self.decided[int(row["step"])] = list(row["experiments"])

    def spent(self, seconds: float, names: Iterable[str]) -> None:
        """Count a probe."""
        self.probe_s += seconds
        self.worked += sum(self.work.get(name, 0) for name in names)

    def left_out(self, step: int, due: Sequence[str]) -> list[str]:
        """Return the experiments that are not measured at a step although they are due: those that
        would take more than the budget, the costliest first. Before anything was measured all are.
        """
        if step in self.decided:
            return [name for name in due if name in self.decided[step]]
        must = [name for name in due if step in self.needed.get(name, ())]
        may = sorted((name for name in due if name not in must), key=self._cost_of)
        room = self.share * self.train_s - self.probe_s
        # What has to be measured is paid first.
        room -= sum(self._seconds(name) for name in must)
        kept = []
        for name in may:
            if self._seconds(name) <= room:
                room -= self._seconds(name)
                kept.append(name)
        return sorted(set(may) - set(kept))

    def _cost_of(self, name: str) -> tuple[int, str]:
        return self.work[name], name

    def _seconds(self, name: str) -> float:
        return self.work[name] * self.probe_s / self.worked if self.worked else 0.0
