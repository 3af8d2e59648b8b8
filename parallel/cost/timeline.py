"""A pipeline's timeline without running it: what each rank does in which order, and when. No torch.

The orders are those of `torch.distributed.pipelining` (a test compares them), which follow GPipe
(arXiv:1811.06965), 1F1B and interleaved 1F1B (arXiv:2104.04473, section 2.2), and the zero-bubble
schedules ZB1P and ZB-V (arXiv:2401.10241, sections 2 and 6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from motet.parallel.layout.layout import Layout

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"


class PipelinePass(NamedTuple):
    """One pass of one micro-batch through one stage.

    `kind` is "F" forward, "B" the whole backward pass, "I" its part for the inputs (which the stage
    before waits for), or "W" its part for the weights.
    """

    stage: int
    micro_batch: int
    kind: str


class TimedPass(NamedTuple):
    """An action with the rank that does it and its time."""

    rank: int
    stage: int
    micro_batch: int
    kind: str
    start_s: float
    end_s: float


def orders(
    schedule: str, pp: int, virtual_stages: int, micro_batches: int
) -> list[list[PipelinePass]]:
    """Return what every rank of a pipeline does, in order.

    Args:
        schedule: one of `layout.SCHEDULES`; with `virtual_stages` and `micro_batches` that
            `layout.rules` allows.
    """
    if schedule == "zbv_zero_bubble":
        return [_zbv(rank, pp, micro_batches) for rank in range(pp)]
    if schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
        apart = schedule == "interleaved_zero_bubble"
        return [_interleaved(r, pp, virtual_stages, micro_batches, apart) for r in range(pp)]
    if schedule == "gpipe":
        return [_one_stage(rank, micro_batches, micro_batches) for rank in range(pp)]
    if schedule == "1f1b":
        return [_one_stage(r, min(micro_batches, pp - 1 - r), micro_batches) for r in range(pp)]
    raise ValueError(f"{schedule!r} is no schedule")


def _one_stage(rank: int, warmup: int, micro_batches: int) -> list[PipelinePass]:
    """Some forward passes first, then one forward and one backward in turn, then the backward
    passes that are left.
    """
    # What runs ahead must wait in memory: a rank runs as far ahead as micro-batches are on their
    # way to the end and back.
    out = [PipelinePass(rank, n, FORWARD) for n in range(warmup)]
    for n in range(micro_batches):
        if warmup + n < micro_batches:
            out.append(PipelinePass(rank, warmup + n, FORWARD))
        out.append(PipelinePass(rank, n, BACKWARD))
    return out


class _Order:
    """A rank's actions; the micro-batches of one stage and kind come in order."""

    def __init__(self) -> None:
        self.actions: list[PipelinePass] = []
        self.done: Counter[tuple[int, str]] = Counter()

    def add(self, stage: int, *kinds: str) -> None:
        for kind in kinds:
            self.actions.append(PipelinePass(stage, self.done[stage, kind], kind))
            self.done[stage, kind] += 1


def _interleaved(
    rank: int, pp: int, virtual: int, micro_batches: int, apart: bool
) -> list[PipelinePass]:
    """Rounds of micro-batches through the rank's stages; `apart`: weight gradients follow once
    later ranks have their inputs.
    """
    per_round = micro_batches // max(1, micro_batches // pp)
    # Micro-batches go through a rank's stages in rounds, as many at a time as fill the pipeline.
    total = micro_batches * virtual
    hops = pp - 1 - rank
    # The first ranks run ahead by what comes back later; apart, gradients of inputs come back one
    # hop at a time, else forward and backward passes pair up at every hop.
    warmup = min((virtual - 1) * per_round + (hops if apart else 2 * hops), total)
    order = _Order()
    waiting: list[int] = []
    for step in range(total + warmup):
        if step < total:
            order.add(step // per_round % virtual * pp + rank, FORWARD)
        if step < warmup:
            continue
        stage = (virtual - 1 - (step - warmup) // per_round % virtual) * pp + rank
        order.add(stage, INPUT if apart else BACKWARD)
        # Weights' passes wait until no later rank waits for an input's gradient of this one: they
        # fill what would be idle time.
        if apart:
            waiting.append(stage)
            if step - warmup >= rank:
                order.add(waiting.pop(0), WEIGHT)
    for stage in waiting:
        order.add(stage, WEIGHT)
    return order.actions


def _zbv(rank: int, pp: int, micro_batches: int) -> list[PipelinePass]:
    """The V: stage `rank` on the way down, and its mirror on the way up.

    The order is made for at least 2 pp - 1 micro-batches, which fill the pipeline; those that do
    not exist are left out.
    """
    down, up = rank, 2 * pp - 1 - rank
    order = _Order()
    for _ in range(2 * (pp - rank) - 1):
        order.add(down, FORWARD)
    for _ in range(rank):
        order.add(up, FORWARD)
        order.add(down, FORWARD)
    for _ in range(pp - rank):
        order.add(up, FORWARD, INPUT, WEIGHT)
    # A V needs this many micro-batches to be full; with fewer, the same order is taken with holes.
    planned = max(2 * pp - 1, micro_batches)
    while (
        order.done[up, FORWARD] < order.done[down, FORWARD] or order.done[down, FORWARD] < planned
    ):
        if order.done[down, FORWARD] < planned:
            order.add(down, FORWARD)
        order.add(down, INPUT, WEIGHT)
        order.add(up, FORWARD, INPUT, WEIGHT)
    for _ in range(rank):
        order.add(down, INPUT)
        order.add(up, INPUT)
    for _ in range(pp - rank):
        order.add(down, INPUT, WEIGHT)
    for stage in (up, down):
        while order.done[stage, WEIGHT] < order.done[stage, INPUT]:
            order.add(stage, WEIGHT)
    return [action for action in order.actions if action.micro_batch < micro_batches]


def timeline(
    schedule: str,
    pp: int,
    virtual_stages: int,
    micro_batches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_s: Sequence[float] = (),
    send_s: Sequence[float] = (),
) -> list[TimedPass]:
    """Return every pass of one step with its time: each starts when its rank is free and what it
    needs has arrived.

    Args:
        forward_s, backward_s: of one micro-batch in every stage.
        weight_s: the part of `backward_s` that makes the weights' gradients, for the schedules that
            take it apart; () = half.
        send_s: from stage i to stage i + 1 on another rank, and back; computation goes on
            meanwhile. () = 0.

    Raises:
        ValueError: some rank waits for ever.
    """
    layout = Layout(pp=pp, virtual_stages=virtual_stages, schedule=schedule)
    rank_of = {stage: rank for rank in range(pp) for stage in layout.stages_of(rank)}
    # A backward pass makes two gradients by products of equal size.
    weight_s = weight_s or [s / 2 for s in backward_s]
    cost_s = {
        FORWARD: forward_s,
        BACKWARD: backward_s,
        INPUT: [b - w for b, w in zip(backward_s, weight_s, strict=True)],
        WEIGHT: weight_s,
    }
    pending = orders(schedule, pp, virtual_stages, micro_batches)
    works = _played(pending, cost_s, rank_of, send_s)
    if len(works) < sum(map(len, pending)):
        raise ValueError(
            f"{schedule} with pp={pp} and {micro_batches} micro-batches waits for ever"
        )
    return sorted(works, key=lambda work: (work.start_s, work.rank, work.end_s))


def _played(
    pending: list[list[PipelinePass]],
    cost_s: Mapping[str, Sequence[float]],
    rank_of: Mapping[int, int],
    send_s: Sequence[float],
) -> list[TimedPass]:
    """Let every rank go on as far as it can, in turn, until none can."""
    ends_s: dict[tuple[str, int, int], float] = {}
    clock_s, position, out = [0.0] * len(pending), [0] * len(pending), list[TimedPass]()
    moved = True
    # Ranks depend on each other both ways, so that no order of ranks does: round after round, until
    # nothing moves.
    while moved:
        moved = False
        for rank, actions in enumerate(pending):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                ready_s = _ready_s(action, ends_s, rank_of, send_s)
                # What it needs was not made yet: another rank goes on, and this one is asked again.
                if ready_s is None:
                    break
                start_s = max(clock_s[rank], ready_s)
                clock_s[rank] = start_s + cost_s[action.kind][action.stage]
                ends_s[_what(action.kind), action.stage, action.micro_batch] = clock_s[rank]
                out.append(TimedPass(rank, *action, start_s, clock_s[rank]))
                position[rank] += 1
                moved = True
    return out


def _what(kind: str) -> str:
    """The gradient of the inputs is what others wait for, whichever pass makes it."""
    return INPUT if kind == BACKWARD else kind


def _ready_s(
    action: PipelinePass,
    ends_s: dict[tuple[str, int, int], float],
    rank_of: Mapping[int, int],
    send_s: Sequence[float],
) -> float | None:
    """Return when what an action needs is there, None while that is not known."""
    stage, micro_batch, kind = action
    if kind == WEIGHT:
        return ends_s.get((INPUT, stage, micro_batch))
    # Hidden states come from the stage before, gradients from the one behind.
    other = stage - 1 if kind == FORWARD else stage + 1
    own_s = 0.0 if kind == FORWARD else ends_s.get((FORWARD, stage, micro_batch))
    if other not in rank_of or own_s is None:
        return own_s
    arrived_s = ends_s.get((_what(kind), other, micro_batch))
    if arrived_s is None:
        return None
    # Stages on one rank, as in a V's turn, hand over without sending.
    if send_s and rank_of[other] != rank_of[stage]:
        arrived_s += send_s[min(stage, other)]
    return max(own_s, arrived_s)


def bubble(works: Sequence[TimedPass]) -> float:
    """Return the share of all ranks' time, from the first pass to the last, in which they wait."""
    total_s = max(work.end_s for work in works) - min(work.start_s for work in works)
    busy_s = sum(work.end_s - work.start_s for work in works)
    return 1.0 - busy_s / (total_s * len({work.rank for work in works}))


def most_held(actions: Sequence[PipelinePass]) -> int:
    """Return the most (stage, micro-batch) pairs whose activations a rank holds at once, given its
    actions in order.
    """
    held = most = 0
    for action in actions:
        held += {FORWARD: 1, BACKWARD: -1, WEIGHT: -1}.get(action.kind, 0)
        most = max(most, held)
    return most
