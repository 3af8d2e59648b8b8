"""Progressive families: a small model trains, is kept, grows into the next, and trains on.

One stream of data runs through all stages, so that nothing is read twice and nothing left out. What
grows is made by an operator of `models/growth`; which step belongs to which stage is known before
the run begins, or, where the loss ends a stage, once it did. Torch-free, but for an operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.schema import MappingReader
from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding
from motet.models.family.base import Member, Term, TrainingStage, WhoTrains
from motet.models.family.growing_stages import KEYS, GrowingStage, read_stage
from motet.models.family.growth_presets import PRESETS, PresetRun, preset_options
from motet.models.family.nested_stages import NestingFamily
from motet.models.family.stage_lengths import RunShape
from motet.models.family.stage_rules import (
    LEARNED,
    alone,
    multiplier_faults,
    multiplies,
    virtual_faults,
)
from motet.models.family.staged import WHERE
from motet.models.width_multipliers import initial_scales

if TYPE_CHECKING:
    from torch import Tensor

    from motet.models.growth.growth import Growth
    from motet.models.growth.operator import GrowthOperator

OPTIONS = (
    *("stages", "preset", "factor", "tokens", "alpha", "larger"),
    *("divergence", "width_multipliers"),
)
REWARM_PEAK = 1.3
BLEND_JUMP_NATS = 8.0
"""Of a model that is the sum of two: nothing is known but that chance is no better."""


class ProgressiveFamily(NestingFamily):
    """Members that train one after the other, each grown from the one before.

    Options:
        stages: in order; see `growing_stages`. The last is the run's model.
        preset: a published schedule that fills in what is left out (`growth_presets`).
        factor, tokens, alpha, larger: of presets that make their stages themselves.
        divergence: held-out sequences on which the model of a stage is compared with the one
            before, as the stage ends; None = it is not.
        width_multipliers: "mup": learning rates of matrices and logits follow the width
            (`models.width_multipliers`), from the first stage's; None = they do not.
    """

    draws: int | None = 1

    def __init__(self, whole: ModelConfig, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(whole, options, seed)
        problems: list[Problem] = []
        read = MappingReader(options, WHERE, problems, OPTIONS)
        self.preset = read.values.get("preset")
        self.divergence = read.whole("divergence", None, 1)
        ruled = multiplies(read)
        filled = preset_options(read, whole)
        raise_problems(problems)
        self.stages = self._read(filled, problems)
        raise_problems(problems)
        if ruled:
            self.multiply()
            if any(stage.nested is not None for stage in self.stages):
                (why,) = multiplier_faults([stage.config for stage in self.stages], self)
                raise UserError(f"{WHERE}.{why}")
        self._frozen: dict[int, frozenset[str]] = {0: frozenset()}
        self._made: tuple[int, Growth] | None = None
        self.nest()

    def _read(self, asked: Sequence[Any], problems: list[Problem]) -> list[GrowingStage]:
        """Return the stages, read from the last: a size may depend on what it grows into."""
        if len(asked) < 2:
            problems.append(
                Problem(f"{WHERE}.stages", f"are {len(asked)}; a model that grows has 2 or more")
            )
            return []
        found: list[GrowingStage] = []
        for number in range(len(asked) - 1, -1, -1):
            one = MappingReader(asked[number], f"{WHERE}.stages[{number}]", problems, KEYS)
            found.insert(0, read_stage(one, self.whole, found[0] if found else None, number == 0))
        names = [stage.label for stage in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [Problem(f"{WHERE}.stages", f"{name!r} is the name of two") for name in twice]
        return found

    def fit(self, run: RunShape, frozen: Sequence[Mapping[str, Any]] = ()) -> None:
        """Learn how long the run is, and with it where every stage begins.

        Args:
            frozen: `stage_facts` of a run that has begun, which keeps its stages.

        Raises:
            UserError: a stage has no length, or the run ends before its last stage begins.
        """
        if self.preset is not None and not frozen:
            self.stages = PRESETS[self.preset].fitted(PresetRun(self.stages, run, self.options))
        self.lay(run, [int(entry["start_step"]) for entry in frozen])

    def stage_facts(self) -> list[dict[str, Any]]:
        """Return what a run's manifest says of its stages: where they begin, and how each model is
        made of the one before.
        """
        assert self.run is not None
        found = []
        for number, start in enumerate(self.planned):
            stage = self.stages[number]
            facts = {"name": stage.label, "start_step": start, "operator": self.told(number)}
            if stage.length is not None and stage.length.until is not None:
                facts["until"] = {**stage.length.until._asdict(), "most_tokens": stage.length.value}
            if teaching := self.teacher_flops(number):
                facts["teacher_flops_per_token"] = teaching
            if learned := self.learning_sequences(number):
                facts["learning_tokens"] = learned * self.run.sequence_length
            stop = [*self.planned[1:], self.run.steps][number]
            if (each := self.virtual_flops(number, start, stop)) is not None:
                facts["virtual_flops_per_token"] = each
            if (multipliers := self.multipliers(stage.label)) is not None:
                facts["width_multipliers"] = multipliers
            found.append(facts | self.slice_facts(number))
        return found

    def told(self, number: int) -> str:
        """Return how the model of a stage is made, in words."""
        stage, other = self.stages[number], self.blended_with(number)
        told, teacher = stage.operator, self.teacher_of(number)
        if other is not None:
            told += f" ({stage.blend:g}, the rest {self.stages[other].label})"
        return told if teacher is None else f"{told}, then taught by {self.stages[teacher].label}"

    def blended_with(self, number: int) -> int | None:
        """Return the stage whose model a stage's is blended with: the latest before it of the very
        same sizes; None where it is not blended, or there is none.
        """
        stage = self.stages[number]
        alike = [n for n in range(number) if self.stages[n].config == stage.config]
        return alike[-1] if alike and stage.blend is not None else None

    def learning_sequences(self, number: int) -> int:
        """Return how many sequences the maps of a stage's operator are learned on; 0 for all but
        learned operators.
        """
        if self.stages[number].operator not in LEARNED:
            return 0
        made: Any = self.operator(number)
        return int(made.steps * made.sequences)

    def choose(self, step: int, draws: int) -> Sequence[Sequence[WhoTrains]]:
        """See `Family.choose`."""
        if self.trains_slices(step):
            return self.chosen_slices(step, draws)
        name = self.stages[self.number_at(step)].name
        if repeats := self.layer_times(step):
            return [(Term(name, times=repeats),)] * draws  # type: ignore[arg-type]
        return [(name,)] * draws

    def stage(self, step: int) -> TrainingStage | None:
        """See `Family.stage`: a schedule of its own for every stage."""
        assert self.run is not None
        number = self.number_at(step)
        one, start = self.stages[number], self.starts[number]
        of_run = self.run.peak_lr(parameters_non_embedding(self.whole))
        scale = self.peak_lr(number) / of_run
        steps, held = self.stop_of(number) - start, self.loss_ends(number)
        return TrainingStage(start, steps, scale, one.warmup_steps, held)

    def peak_lr(self, number: int) -> float:
        """Return the peak learning rate of a stage: its own, or the run's for a model of its
        size; that of the base where multipliers follow the width.
        """
        assert self.run is not None
        one = self.stages[number]
        return one.lr or self.run.peak_lr(parameters_non_embedding(self.base or one.config))

    def operator(self, number: int) -> GrowthOperator:
        """Return the operator that makes the model of a stage.

        Raises:
            ModelError: there is none of that name, or it has no such option.
        """
        from motet.models.growth.registry import operator  # brings torch

        stage = self.stages[number]
        options = {"seed": self.seed, **stage.options}
        if stage.operator == "prune" and number:
            options = {"scores": _even_scores(self.stages[number - 1].config), **options}
        return operator(stage.operator, **options)

    def growth(self, number: int, operator: GrowthOperator | None = None) -> Growth:
        """Return how the model of a stage is made of the one before.

        Args:
            operator: the stage's own, with what a run has measured for it; None = as it is written.

        Raises:
            ModelError: it cannot be.
        """
        from motet.models.growth.multiplied import Multiplied  # brings torch

        before, after = (self.stages[n].config for n in (number - 1, number))
        alike = replace(after, output_multiplier=before.output_multiplier)
        made = (operator or self.operator(number)).growth(before, alike)
        if self.base is None:
            return made
        return Multiplied(made, after, initial_scales(self.base, after))

    def taught_by(self, member: Member | None) -> ModelConfig | None:
        """Return the sizes of the frozen model that a model follows; None: it follows none."""
        teacher = self.teacher_of(self.number_of(member))
        return None if teacher is None else self.stages[teacher].config

    def term(self, step: int) -> Term | None:
        """Return what the loss of a step is, of the model that trains; None: the labels alone."""
        if repeats := self.layer_times(step):
            return Term(None, times=repeats)
        asked = self.stages[self.number_at(step)].distill
        return None if asked is None else Term(None, asked.labels, kept=asked.divergence)

    def loss_jump_nats(self, number: int) -> float:
        """Return the most that the loss may rise by when a stage begins."""
        from motet.models.growth.registry import stated_jump

        stage = self.stages[number]
        if stage.loss_jump_nats is not None:
            return stage.loss_jump_nats
        return BLEND_JUMP_NATS if stage.blend is not None else stated_jump(stage.operator)

    def frozen(self, step: int) -> frozenset[str]:
        """Return the names of weights that do not train in a step."""
        number = self.number_at(step)
        until = self.stages[number].frozen_steps
        if until is not None and step - self.starts[number] >= until:
            return frozenset()
        if number not in self._frozen:
            self._frozen[number] = self.growth(number).frozen
        return self._frozen[number]

    def rewarm_share(self, step: int) -> float:
        """Return how many times the learning rate of the rest new values have in a step.

        It rises to 1.3 within `rewarm_steps` (SPARKLING, arXiv:2602.02472: 250 steps); then all
        values have the stage's.
        """
        number = self.number_at(step)
        within, done = self.stages[number].rewarm_steps, step - self.starts[number]
        if within is None or done >= within:
            return 1.0
        return REWARM_PEAK * (done + 1) / within

    def new_elements(self, step: int, weight_name: str) -> Tensor | None:
        """Return which values of a weight are new in the stage of a step; None: none of them."""
        number = self.number_at(step)
        if self._made is None or self._made[0] != number:
            self._made = (number, self.growth(number))
        return self._made[1].new_elements(weight_name)

    def problems(self, steps: int) -> list[str]:
        """See `Family.problems`."""
        found = []
        for number, stage in enumerate(self.stages):
            where = f"stages[{number}]"
            self.teacher_of(number)
            found += [f"{where}.{why}" for why in self.length_faults(number)]
            if stage.blend is not None and self.blended_with(number) is None:
                found.append(
                    f"{where}.blend: no stage before {stage.label} has a model of its sizes to "
                    "blend with; let one have them, or leave blend out"
                )
            found += virtual_faults(stage.virtual, stage.config, where)
            found += alone(stage.operator, where) or self._operator_faults(number)
        if self.base is not None:
            found += multiplier_faults([stage.config for stage in self.stages], None)
        return found + self.slice_problems()

    def _operator_faults(self, number: int) -> list[str]:
        if number == 0:
            return []
        try:
            growth = self.growth(number)
        except UserError as error:
            return [f"stages[{number}].operator: {error}"]
        if self.stages[number].frozen_steps is not None and not growth.frozen:
            name = self.stages[number].operator
            return [f"stages[{number}].frozen_steps: {name} freezes nothing; leave it out"]
        if self.stages[number].rewarm_steps is None:
            return []
        return self._rewarm_faults(number, growth)

    def _rewarm_faults(self, number: int, growth: Growth) -> list[str]:
        stage, where = self.stages[number], f"stages[{number}].rewarm_steps"
        assert stage.rewarm_steps is not None
        names = (name for name in growth.names() if not name.startswith(("frequencies", "bias")))
        if stage.blend is not None:
            return [f"{where}: all of a blended model is new; set warmup_steps"]
        if all(growth.new_elements(name) is None for name in names):
            why = f"{stage.operator} makes no new values, but copies of whole weights"
            return [f"{where}: {why}; set warmup_steps"]
        steps = self.least_steps(number)
        if stage.rewarm_steps > steps:
            return [f"{where}: {stage.rewarm_steps:,} are more than the {steps:,} of the stage"]
        return []


def _even_scores(config: ModelConfig) -> dict[str, list[float]]:
    """Return scores that stand for those that a run will measure, of the axes that it measures."""
    from motet.models.family.importance import axis_sizes  # brings torch

    return {axis: [0.0] * size for axis, size in axis_sizes(config).items()}
