"""Probes of a running model: which experiments are due, scored on all ranks, written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.assignment import Question
from motet.experiments.design.frozen import judged_steps, read_definition, read_questions
from motet.experiments.design.trial import series_of
from motet.experiments.library.kinds import Library
from motet.experiments.scoring.generation import generate
from motet.experiments.scoring.gradients import align_items
from motet.experiments.scoring.probes import EncodedItems, encode_items, score_items
from motet.experiments.scoring.store import write_probe
from motet.experiments.stream.noise import noise
from motet.experiments.types import ItemScores, ItemTable
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.probe_budget import ProbeBudget
from motet.launcher.runs.rundir import RunDir
from motet.launcher.study.before_training import tokenizer_of
from motet.launcher.study.probe_price import needed_steps, work_of
from motet.models.family.base import Member
from motet.parallel.engines.embedding_noise import NoisyEmbeddings
from motet.parallel.engines.protocol import Engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World, agree_any


def due_steps(
    frozen: Mapping[str, Sequence[int]],
    questions: Sequence[Question],
    frozen_total: int,
    steps_total: int,
) -> dict[str, set[int]]:
    """Return the steps at which each experiment is probed.

    The frozen steps stay; when the run was made longer, the experiment's own rule adds steps after
    the old end.
    """
    due = {}
    for question in questions:
        steps = set(frozen[question.name])
        if steps_total > frozen_total:
            longer = question.experiment.probe_steps(steps_total)
            steps |= {step for step in longer if step > frozen_total}
        due[question.name] = {step for step in steps if step <= steps_total}
    return due


def sum_over_ranks(
    values: npt.NDArray[np.float64], layout: Layout, world: World
) -> npt.NDArray[np.float64]:
    """Add what the data-parallel ranks found (a collective)."""
    if world.size == 1:
        return values
    counted = layout.is_dp_leader(world.rank)
    tensor = torch.from_numpy(values if counted else np.zeros_like(values))
    dist.all_reduce(tensor, group=world.control)
    return tensor.numpy()


def saturation(question: Question, means: Mapping[str, float]) -> str:
    """Say that held-out units leave a question's primary outcome no room to rise, or ""."""
    outcome = next((one for one in question.experiment.outcomes if one.primary), None)
    if outcome is None:
        return ""
    arms = [arm.name for arm in question.spec.arms if arm.is_control]
    levels = [means[key] for arm in arms if (key := f"{outcome.name}/{arm}") in means]
    if not levels or outcome.room(level := float(np.mean(levels))) is None:
        return ""
    most = f"{outcome.range[1]:.2f} is the most that is possible"
    return (
        f"experiments.{question.name}: {outcome.label} is at {level:.2f} in held-out units and "
        f"{most}, so an effect can hardly show; use items that are harder before any exposure"
    )


def _any_rank(mine: bool, world: World) -> bool:
    return mine if world.size == 1 else agree_any(mine, world)


class Interrupted(Exception):
    """A stop was asked for while probing: nothing was measured."""


class ProbeSet:
    """The probe items of every question, tokenized once."""

    def __init__(
        self,
        questions: Sequence[Question],
        due: Mapping[str, set[int]],
        tokenizer: Tokenizer,
        sequence_length: int,
        batch_tokens: int,
        seed: int = 0,
    ) -> None:
        self.seed = seed  # of the plan
        self.questions = {question.name: question for question in questions}
        self.due, self.batch_tokens = due, batch_tokens
        self.tokenizer: Tokenizer | None = tokenizer
        self.failed: dict[str, str] = {}
        """Experiments whose scores could not be measured, and why."""
        self.needed: dict[str, set[int]] = {}
        """Steps at which an experiment is measured whatever it costs."""
        self.items: dict[str, EncodedItems] = {
            question.name: encode_items(
                [item for unit in question.units for item in unit.items],
                tokenizer,
                sequence_length,
                f"experiments.{question.name}",
            )
            for question in questions
        }

    @classmethod
    def of_run(cls, run: RunDir, settings: RunSettings, also: Sequence[int] = ()) -> ProbeSet:
        """Return the probes of a run's frozen study; token-only corpora without experiments need no
        tokenizer.

        Args:
            also: steps at which everything is measured beside those of the definition.
        """
        questions = read_questions(run.plan, Library(run.plugins))
        if not questions:
            return cls.none()
        definition, _ = read_definition(run.plan)
        frozen = {
            entry["spec"]["name"]: [*entry["probe_steps"], *also]
            for entry in definition["experiments"]
        }
        due = due_steps(frozen, questions, definition["steps_total"], settings.steps)
        length, room = settings.data.sequence_length, settings.probes.batch_tokens
        seed = int(definition["seed"])
        made = cls(questions, due, tokenizer_of(settings), length, room, seed)
        judged, frozen_total = judged_steps(definition), int(definition["steps_total"])
        totals = (frozen_total, settings.steps)
        made.needed = {
            question.name: needed_steps(question, judged[question.name], totals, also)
            for question in questions
        }
        return made

    def budget(self, share: float | None) -> ProbeBudget | None:
        """Return what these probes may cost, nothing spent yet; None without a share."""
        if share is None:
            return None
        work = {name: work_of(items, self.batch_tokens) for name, items in self.items.items()}
        return ProbeBudget(share, self.needed, work)

    @classmethod
    def none(cls) -> ProbeSet:
        """Return a set without probes: a run without experiments needs no tokenizer."""
        empty = cls.__new__(cls)
        empty.questions, empty.due, empty.batch_tokens, empty.items = {}, {}, 0, {}
        empty.failed, empty.needed, empty.tokenizer, empty.seed = {}, {}, None, 0
        return empty

    def also(self, step: int) -> None:
        """Measure everything after a step that was not known before, whatever it costs."""
        for name in self.due:
            self.due[name].add(step)
            self.needed.setdefault(name, set()).add(step)

    def leave_out(self, step: int, names: Sequence[str]) -> None:
        """Measure some experiments not at a step, although they are due."""
        for name in names:
            self.due[name].discard(step)

    def names(self, step: int) -> list[str]:
        """Return the experiments that are due at a step, in a fixed order."""
        return sorted(name for name, steps in self.due.items() if step in steps)

    def score(
        self,
        step: int,
        engine: Engine,
        layout: Layout,
        world: World,
        stop: Callable[[], bool] | None = None,
        member: Member | None = None,
    ) -> dict[str, ItemScores]:
        """Score everything that is due, and let the model write where it is asked to (a
        collective): each data-parallel rank its share of the items.

        Args:
            stop: whether this rank was asked to stop; asked before each batch, and all ranks agree.
            member: of the family; None is the whole model.

        Raises:
            Interrupted: on all ranks, when one was asked to stop.
        """

        def give_way() -> None:
            if stop is not None and agree_any(stop(), world):
                raise Interrupted

        share = layout.dp_rank(world.rank), layout.dp_size
        total = partial(sum_over_ranks, layout=layout, world=world)
        whose: dict[str, Any] = {} if member is None else {"member": member}
        scores = {}
        for name in self.names(step):
            items = self.items[name]
            scored = partial(engine.score, **whose)
            found = score_items(items, scored, self.batch_tokens, *share, total, give_way)
            if len(items.prompts):
                assert self.tokenizer is not None
                written = generate(
                    items.prompts,
                    partial(engine.likeliest, **whose),
                    self.tokenizer,
                    self.batch_tokens,
                    *share,
                    total,
                    partial(_any_rank, world=world),
                    give_way,
                )
                found = replace(found, generated=written)
            if deviation := self.questions[name].experiment.noise_deviation:
                aligned = self._aligned(name, deviation, engine, (*share, total, give_way))
                found = replace(found, alignment=aligned)
            scores[name] = found
        engine.finish_scoring()
        return scores

    def _aligned(
        self, name: str, deviation: float, engine: Engine, how: tuple[Any, ...]
    ) -> npt.NDArray[np.float64]:
        """Compare the gradient of an experiment's texts with the noise of their units."""
        if not isinstance(engine, NoisyEmbeddings):
            raise UserError(f"experiments.{name}: this engine has no gradient of embeddings")
        units = ItemTable(self.questions[name].units).unit_I.tolist()
        noise_of = lambda u, length, width: noise(self.seed, name, u, length, width, deviation)  # noqa: E731
        items, gradient = self.items[name], engine.embedding_gradient
        return align_items(items, units, gradient, noise_of, self.batch_tokens, *how)

    def means(self, scores: Mapping[str, ItemScores]) -> dict[str, dict[str, float]]:
        """Return the mean of every outcome series per arm, for the metrics file and W&B.

        An experiment whose class fails on these scores has none, and `failed` says why: its raw
        scores are kept, and the run with its other experiments goes on.
        """
        shown: dict[str, dict[str, float]] = {}
        for name, found in scores.items():
            question = self.questions[name]
            shown[name] = {}
            try:
                series = series_of(question.experiment, question.units, found)
            except UserError as error:
                self.failed[name] = str(error)
                continue
            for number, arm in enumerate(question.spec.arms):
                members = question.arms == number
                for key, values in series.items():
                    chosen = values[members]
                    if np.isfinite(chosen).any():
                        shown[name][f"{key}/{arm.name}"] = float(np.nanmean(chosen))
        return shown

    def write(
        self,
        run: RunDir,
        step: int,
        segment: int,
        definition_sha256: str,
        scores: Mapping[str, ItemScores],
        members: Mapping[str, Mapping[str, ItemScores]] | None = None,
    ) -> str:
        """Write the scores of the whole model, and those of other members by name (rank 0); return
        the SHA-256 of the file.
        """
        return write_probe(run.probes, step, segment, definition_sha256, scores, members)
