"""Few-shot memories: recognition after one exposure, recall after three, and how long both last.

Source: Orhan, "Recognition, recall, and retention of few-shot memories in large language models"
(arXiv 2303.17557): a single exposure is enough to tell a sentence from a novel one, recall needs
about three, and precise memories are lost steeply over the first ten updates on other text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment, log_grid
from motet.experiments.design.units import texts_of
from motet.experiments.library import generate
from motet.experiments.types import F64, I64, ItemScores, ItemTable, OutcomeSpec, ProbeItem, Unit

TELLING = "came from {place} in {year} with {count} {goods} and was taught there by {person}"
GOODS = ("lamps", "horses", "barrels", "maps", "bells", "coats", "ropes", "wheels", "chairs")
RECALL_AFTER = 3


@dataclass(frozen=True)
class FewShotOptions:
    """foils: novel endings that a sentence is held against."""

    foils: int = 4


class FewShot(Experiment):
    """What is left of one and of three exposures."""

    description = "is a sentence recognized after one exposure, and recalled after three"
    protocol = (
        "Each unit is a sentence, shown never, once or three times in consecutive updates; it is "
        "recognized where its ending is likelier than novel endings, and recalled where greedy "
        "decoding writes it."
    )
    follows_exposure = True
    Options: ClassVar[type[Any]] = FewShotOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {
        "cue": (str,),
        "ending": (str,),
        "foils": (list,),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "One exposure is enough to recognize a sentence, recall needs about three.",
        "generate": {"count": 96, "seed": 0},
        "doses": [0, 1, 3],
        "schedule": {"kind": "every", "every": 1, "start": 0.5},
        "placement": "anywhere",
        "probe_at": {"log_grid": 10},
    }

    def definition_problems(self) -> list[Problem]:
        where, found = f"experiments.{self.spec.name}", []
        if self.spec.schedule.kind != "every" or self.spec.dose_in != "exposures":
            message = "must be {kind: every, every: 1, start: 0.5} with doses in exposures: memory"
            found.append(Problem(f"{where}.schedule", f"{message} is counted from each exposure"))
        if not 1 <= self.options.foils <= 100:
            message = f"is {self.options.foils}; it must be 1 to 100"
            found.append(Problem(f"{where}.options.foils", message))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        share = "share of foils"
        recognized = "ending likelier than novel ones"
        outcomes = [
            OutcomeSpec(
                "recognized_after_one",
                f"{recognized}, right after the first exposure",
                share,
                "better recognized",
                primary=True,
                secondary=False,
                baseline="recognition",
                low=0.0,
                high=1.0,
            ),
            OutcomeSpec(
                "recognition",
                f"{recognized}, at the end",
                share,
                "better recognized",
                low=0.0,
                high=1.0,
            ),
            OutcomeSpec(
                "margin_after_one",
                "log-probability of the ending above novel ones, right after the first exposure",
                "nats/byte",
                "better recognized",
                baseline="margin",
            ),
        ]
        if many := tuple(arm.name for arm in self.spec.arms if arm.dose >= RECALL_AFTER):
            held_out = tuple(arm.name for arm in self.spec.arms if arm.is_control)
            outcomes.append(
                _recall(f"recalled_after_{RECALL_AFTER}", "right after three", (many, held_out))
            )
        return (*outcomes, _recall("recall", "at the end", None))

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        names = generate.Names(*path, "names")
        rows = []
        for number in range(count):
            tellings = [
                TELLING.format(
                    place=names.word("place", number, place),
                    year=1300 + choose.below(600),
                    count=2 + choose.below(90),
                    goods=choose.pick(GOODS),
                    person=names.person("person", number, place),
                )
                for place in range(self.options.foils + 1)
                for choose in [generate.Chooser(*path, "telling", number, place)]
            ]
            rows.append(
                {
                    "id": f"memory-{number:05d}",
                    "cue": names.person("subject", number),
                    "ending": tellings[0],
                    "foils": tellings[1:],
                }
            )
        return rows

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        cue, ending = row["cue"].strip(), row["ending"].strip()
        foils = [text.strip() for text in texts_of(row, "foils")]
        if not cue or not ending:
            raise ValueError("has a cue or an ending of spaces")
        if ending in foils or len(set(foils)) < len(foils):
            raise ValueError("has a foil twice, or its own ending among the foils")
        if len(foils) < self.options.foils:
            least = self.options.foils
            raise ValueError(f"has {len(foils)} foils and options.foils is {least}; give more")
        items = [ProbeItem("ending", "ending", cue, f" {ending}")]
        items += [
            ProbeItem(f"foil-{number}", "wrong", cue, f" {foil}")
            for number, foil in enumerate(foils[: self.options.foils])
        ]
        return Unit(row["id"], (f"{cue} {ending}.",), tuple(items))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        # Per byte: an ending is not to win by being shorter.
        per_byte = scores.logprob / np.maximum(scores.n_bytes, 1)
        ending = table.mean(per_byte, "ending")
        beaten = [
            np.mean(np.where(foils == own, 0.5, foils < own) + 0 * (foils - own))
            for own, foils in zip(ending, table.only(per_byte, "wrong"), strict=True)
        ]
        recall = np.where(np.isfinite(ending), table.mean(scores.greedy, "ending"), np.nan)
        return {
            "recognition": np.array(beaten, dtype=np.float64),
            "margin": ending - table.mean(per_byte, "wrong"),
            "recall": recall,
        }

    def summarize(
        self,
        units: Sequence[Unit],
        arms: I64,
        steps: I64,
        series: Mapping[str, F64],
        exposure_steps: Sequence[I64],
    ) -> dict[str, F64]:
        shown = [int(when[0]) for when in exposure_steps if len(when)]
        first = min(shown, default=self.spec.schedule.first_step(int(steps[-1])))
        every = int(self.spec.schedule.resolve(int(steps[-1])).every)
        return {
            "recognized_after_one": _at(steps, series["recognition"], first + 1),
            "margin_after_one": _at(steps, series["margin"], first + 1),
            f"recalled_after_{RECALL_AFTER}": _at(
                steps, series["recall"], first + (RECALL_AFTER - 1) * every + 1
            ),
            "recognition": series["recognition"][-1],
            "recall": series["recall"][-1],
        }

    def probe_steps(self, steps_total: int) -> set[int]:
        schedule = self.spec.schedule.resolve(steps_total)
        first, every = int(schedule.start), int(schedule.every)
        times = [first + number * every for number in range(int(max(self.spec.doses)))]
        wanted = super().probe_steps(steps_total) | {first} | {step + 1 for step in times}
        wanted |= log_grid(times[-1] + 1, steps_total, 6)
        return {step for step in wanted if 0 <= step <= steps_total}


def _recall(
    name: str, when: str, contrast: tuple[tuple[str, ...], tuple[str, ...]] | None
) -> OutcomeSpec:
    return OutcomeSpec(
        name,
        f"ending recalled by greedy decoding, {when}",
        "share",
        "better recalled",
        binary=True,
        chance=0.0,
        contrast=contrast,
        baseline="recall",
    )


def _at(steps: I64, values_SU: F64, step: int) -> F64:
    """The values at one step, float64 [U]; NaN where it was not probed."""
    found = np.flatnonzero(steps == step)
    return values_SU[found[0]] if len(found) else np.full(values_SU.shape[1], np.nan)
