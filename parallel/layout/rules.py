"""Every rule that a layout obeys, in one pure function: no torch, no process, no file.

`model_rules.py` has those that ask the sizes of the model.

A problem is (setting, message). The message says what the value is, why that cannot be, and the
nearest values that break no rule of this setting while the other settings stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from motet.models.config import ModelConfig
from motet.parallel.layout.layout import (
    ENGINES,
    RECOMPUTE,
    SCHEDULES,
    Layout,
)
from motet.parallel.layout.model_rules import model_problems
from motet.parallel.layout.nearest import BrokenRule, nearest_text

_NATIVE_DEGREES = ("tp", "pp", "cp", "ep", "etp")
DEGREES = ("dp_replicate", "dp_shard", *_NATIVE_DEGREES)
_SINGLE = ("gpipe", "1f1b")
_INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble")
_MOST_SHOWN = 32


def problems(
    layout: Layout,
    model: ModelConfig | None,
    sequence_length: int,
    batch_sizes: Sequence[int],
    world_size: int | None,
) -> list[BrokenRule]:
    """Return every (setting, message) that makes a layout unusable; an empty list means that it is
    sound.

    Args:
        model: its sizes, themselves sound; a `vocabulary_size` of 0 is not known yet. None: rules
            that need them are left out.
        sequence_length: tokens of one sequence.
        batch_sizes: sequences of one step: first `batch.sequences`, then those of the stages of
            `batch.ramp`.
        world_size: ranks that are started; None: as many as the layout wants.
    """
    broken = _value_problems(layout)
    if broken:
        return broken
    broken += [] if world_size is None else _world_problems(layout, world_size)
    broken += [*_engine_problems(layout), *_placement_problems(layout)]
    if (
        layout.engine != "native"
    ):  # a degree that the engine does not have needs no second complaint
        layout = replace(layout, tp=1, pp=1, cp=1, ep=1, etp=1)
    broken += _schedule_problems(layout)
    broken += _sequence_problems(layout, sequence_length)
    if model is not None:
        broken += model_problems(layout, model, sequence_length)
    shares = _share_problems(layout)
    return broken + (shares or _batch_problems(layout, batch_sizes))


def step_unit(layout: Layout) -> int:
    """Return the sequences that every step is a multiple of: one micro-batch, times its share, on
    every data-parallel rank.
    """
    shares = layout.shares or (1,) * layout.dp_replicate
    return layout.micro_sequences * sum(shares) * layout.dp_shard


def micro_batches(layout: Layout, sequences: int) -> tuple[int, ...]:
    """Return the micro-batches of one step on a rank of each replica; `sequences` is a multiple of
    `step_unit`.
    """
    units = sequences // step_unit(layout)
    return tuple(units * share for share in layout.shares or (1,) * layout.dp_replicate)


def schedule_takes(layout: Layout, n_micro_batches: int) -> bool:
    """Return whether the pipeline schedule can run this many micro-batches (as torch's own
    schedules demand).
    """
    if layout.pp == 1:
        return True
    if layout.schedule == "1f1b":
        return n_micro_batches >= layout.pp
    if layout.schedule in _INTERLEAVED:
        return n_micro_batches % max(1, n_micro_batches // layout.pp) == 0
    return True


def _value_problems(layout: Layout) -> list[BrokenRule]:
    """Values that mean nothing on their own; other rules would only repeat them."""
    found = [
        (f"layout.{name}", f"{getattr(layout, name)} is not at least 1; nearest: 1")
        for name in (*DEGREES, "virtual_stages", "micro_sequences")
        if getattr(layout, name) < 1
    ]
    choices = {"engine": ENGINES, "schedule": SCHEDULES, "recompute": RECOMPUTE}
    return found + [
        (f"layout.{name}", f"{getattr(layout, name)!r} is not one of {', '.join(known)}")
        for name, known in choices.items()
        if getattr(layout, name) not in known
    ]


def _world_problems(layout: Layout, world_size: int) -> list[BrokenRule]:
    if layout.world_size == world_size:
        return []
    names = ("dp_replicate", "dp_shard", "tp", "pp", "cp")
    shown = " x ".join(f"{name} {getattr(layout, name)}" for name in names)
    others = layout.world_size // layout.dp_shard
    if world_size % others == 0:
        why = (
            f"{shown} = {layout.world_size:,} ranks, but {world_size:,} are started "
            f"(layout.processes x nodes); dp_shard={world_size // others:,} fits, and so does null"
        )
        return [("layout.dp_shard", why)]
    shown = " x ".join(f"{name} {getattr(layout, name)}" for name in names if name != "dp_shard")
    below = world_size // others * others
    near = nearest_text([n for n in (below, below + others) if n])
    why = (
        f"{world_size:,} ranks (layout.processes x nodes) are not a multiple of {shown} = "
        f"{others:,}; "
        f"{near} ranks"
    )
    return [("layout.processes", why)]


def _engine_problems(layout: Layout) -> list[BrokenRule]:
    """DeepSpeed and Accelerate divide data and weights; everything else is the native engine's."""
    if layout.engine == "native":
        return []
    broken = [
        (
            f"layout.{name}",
            f"{getattr(layout, name)} is more than layout.engine={layout.engine} can do; nearest: "
            "1, or set layout.engine=native",
        )
        for name in _NATIVE_DEGREES
        if getattr(layout, name) > 1
    ]
    if len(set(layout.shares)) > 1:
        why = (
            f"{list(layout.shares)} differ, and layout.engine={layout.engine} gives every rank as "
            "much; leave them out"
        )
        broken.append(("layout.shares", why))
    if layout.engine == "accelerate" and layout.dp_replicate > 1 and layout.dp_shard > 1:
        why = (
            f"{layout.dp_replicate} with layout.dp_shard={layout.dp_shard}: "
            "layout.engine=accelerate shards over all ranks (dp_replicate=1) or "
            "over none (dp_shard=1); set one of them to 1, or layout.engine=native"
        )
        broken.append(("layout.dp_replicate", why))
    return broken


def _schedule_problems(layout: Layout) -> list[BrokenRule]:
    schedule, stages = layout.schedule, layout.virtual_stages
    if layout.pp == 1:
        found = []
        if stages > 1:
            why = f"{stages} stages per rank need layout.pp of at least 2; nearest: 1"
            found.append(("layout.virtual_stages", why))
        if schedule not in _SINGLE:
            why = f"{schedule} needs layout.pp of at least 2; with pp=1 leave it out, or set 1f1b"
            found.append(("layout.schedule", why))
        return found
    if schedule in _SINGLE and stages > 1:
        why = (
            f"{stages} is more than the one stage per rank of layout.schedule={schedule}; nearest: "
            "1, or set interleaved_1f1b"
        )
        return [("layout.virtual_stages", why)]
    if schedule in _INTERLEAVED and stages < 2:
        why = (
            f"1 is less than layout.schedule={schedule} interleaves; nearest: 2, or set "
            "layout.schedule=1f1b"
        )
        return [("layout.virtual_stages", why)]
    if schedule == "zbv_zero_bubble" and stages != 2:
        why = f"{stages} is not 2, the two arms of the V of layout.schedule={schedule}; nearest: 2"
        return [("layout.virtual_stages", why)]
    return []


def _sequence_problems(layout: Layout, sequence_length: int) -> list[BrokenRule]:
    """Tensor-parallel ranks hold equal parts of a sequence; context ranks an early and a late chunk
    of it (zigzag).
    """
    factors = {"2": 2, f"layout.cp {layout.cp}": layout.cp} if layout.cp > 1 else {}
    if layout.tp > 1 and layout.sequence_parallel:
        factors[f"layout.tp {layout.tp}"] = layout.tp
    unit = math.prod(factors.values())
    if sequence_length % unit == 0:
        return []
    below = sequence_length // unit * unit
    near = nearest_text([n for n in (below, below + unit) if n])
    why = f"{sequence_length:,} is not a multiple of {unit:,} ({' x '.join(factors)}); {near}"
    return [("data.sequence_length", why)]


def _placement_problems(layout: Layout) -> list[BrokenRule]:
    written, size = layout.placement, layout.world_size
    if not written or sorted(written) == list(range(size)):
        return []
    missing = sorted(set(range(size)) - set(written))
    foreign = sorted(set(written) - set(range(size)))
    ordered = sorted(written)
    twice = sorted({a for a, b in pairwise(ordered) if a == b})
    whys = [
        f"{text} {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
        for text, ranks in (
            ("misses", missing),
            ("names no rank with", foreign),
            ("repeats", twice),
        )
        if ranks
    ]
    why = (
        f"holds each rank from 0 to {size - 1:,} once, but {' and '.join(whys)}; leave it out for "
        "the plain order"
    )
    if size <= _MOST_SHOWN:
        kept = list(dict.fromkeys(rank for rank in written if 0 <= rank < size))
        why += f"; nearest: {[*kept, *missing]}"
    return [("layout.placement", why)]


def _share_problems(layout: Layout) -> list[BrokenRule]:
    shares, replicas = layout.shares, layout.dp_replicate
    if not shares or (len(shares) == replicas and all(share >= 1 for share in shares)):
        return []
    whys = (
        []
        if len(shares) == replicas
        else [f"has {len(shares)} numbers for layout.dp_replicate={replicas}"]
    )
    if any(share < 1 for share in shares):
        whys.append("gives a replica nothing to do")
    near = [max(share, 1) for share in (*shares, *([1] * replicas))[:replicas]]
    return [("layout.shares", f"{list(shares)} {' and '.join(whys)}; nearest: {near}")]


def _batch_problems(layout: Layout, batch_sizes: Sequence[int]) -> list[BrokenRule]:
    """A step is a whole number of micro-batches on every data-parallel rank, as many as the
    pipeline's schedule can run.
    """
    unit = step_unit(layout)

    def fits(units: int) -> bool:
        return all(schedule_takes(layout, n) for n in micro_batches(layout, units * unit))

    broken = []
    for i, sequences in enumerate(batch_sizes):
        if sequences % unit == 0 and fits(sequences // unit):
            continue
        units, rest = divmod(sequences, unit)
        # Multiples of pp fit every schedule, so that the search ends within pp units.
        below = next((n for n in range(units if rest else units - 1, 0, -1) if fits(n)), None)
        above = next(n for n in range(units + 1, units + 2 * layout.pp + 1) if fits(n))
        near = nearest_text([n * unit for n in (below, above) if n])
        why = f"{_why_not(layout, sequences)}; {near}"
        broken.append((f"batch.ramp.{i - 1}.sequences" if i else "batch.sequences", why))
    return broken


def _why_not(layout: Layout, sequences: int) -> str:
    unit = step_unit(layout)
    if sequences % unit:
        shares = layout.shares or (1,) * layout.dp_replicate
        parts = (
            f"layout.micro_sequences {layout.micro_sequences:,} x "
            f"{sum(shares) * layout.dp_shard:,} "
        )
        return f"{sequences:,} is not a multiple of {unit:,} ({parts}{_dp_ranks(layout)})"
    wrong = next(n for n in micro_batches(layout, sequences) if not schedule_takes(layout, n))
    needs = (
        f"at least {layout.pp}"
        if layout.schedule == "1f1b"
        else f"equal rounds of at least {layout.pp}, such as a multiple of {layout.pp}"
    )
    return (
        f"{sequences:,} makes {wrong} micro-batches per replica; layout.schedule={layout.schedule} "
        f"on layout.pp={layout.pp} needs {needs}"
    )


def _dp_ranks(layout: Layout) -> str:
    ways = [f"dp_shard {layout.dp_shard}"]
    if layout.shares:
        ways.insert(0, f"shares {list(layout.shares)}")
    elif layout.dp_replicate > 1:
        ways.insert(0, f"dp_replicate {layout.dp_replicate}")
    return f"for {' x '.join(ways)}" if layout.dp_size > 1 else "data-parallel rank"
