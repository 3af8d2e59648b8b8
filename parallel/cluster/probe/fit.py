"""From timed transfers to links and groups of hosts: sizes to try, latency and bandwidth, who
stands near whom. Pure; no torch.

A transfer of S bytes that the receiver acknowledges takes 2 x latency + S / bandwidth.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from motet.parallel.cluster.description import ClusterError

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, *(MIB << i for i in range(7)))
"""64 bytes tell the latency; then 4 KiB to 64 MiB."""
MOST_REPEATS, LEAST_REPEATS = 6, 2
LONG_S, LONG_REPEATS = 0.05, 3
"""Transfers that take longer than this are repeated less: larger ones tell more."""
LEAST_TRANSFERS = 40
UPPER_SIZES = 16
"""Sizes from 1/16 of the largest on tell the bandwidth."""
IN_A_BURST = 0.5
"""A size that took less than this share of its part of the largest transfer's time went through in
a burst: it tells nothing.
"""
SAME_LINK = 2.0
"""Hosts belong together where their rate is within this factor of the best that either has."""
FAR_LATENCY, FAR_LATENCY_US = 20.0, 500.0
"""Hosts do not belong together where latency is this many times, and this much, above the best of
either.
"""
MOST_HOSTS_COMPARED = 64


@dataclass(frozen=True)
class Sample:
    """One transfer: bytes of each flow, and the seconds that each flow took."""

    size: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class LinkFit:
    """A link as it was measured.

    Attributes:
        gb_s: 10^9 bytes per second in one direction, of all flows together.
        latency_us: of one direction.
        residual: median of |measured / fitted - 1| over all transfers.
        largest: bytes of the largest transfer of one flow.
        samples: transfers.
    """

    gb_s: float
    latency_us: float
    residual: float
    largest: int
    samples: int


def climb(
    measure: Callable[[int], Sequence[float]], budget_s: float, sizes: Sequence[int] = SIZES
) -> list[Sample]:
    """Measure ever larger transfers for about `budget_s` seconds: a slow link is not asked for
    sizes that would take minutes.

    A link with a long way gets as long as 40 of its smallest transfers take.

    Args:
        measure: bytes to the seconds of every flow; the same numbers on every rank, so that all go
            on alike.
    """
    samples: list[Sample] = []
    spent_s, taken_s = 0.0, {0: 0.0}
    for size in sizes:
        expected_s = _expected(taken_s, size)
        repeats = LONG_REPEATS if expected_s > LONG_S else MOST_REPEATS
        if expected_s:
            repeats = min(repeats, int((budget_s - spent_s) / expected_s))
        if repeats < LEAST_REPEATS:
            break
        now = [Sample(size, tuple(measure(size))) for _ in range(repeats)]
        samples += now
        slowest = [max(sample.seconds) for sample in now]
        spent_s += sum(slowest)
        taken_s[size] = min(slowest)
        budget_s = max(budget_s, LEAST_TRANSFERS * min(taken_s[one] for one in taken_s if one))
    return samples


def _expected(taken_s: Mapping[int, float], size: int) -> float:
    """Return the seconds that a size should take after those before: they grow on as from the last
    size to this one.
    """
    *_, last = taken_s
    if len(taken_s) < 3:
        return taken_s[last]
    before = list(taken_s)[-2]
    growth = max(0.0, taken_s[last] - taken_s[before]) / (last - before)
    return taken_s[last] + growth * (size - last)


def best_seconds(samples: Sequence[Sample], flow: int | None = None) -> dict[int, float]:
    """Return the shortest time by size: other work of the machine only adds to it.

    `flow`: of this one; None: until the last ends.
    """
    found: dict[int, float] = {}
    for sample in samples:
        seconds = max(sample.seconds) if flow is None else sample.seconds[flow]
        found[sample.size] = min(seconds, found.get(sample.size, seconds))
    return found


def fit(samples: Sequence[Sample], flow: int | None = None) -> LinkFit:
    """Return latency and bandwidth: half the time of the smallest transfers, the slope of the
    largest.

    The slope is Theil-Sen's, each pair of sizes weighted by their difference (Sievers, JASA
    73(363), 1978). A slope forgets what is constant: the latency, and the burst that a shaped link
    lets through at once.

    Raises:
        ValueError: there are no samples.
    """
    best = best_seconds(samples, flow)
    if not best:
        raise ValueError("nothing was measured")
    flows = len(samples[0].seconds) if flow is None else 1
    small, large = min(best), max(best)
    share = IN_A_BURST * best[large] / large
    upper = sorted(n for n in best if n * UPPER_SIZES >= large and best[n] >= share * n)
    slopes = [((best[b] - best[a]) / (b - a), b - a) for a, b in combinations(upper, 2)]
    slope = _weighted_median(slopes)
    if slope <= 0:  # nothing but noise: the largest transfer as a whole
        slope = best[large] / large
    latency_s = best[small] / 2
    residual = _residual(samples, flow, slope, latency_s)
    return LinkFit(flows / slope / 1e9, latency_s * 1e6, residual, large, len(samples))


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the median of (value, weight) pairs; 0 of none."""
    half, passed = sum(weight for _, weight in pairs) / 2, 0.0
    for value, weight in sorted(pairs):
        passed += weight
        if passed >= half:
            return value
    return 0.0


def _residual(samples: Sequence[Sample], flow: int | None, slope: float, latency_s: float) -> float:
    errors = []
    for sample in samples:
        seconds = max(sample.seconds) if flow is None else sample.seconds[flow]
        errors.append(abs(seconds / (2 * latency_s + sample.size * slope) - 1))
    return statistics.median(errors)


def rounds(hosts: int) -> list[list[tuple[int, int]]]:
    """Return every pair of hosts once, in rounds in which no host is in two pairs (circle method of
    tournaments).
    """
    players = [*range(hosts), *([-1] if hosts % 2 else [])]
    out = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        met = zip(players[:half], reversed(players[half:]), strict=True)
        out.append([(min(a, b), max(a, b)) for a, b in met if min(a, b) >= 0])
        players = [players[0], players[-1], *players[1:-1]]
    return out


def together(links: Mapping[tuple[int, int], LinkFit], hosts: int) -> list[list[int]]:
    """Return groups of hosts by what was measured between them, in order of their first hosts.

    Two hosts belong together where their rate is within a factor of 2 of the best that either of
    them has, and their latency is not far above the best of either. What belongs to one of a group
    belongs to the group.

    Args:
        links: for every pair (a, b), a < b.
    """
    rate = dict.fromkeys(range(hosts), 0.0)
    latency = {host: float("inf") for host in range(hosts)}
    for pair, link in links.items():
        for host in pair:
            rate[host] = max(rate[host], link.gb_s)
            latency[host] = min(latency[host], link.latency_us)
    leader = list(range(hosts))
    for (a, b), link in sorted(links.items()):
        best_us = min(latency[a], latency[b])
        far = link.latency_us > max(FAR_LATENCY * best_us, best_us + FAR_LATENCY_US)
        if link.gb_s * SAME_LINK >= max(rate[a], rate[b]) and not far:
            old, new = max(leader[a], leader[b]), min(leader[a], leader[b])
            leader = [new if one == old else one for one in leader]
    return [[h for h in range(hosts) if leader[h] == first] for first in sorted(set(leader))]


def check_groups(groups: Mapping[str, Sequence[str]], hosts: Sequence[str]) -> None:
    """Raise ClusterError unless every host that there is stands in exactly one of the groups that
    the user gave.
    """
    named = [host for members in groups.values() for host in members]
    twice = sorted({host for host in named if named.count(host) > 1})
    absent = [host for host in named if host not in hosts]
    left = [host for host in hosts if host not in named]
    wrong = []
    if twice:
        wrong.append(f"{', '.join(twice)} in more than one group")
    if absent:
        wrong.append(f"{', '.join(absent)} given, but no process runs there")
    if left:
        wrong.append(f"{', '.join(left)} in no group")
    if wrong:
        raise ClusterError(f"--groups: {'; '.join(wrong)}; the hosts are {', '.join(hosts)}")
