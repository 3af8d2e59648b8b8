"""Blocks and clusters: which units are alike, and which must move together.

Near-duplicates are texts whose sets of word shingles (of signs, where a script has no spaces:
`words`) have a Jaccard similarity of at least a threshold; clusters are the connected components.
Candidates come from prefix filtering (Bayardo, Ma, Srikant, "Scaling up all pairs similarity
search", WWW 2007): two sets that are that similar must share one of the rarest shingles of each, so
texts that share only a template are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, suggest
from motet.experiments.design.spec import ExperimentSpec
from motet.experiments.design.words import WORD
from motet.experiments.stream.random import mix64
from motet.experiments.types import Unit

I64 = npt.NDArray[np.int64]
SHINGLE_WORDS = 3
DUPLICATE_THRESHOLD = 0.5
TEMPLATE_SHARE = 0.5
FEWEST_FOR_TEMPLATE = 8
"""A shingle in more than half of so many texts or more is one of a template."""
LEAST_OWN_SHARE = 0.1
MOST_BINS = 4
ALL_PAIRS_UP_TO = 200
NEIGHBOURS_BEYOND = 8
PAIRS_AT_ONCE = 1 << 16
"""Pairs whose shingles are in memory together."""


def with_groups(units: Sequence[Unit], spec: ExperimentSpec) -> tuple[list[Unit], list[Problem]]:
    """Fill every unit's `block` and `cluster` as the spec asks."""
    problems: list[Problem] = []
    blocks = block_labels(units, spec, problems)
    clusters = cluster_labels(units, spec, problems)
    grouped = [
        replace(unit, block=block, cluster=cluster)
        for unit, block, cluster in zip(units, blocks, clusters, strict=True)
    ]
    return grouped, problems


def block_labels(units: Sequence[Unit], spec: ExperimentSpec, problems: list[Problem]) -> list[str]:
    """One label per unit: the values of `block_by`, numeric attributes cut into quantile bins."""
    columns: list[list[str]] = []
    n_bins = max(1, min(MOST_BINS, len(units) // (2 * sum(arm.weight for arm in spec.arms))))
    for name in spec.block_by:
        values = _attribute(units, name, f"experiments.{spec.name}.block_by", problems)
        if values is None:
            continue
        if all(isinstance(value, (int, float)) for value in values):
            bins = quantile_bins(np.array(values, dtype=np.float64), n_bins)
            columns.append([f"{name}=q{number}" for number in bins.tolist()])
        else:
            columns.append([f"{name}={value}" for value in values])
    return ["|".join(labels) for labels in zip(*columns, strict=True)] or [""] * len(units)


def cluster_labels(
    units: Sequence[Unit], spec: ExperimentSpec, problems: list[Problem]
) -> list[str]:
    """One label per unit; a unit that is alike to no other is its own cluster."""
    if spec.cluster_by == "none":
        return [unit.id for unit in units]
    if spec.cluster_by != "auto":
        where = f"experiments.{spec.name}.cluster_by"
        values = _attribute(units, spec.cluster_by, where, problems)
        return [f"{spec.cluster_by}={value}" for value in values or [""] * len(units)]
    numbers = near_duplicate_clusters([unit.texts[0] for unit in units], DUPLICATE_THRESHOLD)
    smallest: dict[int, str] = {}
    for number, unit in zip(numbers.tolist(), units, strict=True):
        smallest[number] = min(smallest.get(number, unit.id), unit.id)
    return [smallest[number] for number in numbers.tolist()]


def _attribute(
    units: Sequence[Unit], name: str, where: str, problems: list[Problem]
) -> list[Any] | None:
    known: dict[str, None] = {key: None for unit in units for key in unit.attributes}
    lacking = [unit.id for unit in units if name not in unit.attributes]
    if lacking:
        hint = suggest(name, known) or f"; the items have {', '.join(known) or 'no attributes'}"
        message = f"is {name!r}, which {len(lacking)} units lack (first: {lacking[0]!r}){hint}"
        problems.append(Problem(where, message))
        return None
    return [unit.attributes[name] for unit in units]


def quantile_bins(values: npt.NDArray[np.float64], n_bins: int) -> I64:
    """Bin number 0 ... n_bins - 1 of each value, by rank; equal values share a bin.

    A value that is not finite gets the bin -1.
    """
    bins = np.full(len(values), -1, dtype=np.int64)
    finite = np.isfinite(values)
    chosen = values[finite]
    rank = np.searchsorted(np.sort(chosen), chosen, side="left")
    bins[finite] = rank * n_bins // max(len(chosen), 1)
    return bins


def near_duplicate_clusters(texts: Sequence[str], threshold: float = DUPLICATE_THRESHOLD) -> I64:
    """Cluster number of each text, int64 [len(texts)], numbered in order of first appearance.

    Memory and time grow with the number of shingles; a shingle that is rare in its text but occurs
    in over 200 texts is compared only between neighbours in a similarity-preserving order.
    """
    words = [tuple(WORD.findall(text.lower())) for text in texts]
    first: dict[tuple[str, ...], int] = {}
    original = np.array(
        [
            first.setdefault(key or ("", text), i)
            for i, (key, text) in enumerate(zip(words, texts, strict=True))
        ],
        dtype=np.int64,
    )
    distinct = np.unique(original)
    sets = _without_template(_shingle_sets([words[index] for index in distinct.tolist()]))
    left, right = _similar_pairs(sets, threshold)
    return _components(len(texts), original, distinct[left], distinct[right])


def _shingle_sets(words: Sequence[tuple[str, ...]]) -> list[npt.NDArray[np.uint64]]:
    """Sorted unique 64-bit shingles per text; a text shorter than a shingle is one shingle."""
    ids: dict[str, int] = {}
    sets = []
    for text in words:
        codes = np.array([ids.setdefault(word, len(ids) + 1) for word in text], dtype=np.uint64)
        width = min(SHINGLE_WORDS, len(codes))
        mixed = np.zeros(max(len(codes) - width + 1, 0), dtype=np.uint64)
        for place in range(width):
            mixed = mix64(mixed + codes[place : place + len(mixed)])
        sets.append(np.unique(mixed))
    return sets


def _without_template(
    sets: list[npt.NDArray[np.uint64]],
) -> list[npt.NDArray[np.uint64]]:
    """The shingles of each text that most other texts lack: an instruction or a template that all
    share makes no two of them alike. A text that is nothing else keeps its shingles.
    """
    if len(sets) < FEWEST_FOR_TEMPLATE:
        return sets
    shingles, count = np.unique(np.concatenate(sets), return_counts=True)
    template = shingles[count > TEMPLATE_SHARE * len(sets)]
    if len(template) == 0:
        return sets
    own = [np.setdiff1d(members, template, assume_unique=True) for members in sets]
    shares = [len(rest) / max(1, len(members)) for rest, members in zip(own, sets, strict=True)]
    if float(np.median(shares)) < LEAST_OWN_SHARE:
        return sets  # nearly all is shared: copies with small changes
    return [rest if len(rest) else whole for rest, whole in zip(own, sets, strict=True)]


def _similar_pairs(sets: Sequence[npt.NDArray[np.uint64]], threshold: float) -> tuple[I64, I64]:
    """Pairs of texts whose Jaccard similarity reaches the threshold."""
    sizes = np.array([len(members) for members in sets], dtype=np.int64)
    if sizes.sum() == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    shingles = np.concatenate(sets)
    owner = np.repeat(np.arange(len(sets)), sizes)
    _, code, count = np.unique(shingles, return_inverse=True, return_counts=True)
    rank = np.empty(len(count), dtype=np.int64)
    rank[np.argsort(count, kind="stable")] = np.arange(len(count))
    rarity = rank[code]
    order = np.lexsort((rarity, owner))
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.arange(len(order)) - start
    prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    kept = order[place < np.repeat(prefix, sizes)]
    kept = kept[count[code[kept]] > 1]
    signature = np.array([members[0] if len(members) else 0 for members in sets], dtype=np.uint64)
    left, right = _candidates(rarity[kept], owner[kept], signature)
    return _verified(sizes, code, left, right, threshold)


def _candidates(shingle: I64, owner: I64, signature: npt.NDArray[np.uint64]) -> tuple[I64, I64]:
    """Pairs of owners of one shingle, each pair once."""
    order = np.lexsort((owner, signature[owner], shingle))
    shingle, owner = shingle[order], owner[order]
    size = np.bincount(shingle)[shingle] if len(shingle) else shingle
    pairs: list[I64] = []
    for distance in range(1, ALL_PAIRS_UP_TO):
        same = shingle[:-distance] == shingle[distance:]
        if distance > NEIGHBOURS_BEYOND:
            same &= size[:-distance] <= ALL_PAIRS_UP_TO
        found = np.flatnonzero(same)
        if len(found) == 0 and distance > NEIGHBOURS_BEYOND:
            break
        low = np.minimum(owner[found], owner[found + distance])
        high = np.maximum(owner[found], owner[found + distance])
        pairs.append(np.unique(low * np.int64(2**31) + high))
    merged = np.unique(np.concatenate(pairs)) if pairs else np.empty(0, np.int64)
    return merged // 2**31, merged % 2**31


def _verified(sizes: I64, code: I64, left: I64, right: I64, threshold: float) -> tuple[I64, I64]:
    """Those pairs whose Jaccard similarity reaches the threshold.

    sizes: shingles of each text; code: their numbers, text after text.
    """
    from scipy.sparse import csr_array

    a, b = sizes[left], sizes[right]
    kept = np.minimum(a, b) >= threshold * np.maximum(a, b)
    left, right = left[kept], right[kept]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    shape = (len(sizes), int(code.max(initial=-1)) + 1)
    table = csr_array((np.ones(len(code), np.int32), code, ends), shape)
    alike = np.zeros(len(left), dtype=bool)
    for first in range(0, len(left), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        shared = (table[left[part]] * table[right[part]]).sum(axis=1)
        either = sizes[left[part]] + sizes[right[part]] - shared
        alike[part] = shared >= threshold * either - 1e-9
    return left[alike], right[alike]


def _components(n_texts: int, original: I64, left: I64, right: I64) -> I64:
    """Connected components over similar pairs and exact copies, by union-find."""
    parent = original.tolist()

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        a, b = root(one), root(other)
        parent[max(a, b)] = min(a, b)
    numbers: dict[int, int] = {}
    labels = [numbers.setdefault(root(node), len(numbers)) for node in range(n_texts)]
    return np.array(labels, dtype=np.int64)
