"""From an assigned experiment to the exposures it asks for: how many, of which text, in which
window of slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, UserError, raise_problems
from motet.experiments.corpora.tokenizer import Tokenizer, token_dtype
from motet.experiments.design.assignment import Question
from motet.experiments.design.experiment import Kinds
from motet.experiments.design.spec import ALPHA, ExperimentSpec, Schedule
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.placement import Request, Texts
from motet.experiments.stream.random import U64, name_key, philox, uniform_int
from motet.experiments.stream.stream import Stream

I64 = npt.NDArray[np.int64]
EARLY, LATE = 0, 1
_QUARTER = 4
_BASE_ORDINALS = 1 << 40
_BASE_CHUNK = 512
_MOST_DRAWS = 100


@dataclass(frozen=True)
class Setting:
    """The run that a study takes place in.

    Attributes:
        seed: of assignment, placement and analysis. steps, steps_total: batch sizes, run length.
        tokenizer: the run's.
        stream: the clean stream (no plan).
        draws: re-randomizations of the analysis.
        alpha: significance level of the run.
        facts: further JSON that identifies the data (corpora and weights).
        kinds: the classes that `use` may name.
        sizes: parameters by member, the whole model as "whole"; empty for a run of one model.
        avoid: token ranges that no placebo is cut from, by the number of their corpus.
        insertions: file of somebody else's insertions, which claim their places first.

    Raises:
        UserError: the tokenizer ends documents with another id than the stream.
    """

    seed: int
    steps: Steps
    steps_total: int
    tokenizer: Tokenizer
    stream: Stream
    draws: int
    facts: Mapping[str, Any]
    kinds: Kinds
    alpha: float = ALPHA
    sizes: Mapping[str, int] = field(default_factory=dict)
    avoid: Mapping[int, Claims] = field(default_factory=dict)
    insertions: Path | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.eod != self.stream.eod:
            raise UserError(
                f"the tokenizer ends documents with {self.tokenizer.eod}, the corpora with "
                f"{self.stream.eod}; exposures need one end of document: load it with "
                f"eod={self.stream.eod}"
            )

    @property
    def sequence_length(self) -> int:
        return self.stream.sequence_length


def slot_windows(
    schedule: Schedule, steps: Steps, sequence_length: int, repetition: I64, timing: I64 | None
) -> tuple[I64, I64]:
    """Return the slots [first, last) that each exposure is drawn from.

    Args:
        schedule: with times as whole steps (`Schedule.resolve`).
        steps: batch sizes.
        sequence_length: tokens per slot.
        repetition: int64 [rows].
        timing: int64 [rows] for "early_late".
    """
    if schedule.kind == "tokens":
        assert schedule.token_range is not None
        first, last = (
            -(-schedule.token_range[0] // sequence_length),
            schedule.token_range[1] // sequence_length,
        )
        return np.full(len(repetition), first), np.full(len(repetition), max(last, first + 1))
    if schedule.kind in ("steps", "every"):
        if schedule.kind == "steps":
            at = np.array(schedule.at, dtype=np.int64)[repetition % len(schedule.at)]
        else:
            at = int(schedule.start) + repetition * int(schedule.every)
        before, after = _slots_of(steps, at), _slots_of(steps, at + 1)
        return before, after
    low, high = int(schedule.window[0]), int(schedule.window[1])
    quarter = max(1, (high - low) // _QUARTER)
    late = np.full(len(repetition), schedule.kind == "late")
    early = np.full(len(repetition), schedule.kind == "early")
    if schedule.kind == "early_late":
        assert timing is not None
        late, early = timing == LATE, timing == EARLY
    first_step = np.where(late, high - quarter, low)
    last_step = np.where(early, low + quarter, high)
    return _slots_of(steps, first_step), _slots_of(steps, last_step)


def _slots_of(steps: Steps, at: I64) -> I64:
    """Return slots_before for every entry."""
    unique, inverse = np.unique(at, return_inverse=True)
    return np.array([steps.slots_before(int(step)) for step in unique], dtype=np.int64)[inverse]


def window_tokens(schedule: Schedule, steps: Steps, sequence_length: int) -> int:
    """Return how many tokens of the stream an experiment's window spans."""
    first, last = slot_windows(
        schedule, steps, sequence_length, np.array([0, 0]), np.array([EARLY, LATE])
    )
    return int(last.max() - first.min()) * sequence_length


def repetitions(question: Question, lengths: I64, tokens_in_window: int, seed: int) -> I64:
    """Return exposures per unit, int64 [U]; held-out units get the count of their placebo.

    Doses in exposures are per unit. Doses in documents, tokens or share are totals of the arm: they
    become a whole number of exposures (rounded), spread over its units as evenly as whole exposures
    allow; which units get one more is keyed.

    Args:
        lengths: int64 [U], tokens of a unit's exposure.
        tokens_in_window: what "share" refers to.
        seed: the plan's seed.
    """
    spec = question.spec
    keys = question.unit_keys()
    order, _ = philox(name_key(seed, "spread", spec.name), keys, keys)
    counts = np.zeros(len(question.units), dtype=np.int64)
    for number, arm in enumerate(spec.arms):
        members = np.flatnonzero(question.arms == number)
        if arm.is_control or len(members) == 0:
            continue
        counts[members] = _spread(spec, arm.dose, members, order, lengths, tokens_in_window)
    if spec.placebo == "matched":
        counts = counts[_mirrored(question, seed)]
    return counts


def _spread(
    spec: ExperimentSpec,
    dose: float,
    members: I64,
    order: U64,
    lengths: I64,
    tokens_in_window: int,
) -> I64:
    """Return exposures per member of one arm."""
    if spec.dose_in == "exposures":
        return np.full(len(members), int(dose), dtype=np.int64)
    total = int(dose)
    if spec.dose_in in ("tokens", "share"):
        tokens = dose if spec.dose_in == "tokens" else dose * tokens_in_window
        total = round(tokens / float(lengths[members].mean()))
    if total == 0:
        message = (
            f"has {dose:g} (dose_in: {spec.dose_in}), less than one exposure of "
            f"{lengths[members].mean():.0f} tokens; raise it, or widen the window"
        )
        raise_problems([Problem(f"experiments.{spec.name}.doses", message)])
    base, extra = divmod(total, len(members))
    counts = np.full(len(members), base, dtype=np.int64)
    counts[np.argsort(order[members])[:extra]] += 1
    return counts


def _mirrored(question: Question, seed: int) -> I64:
    """Whose exposures each unit's are like, int64 [U]: a treated unit's its own, a held-out unit's
    those of a treated one, so that placebos mirror the treated arms.
    """
    keys = question.unit_keys()
    order, _ = philox(name_key(seed, "spread", question.name), keys, keys)
    treated, found = question.treated(), np.arange(len(question.units))
    held_out, shown = np.flatnonzero(~treated), np.flatnonzero(treated)
    if len(shown):
        held_out, shown = held_out[np.argsort(order[held_out])], shown[np.argsort(order[shown])]
        found[held_out] = shown[np.arange(len(held_out)) % len(shown)]
    return found


def _in_arms(
    question: Question, schedule: Schedule, setting: Setting, unit: I64
) -> tuple[I64, I64]:
    """Return the slots [first, last) of each exposure where arms have windows of their own."""
    low, high = int(schedule.window[0]), int(schedule.window[1])
    parts = np.array([arm.window or (0.0, 1.0) for arm in question.spec.arms])
    part = parts[question.arms[_mirrored(question, setting.seed)[unit]]]
    edges = (low + np.rint(part * (high - low))).astype(np.int64)
    return _slots_of(setting.steps, edges[:, 0]), _slots_of(setting.steps, edges[:, 1])


def build_request(question: Question, schedule: Schedule, setting: Setting) -> Request:
    """Return every exposure that an experiment asks for.

    Args:
        question: the assigned experiment.
        schedule: with times as whole steps.
        setting: the run.
    """
    texts = _UnitTexts(question, setting.tokenizer)
    window = window_tokens(schedule, setting.steps, setting.sequence_length)
    counts = repetitions(question, texts.lengths[texts.first], window, setting.seed)
    # One row per exposure: unit 0's repetitions 0, 1, ..., then unit 1's, and so on.
    unit = np.repeat(np.arange(len(counts)), counts)
    repetition = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
    source = texts.shown(unit, repetition, setting.seed)
    placebo = ~question.treated()[unit]
    if not question.experiment.inserts_units:
        placebo = np.ones(len(unit), dtype=bool)
    used, text = _numbered(source, placebo)
    keys = question.unit_keys()
    fillers = placebo_texts(
        name_key(setting.seed, "placebo", question.name),
        keys[unit[placebo]],
        repetition[placebo],
        texts.lengths[source[placebo]],
        setting,
    )
    timing = None if question.timing is None else question.timing[unit]
    length = setting.sequence_length
    first, last = slot_windows(schedule, setting.steps, length, repetition, timing)
    if any(arm.window for arm in question.spec.arms):
        first, last = _in_arms(question, schedule, setting, unit)
    return Request(
        experiment=question.name,
        unit_keys=keys,
        unit=unit.astype(np.int32),
        repetition=repetition.astype(np.int32),
        text=text.astype(np.int32),
        first_slot=first,
        last_slot=last,
        texts=Texts.of(
            [texts.tokens[index] for index in used] + fillers,
            texts.dtype,
            [*(texts.masked[index] for index in used), *(0 for _ in fillers)],
        ),
        placement=question.spec.placement,
        placebo=placebo,
        noise_deviation=question.experiment.noise_deviation,
    )


def _numbered(source: I64, placebo: npt.NDArray[np.bool_]) -> tuple[I64, I64]:
    """Return the unit texts that are shown, and the number of each row's text, int64 [rows].

    Each text is kept once, however often it is shown; every placebo has a text of its own, after
    those of units.
    """
    used, row = np.unique(source[~placebo], return_inverse=True)
    text = np.empty(len(source), dtype=np.int64)
    text[~placebo] = row
    text[placebo] = len(used) + np.arange(int(placebo.sum()))
    return used, text


class _UnitTexts:
    """The texts of all units as tokens, end to end, each wrapped in end-of-document tokens.

    tokens: one array per text. lengths: int64 [texts]. masked: tokens after the first that carry no
    loss, per text. first: int64 [U], number of a unit's first text.
    """

    def __init__(self, question: Question, tokenizer: Tokenizer) -> None:
        units = question.units
        self.dtype = token_dtype(tokenizer.vocabulary_size)
        end = np.array([tokenizer.eod], dtype=self.dtype)
        self._question = question
        numbered = [(unit, i) for unit in units for i in range(len(unit.texts))]
        encoded = tokenizer.encode_batch([unit.texts[i] for unit, i in numbered])
        self.tokens = [np.concatenate([end, ids, end]) for ids in encoded]
        self.masked = [0] * len(numbered)
        characters = [question.experiment.masked_characters(*one) for one in numbered]
        if any(characters):  # a token that goes on into the text is one of the text
            placed = tokenizer.encode_with_ends([unit.texts[i] for unit, i in numbered])
            self.masked = [
                int(np.searchsorted(ends, count, side="right"))
                for count, (_, ends) in zip(characters, placed, strict=True)
            ]
        self.lengths = np.array([len(ids) for ids in self.tokens], dtype=np.int64)
        self._count = np.array([len(unit.texts) for unit in units], dtype=np.int64)
        self.first = np.cumsum(self._count) - self._count
        cycles = np.array([arm.variants == "cycle" for arm in question.spec.arms])
        self._cycles = cycles[question.arms]

    def shown(self, unit: I64, repetition: I64, seed: int) -> I64:
        """Return the number of the text that each exposure shows."""
        one = self._question
        keys, arms = one.unit_keys()[unit], one.arms[unit]
        chosen = one.experiment.text_numbers(arms, keys, repetition, seed)
        if chosen is not None:
            if np.shape(chosen) != unit.shape or np.any(
                (chosen < 0) | (chosen >= self._count[unit])
            ):
                message = "gives text_numbers that are no numbers of its units' texts, one per row"
                raise_problems([Problem(f"experiments.{one.name}.use", message)])
            return self.first[unit] + chosen
        variant = np.where(self._cycles[unit], repetition % self._count[unit], 0)
        return self.first[unit] + variant


def placebo_texts(
    key: int,
    unit_keys: U64,
    repetition: I64,
    lengths: I64,
    setting: Setting,
) -> list[npt.NDArray[np.int32]]:
    """Return i.i.d. base text of the given lengths, end-of-document tokens at both ends included.

    Each is cut from an independently drawn sequence of an independently drawn pass over the
    corpora; one that meets a range to avoid is drawn again.

    Raises:
        UserError: a text finds no place outside the ranges to avoid.
    """
    slots, offsets = np.empty((2, len(unit_keys)), dtype=np.int64)
    pending = np.arange(len(unit_keys))
    for attempt in range(_MOST_DRAWS):
        counter = repetition[pending].astype(np.uint64) + (np.uint64(attempt) << np.uint64(32))
        bits0, bits1 = philox(key, unit_keys[pending], counter)
        room = np.maximum(setting.sequence_length - lengths[pending], 0) + 1
        slots[pending] = uniform_int(bits0, 0, _BASE_ORDINALS)
        offsets[pending] = uniform_int(bits1, 0, room)
        pending = pending[_met(setting, slots[pending], offsets[pending], lengths[pending])]
        if not len(pending):
            break
    if len(pending):
        message = f"replaces so much base text that {len(pending):,} replacements find no other"
        raise_problems([Problem("experiments.decontaminate", f"{message}; use policy: exclude")])
    found: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(slots), _BASE_CHUNK):
        part = slice(start, start + _BASE_CHUNK)
        tokens_BT = setting.stream.base_tokens(slots[part])
        for tokens, offset, length in zip(tokens_BT, offsets[part], lengths[part], strict=True):
            text = tokens[offset : offset + length].copy()
            text[[0, -1]] = setting.tokenizer.eod
            found.append(text)
    return found


def _met(setting: Setting, slots: I64, offsets: I64, lengths: I64) -> npt.NDArray[np.bool_]:
    """Which cuttings meet a range to avoid, bool [rows]."""
    met = np.zeros(len(slots), dtype=bool)
    if not setting.avoid:
        return met
    corpus, _, sequence = setting.stream.locate(slots)
    start = sequence * setting.sequence_length + offsets
    for number, claims in setting.avoid.items():
        mine = corpus == number
        met[mine] = claims.overlap(start[mine], (start + lengths)[mine])
    return met


def request_problems(request: Request, setting: Setting) -> list[Problem]:
    """Return what makes a request impossible in this run: too long a text, or a window outside the
    run.
    """
    steps, sequence_length = setting.steps, setting.sequence_length
    where = f"experiments.{request.experiment}"
    problems = []
    longest = int(request.texts.lengths().max(initial=0))
    if longest > sequence_length:
        problems.append(
            Problem(
                where,
                f"a text has {longest:,} tokens with its two end-of-document tokens, more than "
                f"data.sequence_length={sequence_length:,}; shorten it or lengthen the sequence",
            )
        )
    end = steps.slots_before(setting.steps_total)
    if len(request) and int(request.last_slot.max()) > end:
        last = int(steps.step_of(np.array([int(request.last_slot.max()) - 1]))[0])
        problems.append(
            Problem(
                f"{where}.schedule",
                f"places exposures up to step {last:,}, but the run ends after step "
                f"{setting.steps_total - 1:,}; shorten the schedule or lengthen the run",
            )
        )
    if np.any(request.first_slot >= request.last_slot):
        problems.append(Problem(f"{where}.schedule", "leaves an empty window; widen it"))
    return problems
