"""Families whose members train one after the other: which step belongs to which stage.

Known before the run begins, but where the loss ends a stage: then once it did. Torch-free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.models.config import ModelConfig
from motet.models.counts import training_flops_per_token
from motet.models.family.base import Family
from motet.models.family.costs import term_flops
from motet.models.family.growing_stages import GrowingStage
from motet.models.family.loss_trend import LEAST_BLOCKS, LossTrend
from motet.models.family.stage_lengths import LEAST_STEPS, RunShape
from motet.models.family.virtual_depth import times, virtual_depth, virtual_depths
from motet.models.member import Term
from motet.models.width_multipliers import multiplied, multiplier_facts

WHERE = "family.options"


class StagedFamily(Family):
    """A family with stages, and what is known of where they begin.

    Attributes:
        stages: in order.
        run: None before `fit`.
        planned: where each begins at the latest.
        starts: where those begin of which that is known: all, but where the loss ends one.
        base: the model that width multipliers are counted from; None = there are none.
    """

    def __init__(self, whole: ModelConfig, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(whole, options, seed)
        self.stages: list[GrowingStage] = []
        self.run: RunShape | None = None
        self.planned: tuple[int, ...] = ()
        self.starts: tuple[int, ...] = ()
        self.base: ModelConfig | None = None

    def multiply(self) -> None:
        """Give the model of every stage the multipliers of its width, over that of the first."""
        self.base = base = replace(self.stages[0].config, output_multiplier=1.0)
        self.stages = [replace(one, config=multiplied(base, one.config)) for one in self.stages]
        self.whole = self.stages[-1].config

    def multipliers(self, name: str) -> dict[str, Any] | None:
        """Return the width multipliers of a stage's model (`multiplier_facts`); None: it has none.

        Args:
            name: the stage's label.
        """
        configs = {stage.label: stage.config for stage in self.stages}
        return None if self.base is None else multiplier_facts(self.base, configs[name])

    def lay(self, run: RunShape, frozen: Sequence[int] = ()) -> None:
        """Lay the stages over a run.

        Args:
            frozen: where each begins at the latest, of a run that has begun.

        Raises:
            UserError: a stage has no length, or the run ends before its last stage begins.
        """
        self.run = run
        self.planned = tuple(frozen) or self._laid(run)
        self.starts = self.planned[: self._next_open(0) + 1]

    def _next_open(self, number: int) -> int:
        """Return the first stage from one on that its loss ends; else the last."""
        last = len(self.stages) - 1
        return next((n for n in range(number, last) if self.loss_ends(n)), last)

    def loss_ends(self, number: int) -> bool:
        """Return whether a stage ends by its loss."""
        length = self.stages[number].length
        return length is not None and length.until is not None

    def settle(self, starts: Sequence[int]) -> None:
        """Take over where stages began, as a checkpoint of the run says (`starts`)."""
        self.starts = tuple(starts)

    def is_open(self, step: int) -> bool:
        """Return whether the loss may end the stage of a step, and has not yet."""
        return self.loss_ends(number := self.number_at(step)) and number == len(self.starts) - 1

    def end_stage(self, step: int) -> None:
        """Let the stage that trains end before `step`; those after it begin as long as they are."""
        assert self.run is not None
        starts = [*self.starts, step]
        for number in range(len(starts) - 1, self._next_open(len(starts) - 1)):
            length = self.stages[number].length
            assert length is not None
            starts.append(length.stop(starts[-1], self.stages[number].config, self.run))
        self.starts = tuple(starts)

    def trend(self, number: int) -> LossTrend:
        """Return what the loss of a stage is followed by: at its least length there are as many
        means of losses in the second half as a line needs.
        """
        return LossTrend(max(1, self.least_steps(number) // (2 * LEAST_BLOCKS)))

    def least_steps(self, number: int) -> int:
        """Return how many steps a stage has at the least, as it is planned."""
        stage, start = self.stages[number], self.starts_of(number)
        assert self.run is not None
        assert stage.length is not None
        return stage.length.least.stop(start, stage.config, self.run) - start

    def starts_of(self, number: int) -> int:
        """Return where a stage begins, or would at the latest."""
        return (*self.starts, *self.planned[len(self.starts) :])[number]

    def shortest(self) -> tuple[int, ...]:
        """Return where each stage begins when the loss ends all as early as it may."""
        assert self.run is not None
        return self._laid(self.run, shortest=True)

    def _laid(self, run: RunShape, shortest: bool = False) -> tuple[int, ...]:
        """Return the step at which each stage begins, from their lengths: at the latest, or as
        early as may be.
        """
        starts, start, problems = [0], 0, []
        for number, stage in enumerate(self.stages[:-1]):
            where = f"{WHERE}.stages[{number}]"
            if stage.length is None:
                why = f"stage {stage.label} has no length; give steps, tokens or flops"
                raise UserError(f"{where}: {why}")
            length = stage.length.least if shortest else stage.length
            start = length.stop(start, stage.config, run)
            starts.append(start)
            if start >= run.steps:
                why = (
                    f"stage {stage.label} ends at step {start:,}, but the run has {run.steps:,} "
                    "steps: nothing is left for the last stage; make it shorter, or the run longer"
                )
                problems.append(Problem(where, why))
                break
        raise_problems(problems)
        return tuple(starts)

    def teacher_of(self, number: int) -> int | None:
        """Return the stage whose last model a stage follows, frozen; None: it follows none.

        Raises:
            UserError: there is no such stage before it.
        """
        asked = self.stages[number].distill
        if asked is None:
            return None
        names = [stage.label for stage in self.stages[:number]]
        if asked.of is not None and asked.of not in names:
            raise UserError(
                f"{WHERE}.stages[{number}].distill.of: {asked.of!r} is no stage before it; there "
                f"are {', '.join(names)}"
            )
        return number - 1 if asked.of is None else names.index(asked.of)

    def teacher_flops(self, number: int) -> float:
        """Return the operations per token of a stage's teacher: a forward pass of it."""
        assert self.run is not None
        if (teacher := self.teacher_of(number)) is None:
            return 0.0
        return training_flops_per_token(self.stages[teacher].config, self.run.sequence_length) / 3

    def layer_times(self, step: int) -> tuple[int, ...]:
        """Return how often each layer of the model runs in a step; () where each runs once."""
        stage = self.stages[self.number_at(step)]
        if not stage.virtual:
            return ()
        layers, deepest = stage.config.n_layers, self.whole.n_layers
        depth = virtual_depth(self.seed, step, layers, deepest)
        return () if depth == layers else times(layers, depth)

    def virtual_flops(self, number: int, start: int, stop: int) -> float | None:
        """Return the operations per token of a stage whose layers run several times: the mean over
        its steps as they are drawn; None where each runs once.
        """
        assert self.run is not None
        stage = self.stages[number]
        if not stage.virtual:
            return None
        layers, deepest = stage.config.n_layers, self.whole.n_layers
        depths = virtual_depths(self.seed, start, stop, layers, deepest).tolist()
        each = {
            depth: term_flops(
                Term(None, times=times(layers, depth)), stage.config, self.run.sequence_length
            )
            for depth in set(depths)
        }
        run = self.run
        total = sum(each[d] * run.tokens(at, at + 1) for at, d in enumerate(depths, start=start))
        return total / run.tokens(start, stop)

    def number_at(self, step: int) -> int:
        """Return the number of the stage that a step belongs to."""
        return bisect_right(self.starts, step) - 1

    def stop_of(self, number: int) -> int:
        """Return the step that a stage ends before, at the latest while its loss may end it."""
        assert self.run is not None
        if number + 1 < len(self.starts):
            return self.starts[number + 1]
        if number == len(self.starts) - 1 and self.loss_ends(number):
            stage = self.stages[number]
            assert stage.length is not None
            return stage.length.stop(self.starts[number], stage.config, self.run)
        return [*self.planned[1:], self.run.steps][number]

    def ends(self) -> tuple[int, ...]:
        """Return the steps at which a model is kept and grows, as far as they are known."""
        return self.starts[1:]

    def length_faults(self, number: int) -> list[str]:
        """Return why a stage is too short, in words."""
        assert self.run is not None
        stage, steps = self.stages[number], self.least_steps(number)
        if self.loss_ends(number) and steps < LEAST_STEPS:
            return [
                f"until.least_tokens: they are {steps} steps of stage {stage.label}, and a slope "
                f"needs {LEAST_STEPS}; make them more, or the batch smaller"
            ]
        warmup = self.run.warmup_steps if stage.warmup_steps is None else stage.warmup_steps
        if warmup < steps:
            return []
        whose = "training.schedule.warmup_steps" if stage.warmup_steps is None else "its own"
        return [
            f"warmup_steps: stage {stage.label} has {steps:,} steps, no more than its warm-up of "
            f"{warmup:,} ({whose}); set warmup_steps of the stage to {max(0, steps // 10):,}"
        ]
