"""Which units are compared for an outcome, and how the assignment among them is repeated.

Two kinds of repetition, both exact:

* a comparison in which every arm takes part repeats the whole assignment (`assign_many`);
* a comparison of some arms only (dose 4 against dose 0; paraphrases against copies) keeps all other
  units as they are and shuffles the labels of the clusters concerned within their blocks. Repeating
  the whole assignment would be wrong there: it would need outcomes of units under other arms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.estimates import Comparison
from motet.experiments.design.assignment import Design, assign_many, permute_within_blocks
from motet.experiments.stream.random import name_key

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]


class Repeater:
    """The repetitions of one experiment's assignment, each made once and kept."""

    def __init__(self, design: Design, arms_U: I64, key: int, draws: int) -> None:
        self.design = design
        self.arms_U = arms_U
        self.key = key
        self.draws = draws
        self.blocks_U = design.block_of_cluster[design.cluster_of_unit]
        self._whole: I8 | None = None
        self._pairs: dict[tuple[int, ...], Comparison | None] = {}
        self._others: dict[int, Repeater] = {}

    def first(self, draws: int) -> Repeater:
        """One with at least so many repetitions: the first of them are these, whatever the number.

        It is this one where its repetitions were made already, and are enough.
        """
        made = self._whole is not None or bool(self._pairs)
        if draws == self.draws or (made and draws < self.draws):
            return self
        if draws not in self._others:
            self._others[draws] = Repeater(self.design, self.arms_U, self.key, draws)
        return self._others[draws]

    def whole(self, score: F64) -> Comparison:
        """Every arm takes part, with its treatment score, float64 [arms]."""
        if self._whole is None:
            self._whole = assign_many(self.design, self.key, self.draws)
        everyone = np.arange(len(self.arms_U))
        return Comparison(
            everyone, score, self.arms_U, self._whole, self.blocks_U, self.design.cluster_of_unit
        )

    def some(self, treated: Sequence[int], control: Sequence[int]) -> Comparison | None:
        """Two groups of arms, the other arms' units left aside. None when a group has no unit."""
        name = (*sorted(treated), -1, *sorted(control))
        if name not in self._pairs:
            label = np.full(len(self.design.weights), -1)
            label[list(treated)], label[list(control)] = 1, 0
            self._pairs[name] = self._shuffled(label[self.arms_U], self.blocks_U, name)
        return self._pairs[name]

    def timing(self, timing_U: I64, treated_U: npt.NDArray[np.bool_]) -> Comparison | None:
        """Late against early among treated units; labels are shuffled within block and arm."""
        label_U = np.where(treated_U, timing_U, -1)
        cells = self.blocks_U * len(self.design.weights) + self.arms_U
        return self._shuffled(label_U, cells, (-2,))

    def groups(self, scores: F64) -> Comparison | None:
        """The comparison that scores of 1, 0 and NaN (takes no part) per arm describe."""
        if np.isfinite(scores).all():
            return self.whole(scores)
        return self.some(np.flatnonzero(scores == 1).tolist(), np.flatnonzero(scores == 0).tolist())

    def _shuffled(self, label_U: I64, strata_U: I64, name: tuple[int, ...]) -> Comparison | None:
        units = np.flatnonzero(label_U >= 0)
        labels = label_U[units]
        if len(np.unique(labels)) < 2:
            return None
        clusters, first, number = np.unique(
            self.design.cluster_of_unit[units], return_index=True, return_inverse=True
        )
        key = name_key(self.key, "some", *name)
        shuffled = permute_within_blocks(
            labels[first].astype(np.int8), strata_U[units][first], key, self.draws
        )
        return Comparison(
            units,
            np.array([0.0, 1.0]),
            labels,
            shuffled[:, number],
            strata_U[units],
            clusters[number],
        )
