"""Where exposures go: keyed positions without collisions, and all of them as rows in order.

A position is drawn from a counter keyed by (plan seed, experiment, unit, repetition, attempt), so
it does not depend on which other experiments exist. Only a collision moves an exposure: the later
claimant draws again from its own key. Earlier experiments (in registration order) claim first;
inside an experiment a keyed priority decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, UserError, problems_in, raise_problems
from motet.experiments.stream.claims import Claims, disjoint
from motet.experiments.stream.random import U64, mix64, name_key, philox, uniform_int
from motet.experiments.stream.texts import Texts as Texts
from motet.experiments.stream.texts import join_texts

I64 = npt.NDArray[np.int64]
PLACEMENTS = ("anywhere", "start", "boundary")
MOST_ATTEMPTS = 400
COLUMNS = {
    "slot": np.int64,
    "offset": np.int32,
    "text": np.int64,
    "id": np.uint64,
    "experiment": np.uint16,
    "unit": np.int32,
    "repetition": np.int32,
    "flags": np.uint8,
}
PLACEBO_FLAG, SHIFT_FLAG, NOISE_FLAG = 1, 2, 4

Boundaries = Callable[[int], I64]
"""slot -> offsets in (0, sequence_length) at which a base document begins."""


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
        noise_deviation: of the noise on the input embeddings of what is no placebo; 0 for none.
        offset: int64 [rows], the one place of each exposure in its slot, where it is not drawn.
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
    noise_deviation: float = 0.0
    offset: I64 | None = None

    def __len__(self) -> int:
        return len(self.unit)


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
    slot, offset = np.empty((2, len(request)), dtype=np.int64)
    pending = np.arange(len(request))
    for attempt in range(MOST_ATTEMPTS):
        if len(pending) == 0 or (attempt and request.offset is not None):
            break  # a place that is given is not drawn again
        # The first time all rows are drawn: a slice reads them without copying them.
        rows = slice(None) if len(pending) == len(request) else pending
        won = _attempt(request, key, rows, attempt, sequence_length, taken, boundaries)
        taken = taken.add(won.start, won.stop)
        slot[pending[won.row]], offset[pending[won.row]] = won.slot, won.offset
        pending = np.delete(pending, won.row)
    if len(pending):
        raise_problems([_too_full(request, pending, sequence_length)])
    return Placed(slot, offset, taken)


class _Won(NamedTuple):
    """Those of the drawn rows that found a place: their number among the drawn, and the place."""

    row: I64
    slot: I64
    offset: I64
    start: I64
    stop: I64


def _attempt(
    request: Request,
    key: int,
    rows: slice | I64,
    attempt: int,
    sequence_length: int,
    taken: Claims,
    boundaries: Boundaries | None,
) -> _Won:
    """Draw a place for each of the rows, and keep those that collide with nothing."""
    lengths = request.texts.lengths()[request.text[rows]]
    units = request.unit_keys[request.unit[rows]]
    # Repetition and attempt share one word of the counter: a row that lost draws the next number of
    # its own, whoever else draws.
    repetition = request.repetition[rows].astype(np.uint64) << np.uint64(32)
    bits0, bits1 = philox(key, units, repetition | np.uint64(attempt))
    slots = uniform_int(bits0, request.first_slot[rows], request.last_slot[rows])
    offsets = _draw_offsets(request, bits1, slots, lengths, sequence_length, boundaries, rows)
    start = slots * sequence_length + np.maximum(offsets, 0)
    stop = start + lengths
    if request.placement == "boundary":
        # It moves all that follows in its slot, so nothing else may lie there.
        start, stop = slots * sequence_length, (slots + 1) * sequence_length
    free = np.flatnonzero((offsets >= 0) & ~taken.overlap(start, stop))
    # Who wins does not depend on the attempt: else a row could lose every time to another one.
    priority = mix64(units[free] ^ (repetition[free] + np.uint64(key)))
    won = free[disjoint(start[free], stop[free], priority)]
    return _Won(won, slots[won], offsets[won], start[won], stop[won])


def _draw_offsets(
    request: Request,
    bits: U64,
    slots: I64,
    lengths: I64,
    sequence_length: int,
    boundaries: Boundaries | None,
    rows: slice | I64,
) -> I64:
    """Return an offset per row; -1 where the slot has no boundary that fits."""
    if request.offset is not None:
        return request.offset[rows]
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


def _too_full(request: Request, pending: I64, sequence_length: int) -> Problem:
    """Return what to say of a window with no room left, or of given places that are taken."""
    if request.offset is not None:
        message = "given places are held by others; leave experiments.lock out, or those units"
        return Problem(f"experiments.{request.experiment}", f"{len(pending):,} {message}")
    slots = int(request.last_slot.max() - request.first_slot.min())
    asked = int(request.texts.lengths()[request.text].sum())
    message = (
        f"{len(pending):,} of {len(request):,} exposures found no free place in "
        f"their windows after {MOST_ATTEMPTS} draws; the experiment asks for {asked:,} of the "
        f"{slots * sequence_length:,} "
        "tokens there, next to what other experiments hold (random places without overlap fill "
        "about three quarters at most, "
        "Renyi 1958). Widen schedule.window, lower the doses, or lengthen the run"
    )
    return Problem(f"experiments.{request.experiment}", message)


@dataclass(frozen=True)
class Exposures:
    """Rows of a plan as columns; all arrays have one length."""

    slot: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int32]
    text: npt.NDArray[np.int64]
    id: U64
    experiment: npt.NDArray[np.uint16]
    unit: npt.NDArray[np.int32]
    repetition: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(frozen=True)
class CompiledPlan:
    """A plan in memory, before it is written."""

    sequence_length: int
    seed: int
    experiments: tuple[str, ...]
    rows: Exposures
    texts: Texts
    noise: Mapping[str, float] = field(default_factory=dict)
    """Experiments whose exposures carry noise, and its standard deviation."""


def exposure_ids(experiment: str, unit_keys: U64, repetition: npt.NDArray[np.int32]) -> U64:
    """Return the stable id of each exposure: it names (experiment, unit, repetition), never a row
    number.
    """
    key = np.uint64(name_key("exposure", experiment))
    return mix64(mix64(unit_keys ^ key) + repetition.astype(np.uint64))


def compile_plan(
    requests: Sequence[Request],
    seed: int,
    sequence_length: int,
    tombstones: Sequence[tuple[int, Claims]] = (),
    boundaries: Boundaries | None = None,
    fixed: Sequence[tuple[Request, Placed]] = (),
) -> CompiledPlan:
    """Place every request, in order of precedence, and sort the rows by slot.

    Args:
        requests: one per experiment, the oldest registration first.
        seed: keys every draw.
        sequence_length: tokens per slot.
        tombstones: (precedence, claims) of removed experiments: claims that come before request
            number `precedence` keep being respected, so that removing an experiment moves no other.
        boundaries: document starts of the base stream, for placement "boundary".
        fixed: exposures that have their places, which claim first; named last.

    Raises:
        UserError: every request for which there is no room.
    """
    taken = Claims.none()
    for _, there in fixed:
        taken = taken.add(there.claims.start, there.claims.stop)
    problems: list[Problem] = []
    parts: list[Exposures] = []
    text_base = 0
    for number, request in enumerate(requests):
        for claims in [claims for precedence, claims in tombstones if precedence == number]:
            taken = taken.add(claims.start, claims.stop)
        try:
            placed = place(request, seed, sequence_length, taken, boundaries)
        except UserError as error:
            problems += problems_in(error, f"experiments.{request.experiment}")
            continue
        taken = placed.claims
        parts.append(_rows_of(request, placed, number, text_base))
        text_base += len(request.texts.offsets) - 1
    raise_problems(problems)
    for number, (request, there) in enumerate(fixed, start=len(requests)):
        parts.append(_rows_of(request, there, number, text_base))
        text_base += len(request.texts.offsets) - 1
    every = [*requests, *(request for request, _ in fixed)]
    return _joined(every, parts, seed, sequence_length)


def _joined(
    requests: Sequence[Request], parts: list[Exposures], seed: int, sequence_length: int
) -> CompiledPlan:
    """Return one plan of the rows of all requests."""
    rows = _sorted_rows(parts, sequence_length)
    texts = join_texts([request.texts for request in requests])
    names = tuple(request.experiment for request in requests)
    noise = {one.experiment: one.noise_deviation for one in requests if one.noise_deviation}
    return CompiledPlan(sequence_length, seed, names, rows, texts, noise)


def _rows_of(request: Request, placed: Placed, number: int, text_base: int) -> Exposures:
    """Return the rows of experiment `number`; its texts are numbered from `text_base`."""
    flags = np.full(len(request), SHIFT_FLAG * (request.placement == "boundary"), np.uint8)
    if len(request.placebo):
        flags |= request.placebo.astype(np.uint8) * np.uint8(PLACEBO_FLAG)
    if request.noise_deviation:
        flags[flags & PLACEBO_FLAG == 0] |= NOISE_FLAG
    keys = request.unit_keys[request.unit]
    return Exposures(
        slot=placed.slot,
        offset=placed.offset.astype(np.int32),
        text=request.text.astype(np.int64) + text_base,
        id=exposure_ids(request.experiment, keys, request.repetition),
        experiment=np.full(len(request), number, dtype=np.uint16),
        unit=request.unit,
        repetition=request.repetition,
        flags=flags,
    )


def _sorted_rows(parts: list[Exposures], sequence_length: int) -> Exposures:
    """Return all rows in order of position."""
    if not parts:
        return Exposures(**{name: np.empty(0, dtype) for name, dtype in COLUMNS.items()})
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        if len(parts) > 1
        else getattr(parts[0], name)
        for name in COLUMNS
    }
    # One number per row: its position in the run.
    order = np.argsort(joined["slot"] * sequence_length + joined["offset"])
    rows = Exposures(**{name: column[order] for name, column in joined.items()})
    if repeats(rows.id):
        raise UserError("experiments: two exposures have the same (experiment, unit, repetition)")
    return rows
