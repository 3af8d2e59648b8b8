"""Blocked complete randomization of clusters to arms; one algorithm for one draw and for many.

The algorithm, in every block: put the clusters in random order and deal them the arms in rounds;
one round holds every arm as often as its weight says. Clusters beyond the last full round of their
block are dealt from shuffled rounds that run on through all the blocks (in the order of their
labels), so that arms stay balanced over the whole experiment even when blocks are smaller than a
round. Every cluster gets arm a with probability weight[a] / sum of weights.

All randomness is Philox(key; cluster, draw): the result depends on the key, the ids, the blocks,
the clusters and the weights, never on the order of units or on other experiments.

Shapes: U units, C clusters, D draws, W the sum of weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd

import numpy as np
import numpy.typing as npt

from motet.core.plugins import mistakes_of
from motet.experiments.design.experiment import Experiment, Kinds, make
from motet.experiments.design.places import counted_places, sorted_places
from motet.experiments.design.spec import Arm, ExperimentSpec
from motet.experiments.stream.random import U64, name_key, philox_grid, text_keys
from motet.experiments.types import Unit

I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]
MOST_ARMS = 100
CHUNK_WORDS = 1 << 17
FEWEST_RUNS_PER_CORE = 8
MOST_CORES = 4
COUNTED_UP_TO = 12
"""Clusters of a block: sorting so few costs more than comparing each with each."""


@dataclass(frozen=True)
class Design:
    """What is randomized, apart from the key.

    cluster_of_unit: int64 [U]. block_of_cluster: int64 [C], numbered in the order of the blocks'
    labels. cluster_keys: uint64 [C], ascending. weights: one whole number per arm.
    """

    cluster_of_unit: I64
    block_of_cluster: I64
    cluster_keys: U64
    weights: tuple[int, ...]

    @property
    def n_clusters(self) -> int:
        return len(self.cluster_keys)

    @property
    def n_blocks(self) -> int:
        return int(self.block_of_cluster.max(initial=-1)) + 1


@dataclass(frozen=True)
class Question:
    """An experiment whose units are assigned.

    Attributes:
        experiment: its class, with the spec.
        units: U units.
        design: blocks and clusters.
        arms: int64 [U], index into spec.arms.
        timing: int64 [U], 0 early or 1 late, for schedule "early_late"; else None.
    """

    experiment: Experiment
    units: list[Unit]
    design: Design
    arms: I64
    timing: I64 | None

    @property
    def spec(self) -> ExperimentSpec:
        return self.experiment.spec

    @property
    def name(self) -> str:
        return self.experiment.spec.name

    def treated(self) -> npt.NDArray[np.bool_]:
        """Return which units get a dose above 0, bool [U]."""
        return np.array([not arm.is_control for arm in self.spec.arms])[self.arms]

    def unit_keys(self) -> U64:
        """Return the key of each unit, uint64 [U]."""
        return text_keys([unit.id for unit in self.units])


def make_design(units: Sequence[Unit], arms: Sequence[Arm]) -> Design:
    """Read clusters and blocks off the units. A cluster lies in the block of its first unit by id.

    Raises ValueError for more than 100 arms (a draw is kept in one byte per unit).
    """
    if len(arms) > MOST_ARMS:
        raise ValueError(f"{len(arms)} arms; at most {MOST_ARMS} are possible")
    first: dict[str, Unit] = {}
    for unit in units:
        label = unit.cluster or unit.id
        if label not in first or unit.id < first[label].id:
            first[label] = unit
    labels = list(first)
    keys = text_keys(labels)
    order = np.argsort(keys, kind="stable")
    if len(np.unique(keys)) < len(keys):
        raise ValueError("two cluster labels have the same 64-bit key; rename a unit")
    number = {labels[index]: place for place, index in enumerate(order.tolist())}
    blocks = sorted({unit.block for unit in first.values()})
    block_number = {label: place for place, label in enumerate(blocks)}
    return Design(
        cluster_of_unit=np.array([number[unit.cluster or unit.id] for unit in units], np.int64),
        block_of_cluster=np.array(
            [block_number[first[labels[index]].block] for index in order.tolist()], np.int64
        ),
        cluster_keys=keys[order],
        weights=tuple(arm.weight for arm in arms),
    )


def assignment_key(seed: int, experiment: str) -> int:
    """The key of an experiment's actual assignment."""
    return name_key(seed, "assign", experiment)


def ask(
    spec: ExperimentSpec, seed: int, kinds: Kinds, without: frozenset[str] = frozenset()
) -> Question:
    """Return an experiment with its units assigned to arms; those of the ids `without` are left
    out before anything is drawn.

    Raises:
        UserError: every row that is wrong; a mistake in a user's own class.
    """
    experiment = make(spec, kinds)
    with mistakes_of(type(experiment), f"experiments.{spec.name}.use"):
        units = [unit for unit in experiment.units() if unit.id not in without]
    design = make_design(units, spec.arms)
    arms = assign(design, assignment_key(seed, spec.name))
    timing = None
    if spec.schedule.kind == "early_late":
        timing = assign_timing(design, name_key(seed, "timing", spec.name))
    return Question(experiment, units, design, arms, timing)


def assign(design: Design, key: int) -> I64:
    """Arm index of every unit, int64 [U]: draw 0 of the key."""
    return assign_many(design, key, 1)[0].astype(np.int64)


def assign_timing(design: Design, key: int) -> I64:
    """0 (early) or 1 (late) for every unit, int64 [U], randomized apart from the arms.

    Give it another key than `assign`'s; the halves are balanced within blocks.
    """
    return assign(replace(design, weights=(1, 1)), key)


def assign_many(design: Design, key: int, draws: int) -> I8:
    """Arm index of every unit in `draws` independent assignments, int8 [D, U]."""
    out = np.empty((draws, len(design.cluster_of_unit)), dtype=np.int8)
    dealer = _Dealer(design)

    def deal(rows: slice) -> None:
        counters = np.arange(rows.start, rows.stop, dtype=np.uint64)
        np.take(dealer.deal(key, counters), dealer.column, axis=1, out=out[rows])

    in_pieces(deal, draws, design.n_clusters)
    return out


def in_pieces(work: Callable[[slice], None], draws: int, width: int) -> None:
    """Call `work` on runs of draws whose rows of `width` words fit the cache.

    Large work is shared by the processor's cores (numpy computes outside Python's lock), so `work`
    must not depend on the order of the runs.
    """
    step = max(1, CHUNK_WORDS // max(width, 1))
    runs = [slice(start, min(start + step, draws)) for start in range(0, draws, step)]
    cores = min(len(runs) // FEWEST_RUNS_PER_CORE, os.cpu_count() or 1, MOST_CORES)
    if cores < 2:
        for run in runs:
            work(run)
        return
    with ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(work, runs):
            pass


class _Dealer:
    """The parts of a design that are the same in every draw."""

    def __init__(self, design: Design) -> None:
        # The shortest round that has the right shares: small blocks are balanced with it.
        divisor = reduce(gcd, design.weights)
        counts = np.array(design.weights) // divisor
        self.round = np.repeat(np.arange(len(counts), dtype=np.int8), counts)
        self.design = design
        blocks, width = design.block_of_cluster, len(self.round)
        self.sizes = np.bincount(blocks, minlength=design.n_blocks)
        self.full = self.sizes // width * width
        left = self.sizes - self.full
        self.n_left = int(left.sum())
        self.first_left = np.cumsum(left) - left
        self.n_rounds = -(-self.n_left // width)
        self.block_bits = np.uint64(max(1, int(design.n_blocks - 1).bit_length()))
        self.counted = int(self.sizes.max(initial=0)) <= COUNTED_UP_TO
        if self.counted:
            self._by_size()
        else:
            starts = np.cumsum(self.sizes) - self.sizes
            sorted_block = np.repeat(np.arange(len(self.sizes)), self.sizes)
            place = np.arange(len(blocks)) - starts[sorted_block]
            dealt = np.where(place < self.full[sorted_block], self.round[place % width], 0)
            self.shown_at = np.flatnonzero(dealt)
            self.shown_arm = dealt[self.shown_at]
            self.left_at = np.flatnonzero(place >= self.full[sorted_block])
            self.column = design.cluster_of_unit

    def _by_size(self) -> None:
        """Columns for counting: blocks of one size side by side, their first clusters, then their
        second ones, and so on.
        """
        by_block = np.argsort(self.design.block_of_cluster, kind="stable")
        starts = np.cumsum(self.sizes) - self.sizes
        self.alike = [(int(s), np.flatnonzero(self.sizes == s)) for s in np.unique(self.sizes)]
        parts = [by_block[starts[b] + np.arange(s)[:, None]].ravel() for s, b in self.alike]
        order = np.concatenate(parts) if parts else by_block
        self.keys = self.design.cluster_keys[order]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.column = place[self.design.cluster_of_unit]

    def deal(self, key: int, draws: U64) -> I8:
        """Arm of every cluster, int8 [D, C]; that of a unit is in its `column`."""
        left = self._left_over(key, draws)
        if self.counted:
            return self._deal_counted(philox_grid(key, self.keys, draws), left)
        design = self.design
        ordered = philox_grid(key, design.cluster_keys, draws)
        if design.n_blocks > 1:
            # The block in the highest bits: one sort orders the clusters by chance within each.
            ordered >>= self.block_bits
            ordered |= design.block_of_cluster.astype(np.uint64) << (
                np.uint64(64) - self.block_bits
            )
        else:
            ordered &= ~np.uint64(1)
        cluster_at = sorted_places(ordered, int(self.block_bits) if design.n_blocks > 1 else 0)
        out = np.zeros(cluster_at.shape, dtype=np.int8)
        # A row fits the cache: it pays for calls of its own. Arm 0 is there already.
        for arms, places, rest in zip(out, cluster_at, left, strict=True):
            arms[places[self.shown_at]] = self.shown_arm
            arms[places[self.left_at]] = rest
        return out

    def _left_over(self, key: int, draws: U64) -> I8:
        """Arms of the places beyond the full rounds of their blocks, in the order of blocks, int8
        [D, places]: dealt from shuffled rounds, the last of which is cut, so that which arms it
        lacks is left to chance.
        """
        width = len(self.round)
        names = np.arange(self.n_rounds * width, dtype=np.uint64)
        words = philox_grid(name_key(key, "left over"), names, draws)
        shuffled = np.argsort(words.reshape(len(draws), self.n_rounds, width), axis=2)
        return self.round[shuffled].reshape(len(draws), -1)[:, : self.n_left]

    def _deal_counted(self, bits: U64, left: I8) -> I8:
        """The same where blocks are small: a cluster's place in the order of its block is the
        number of clusters before it.
        """
        out = np.zeros(bits.shape, dtype=np.int8)
        bits >>= self.block_bits
        width, stop = len(self.round), 0
        for size, blocks in self.alike:
            part = slice(stop, stop := stop + size * len(blocks))
            keys = bits[:, part].reshape(len(bits), size, len(blocks))
            arms = out[:, part].reshape(keys.shape)
            place = counted_places(keys)
            full = size // width * width
            for at in range(size):
                here = place == at
                if at < full:
                    arms += here * self.round[at % width]
                else:
                    arms += here * left[:, None, self.first_left[blocks] + at - full]
            out[:, part] = arms.reshape(len(bits), -1)
        return out


def permute_within_blocks(labels: I8, blocks: I64, key: int, draws: int) -> I8:
    """Shuffle cluster labels within blocks, int8 [D, C].

    This is the assignment's own distribution given which clusters carry one of these labels and how
    many of each a block holds: the null of a comparison between some of the arms only.
    """
    order = np.argsort(blocks, kind="stable")
    ordered_labels, ordered_blocks = labels[order], blocks[order]
    generator = np.random.Generator(np.random.Philox(key=key))
    out = np.empty((draws, len(labels)), dtype=np.int8)
    step = max(1, CHUNK_WORDS // max(len(labels), 1))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        # Numbers of block b lie in [b, b + 1): the sort never moves a label out of its block. Bits
        # of numbers above 0 are ordered as the numbers are.
        shuffled = generator.random((rows, len(labels)))
        shuffled += ordered_blocks
        places = sorted_places(shuffled.view(np.uint64))
        out[start : start + rows, order] = ordered_labels[places]
    return out
