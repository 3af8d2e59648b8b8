"""Where exposures go: keyed positions without collisions.

A position is drawn from a counter keyed by (plan seed, experiment, unit, repetition, attempt), so
it does not depend on which other experiments exist. Only a collision moves an exposure: the later
claimant draws again from its own key. Earlier experiments (in registration order) claim first;
inside an experiment a keyed priority decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.experiments.stream.random import U64, mix64, name_key, philox, uniform_int

I64 = npt.NDArray[np.int64]
PLACEMENTS = ("anywhere", "start", "boundary")
MOST_ATTEMPTS = 400

Boundaries = Callable[[int], I64]
"""slot -> offsets in (0, sequence_length) at which a base document begins."""


@dataclass(frozen=True)
class Texts:
    """Token sequences end to end: text i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: npt.NDArray[np.unsignedinteger]
    offsets: I64

    @classmethod
    def of(cls, texts: list[npt.NDArray[np.integer]], dtype: npt.DTypeLike) -> Texts:
        """Pack a list of token arrays."""
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        tokens = np.concatenate(texts) if texts else np.empty(0)
        return cls(tokens.astype(dtype), offsets)

    def lengths(self) -> I64:
        """Return tokens per text, int64 [texts]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Request:
    """The exposures that one experiment asks for; rows are (unit, repetition) pairs.

    Attributes:
        experiment: its name, part of every draw's key.
        unit_keys: uint64 [units], distinct.
        unit: int32 [rows], index into `unit_keys`.
        repetition: int32 [rows]; (unit, repetition) pairs are distinct.
        text: int32 [rows], index into `texts`.
        first_slot, last_slot: int64 [rows]; the exposure lies in [first_slot, last_slot).
        texts: what is inserted, already wrapped in end-of-document tokens.
        placement: "anywhere" and "start" (offset 0) overwrite base tokens; "boundary" takes a place
            between two base documents and moves the rest of the sequence to the right.
        placebo: bool [rows], True where the text is base text for a held-out unit.
    """

    experiment: str
    unit_keys: U64
    unit: npt.NDArray[np.int32]
    repetition: npt.NDArray[np.int32]
    text: npt.NDArray[np.int32]
    first_slot: I64
    last_slot: I64
    texts: Texts
    placement: str = "anywhere"
    placebo: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __len__(self) -> int:
        return len(self.unit)


@dataclass(frozen=True)
class Claims:
    """Token ranges that are taken: sorted, disjoint, in positions slot * sequence_length +
    offset.
    """

    start: I64
    stop: I64

    @classmethod
    def none(cls) -> Claims:
        """Return no claims."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def overlap(self, start: I64, stop: I64) -> npt.NDArray[np.bool_]:
        """Return which of the ranges [start, stop) overlap a claim."""
        if len(self.start) == 0 or len(start) == 0:
            return np.zeros(len(start), dtype=bool)
        before = np.searchsorted(self.start, stop, side="left") - 1
        return (before >= 0) & (self.stop[np.maximum(before, 0)] > start)

    def add(self, start: I64, stop: I64) -> Claims:
        """Return these claims and new disjoint ones."""
        if len(self.start) == 0:
            order = np.argsort(start)
            return Claims(start[order], stop[order])
        starts = np.concatenate([self.start, start])
        order = np.argsort(starts, kind="stable")
        return Claims(starts[order], np.concatenate([self.stop, stop])[order])


@dataclass(frozen=True)
class Placed:
    """Positions of one request's rows: slot int64 [rows], offset int64 [rows], and what they
    claim.
    """

    slot: I64
    offset: I64
    claims: Claims


def place(
    request: Request,
    seed: int,
    sequence_length: int,
    taken: Claims,
    boundaries: Boundaries | None = None,
) -> Placed:
    """Draw a free position for every row of a request.

    Args:
        request: what to place.
        seed: the plan's seed.
        sequence_length: tokens per slot.
        taken: what earlier experiments claimed.
        boundaries: document starts of the base stream, needed for placement "boundary".

    Returns:
        the positions, and `taken` with this request's claims added.

    Raises:
        UserError: a text does not fit in a sequence, or the window is too full.
    """
    _check_request(request, sequence_length, boundaries)
    key = name_key(seed, "place", request.experiment)
    lengths = request.texts.lengths()[request.text]
    low_word = request.repetition.astype(np.uint64) << np.uint64(32)
    units = request.unit_keys[request.unit]
    slot = np.empty(len(request), dtype=np.int64)
    offset = np.empty(len(request), dtype=np.int64)
    pending = np.arange(len(request))
    for attempt in range(MOST_ATTEMPTS):
        if len(pending) == 0:
            return Placed(slot, offset, taken)
        whole = len(pending) == len(request)
        rows: slice | npt.NDArray[np.int64] = slice(None) if whole else pending
        bits0, bits1 = philox(key, units[rows], low_word[rows] | np.uint64(attempt))
        slots = uniform_int(bits0, request.first_slot[rows], request.last_slot[rows])
        offsets = _draw_offsets(request, bits1, slots, lengths[rows], sequence_length, boundaries)
        start = slots * sequence_length + np.where(offsets < 0, 0, offsets)
        stop = start + lengths[rows]
        if request.placement == "boundary":
            start, stop = slots * sequence_length, (slots + 1) * sequence_length
        free = (offsets >= 0) & ~taken.overlap(start, stop)
        candidates = np.flatnonzero(free)
        priority = mix64(units[rows][candidates] ^ (low_word[rows][candidates] + np.uint64(key)))
        kept = candidates[_disjoint(start[candidates], stop[candidates], priority)]
        taken = taken.add(start[kept], stop[kept])
        slot[pending[kept]], offset[pending[kept]] = slots[kept], offsets[kept]
        lost = np.ones(len(pending), dtype=bool)
        lost[kept] = False
        pending = pending[lost]
    if len(pending) == 0:
        return Placed(slot, offset, taken)
    raise UserError(_too_full(request, pending, lengths, sequence_length))


def _draw_offsets(
    request: Request,
    bits: U64,
    slots: I64,
    lengths: I64,
    sequence_length: int,
    boundaries: Boundaries | None,
) -> I64:
    """Return an offset per row; -1 where the slot has no boundary that fits."""
    if request.placement == "start":
        return np.zeros(len(slots), dtype=np.int64)
    if request.placement == "anywhere":
        return uniform_int(bits, 0, sequence_length - lengths + 1)
    assert boundaries is not None
    offsets = np.full(len(slots), -1, dtype=np.int64)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        fitting = boundaries(int(slot))
        fitting = fitting[fitting <= sequence_length - length]
        if len(fitting):
            offsets[row] = fitting[int(bits[row] % np.uint64(len(fitting)))]
    return offsets


def _disjoint(start: I64, stop: I64, priority: U64) -> I64:
    """Return indices of ranges, none of which overlap: of two that do, the lower priority number
    stays.

    With ranges sorted by start, any overlap implies an overlap between neighbours, so removing the
    losing neighbour until no neighbours overlap is enough.
    """
    order = np.argsort(start)
    while True:
        first, second = order[:-1], order[1:]
        clash = stop[first] > start[second]
        if not clash.any():
            return order
        first, second = first[clash], second[clash]
        first_wins = priority[first] <= priority[second]
        losers = np.where(first_wins, second, first)
        keep = np.ones(len(start), dtype=bool)
        keep[losers] = False
        order = order[keep[order]]


def repeats(keys: U64) -> bool:
    """Return whether a value occurs twice."""
    ordered = np.sort(keys)
    return bool(np.any(ordered[1:] == ordered[:-1]))


def _check_request(request: Request, sequence_length: int, boundaries: Boundaries | None) -> None:
    """Refuse what cannot be placed, before anything is drawn."""
    name = f"experiments.{request.experiment}"
    if request.placement not in PLACEMENTS:
        raise UserError(f"{name}.placement={request.placement!r}: use one of {PLACEMENTS}")
    if request.placement == "boundary" and boundaries is None:
        raise UserError(f"{name}.placement='boundary' needs the corpus to find boundaries")
    if repeats(request.unit_keys):
        raise UserError(f"{name}: two units have the same id")
    lengths = request.texts.lengths()
    if len(request) and lengths[request.text].max() > sequence_length:
        raise UserError(
            f"{name}: a text of {lengths[request.text].max():,} tokens (end-of-document tokens "
            "included) "
            f"does not fit in data.sequence_length={sequence_length:,}; shorten it or lengthen the "
            "sequence"
        )


def _too_full(
    request: Request, pending: npt.NDArray[np.int64], lengths: I64, sequence_length: int
) -> str:
    """Return the message for a window with no room left."""
    slots = int(request.last_slot.max() - request.first_slot.min())
    asked = int(lengths.sum())
    return (
        f"experiments.{request.experiment}: {len(pending):,} of {len(request):,} exposures found "
        "no free place in "
        f"their windows after {MOST_ATTEMPTS} draws; the experiment asks for {asked:,} of the "
        f"{slots * sequence_length:,} "
        "tokens there, next to what other experiments hold (random places without overlap fill "
        "about three quarters at most, "
        "Renyi 1958). Widen schedule.window, lower the doses, or lengthen the run"
    )
