"""What Motet itself does at the moments of the loop: probes, ledger, heartbeat, rows of metrics.

Ours read the job itself, which may change under them: a rollback opens another ledger.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from motet.core import format
from motet.core.files import again_with_room
from motet.experiments.types import ItemScores
from motet.launcher.rank.diverging import divergence_due, measure
from motet.launcher.rank.hooks import Hook, HookContext
from motet.launcher.rank.job import TrainingJob
from motet.launcher.rank.probing import saturation
from motet.models import counts
from motet.models.config import ModelConfig
from motet.models.family.base import WHOLE, Member
from motet.parallel.engines.protocol import StepResult


@dataclass
class OwnHook(Hook):
    """A hook that reads the job."""

    job: TrainingJob


@dataclass
class Probes(OwnHook):
    """Measures every experiment that is due; training does not notice."""

    told: set[str] = field(default_factory=set)

    def at_probe(self, context: HookContext) -> None:
        """Score on all ranks; rank 0 writes.

        Raises:
            Interrupted: on all ranks: nothing is written, and whoever resumes measures again.
        """
        job, step = self.job, context.step
        with job.progress.phase("probing"):
            started = time.perf_counter()
            found = {member: self._score(step, job.inside(member)) for member in job.scored}
            scores = found.pop(None, {})
            context.facts["experiments"] = job.probes.means(scores)
            members = {member_name(member): theirs for member, theirs in found.items()}
            if members:
                means = {name: job.probes.means(found) for name, found in members.items()}
                context.facts["members"] = means
            if job.world.rank == 0:
                segment = job.segment
                facts = (segment.segment, segment.definition_sha256)
                write = partial(job.probes.write, job.run, step, *facts, scores, members)
                sha256 = again_with_room(write, job.checkpoints.gives_room)
                row = {"segment": segment.segment, "sha256": sha256}
                job.measured.append({"step": step, **row})
                seconds = time.perf_counter() - started
                job.metrics.log("probe", step, **context.facts, seconds=seconds, **row)
                self._tell_failures(step)
                self._tell_saturation(
                    step, job.probes.means(scores or next(iter(members.values())))
                )
            job.seconds["probe"] = time.perf_counter() - started

    def _tell_failures(self, step: int) -> None:
        """Say once what could not be measured: the report will stop at it."""
        failed = self.job.probes.failed
        for name in sorted(failed.keys() - self.told):
            self.told.add(name)
            self.job.metrics.log("event", step, event="unmeasured", why=failed[name])
            print(f"motet: {failed[name]}; its scores are kept, training goes on", file=sys.stderr)

    def _tell_saturation(self, step: int, means: Mapping[str, Mapping[str, float]]) -> None:
        """Say once whose primary outcome begins so near the end of its possible range that an
        effect can hardly show.
        """
        if step > 0:
            return
        for name, shown in means.items():
            if why := saturation(self.job.probes.questions[name], shown):
                self.job.metrics.log("event", step, event="saturated", why=why)
                print(f"motet: {why}", file=sys.stderr)

    def _score(self, step: int, member: Member | None) -> dict[str, ItemScores]:
        job = self.job
        stop = job.stop.requested
        return job.probes.score(step, job.engine, job.layout, job.world, stop, member)


class Ledger(OwnHook):
    """Writes down what the step consumed."""

    def after_step(self, context: HookContext) -> None:
        done = self.job.done
        self.job.note(done.share.records, done.result.applied)


class LifeSign(OwnHook):
    """Shows that this rank lives."""

    def after_step(self, context: HookContext) -> None:
        self.job.heartbeat.touch()
        self.job.starting.over()


class Rows(OwnHook):
    """Logs steps and checkpoints, and shows progress."""

    def after_step(self, context: HookContext) -> None:
        job, result, lr = self.job, self.job.done.result, self.job.done.lr
        step, length = context.step - 1, job.settings.data.sequence_length
        seconds, job.seconds = job.seconds, {}
        rate = job.steps.sequences(step) * length / (seconds["data"] + seconds["train"])
        flops = rate * job.flops_of(job.done.share.draws) / job.world.size
        job.metrics.log(
            "step",
            context.step,
            loss=result.loss,
            z_loss=result.z_loss,
            balance_loss=result.balance_loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=job.steps.slots_before(context.step) * length,
            tokens_per_s=rate,
            mfu=flops / job.peak_flops if job.peak_flops else None,
            seconds=seconds,
            memory_mib=job.memory_mib(),
            skipped=not result.applied,
            why=job.guard.why,
            **members_of_row(result),
            **({"draw": job.done.draw} if job.members else {}),
        )
        job.progress.update(context.step, result.loss, rate)

    def at_checkpoint(self, context: HookContext) -> None:
        self.job.metrics.log("checkpoint", context.step, seconds=self.job.seconds["checkpoint"])


class Evaluations(OwnHook):
    """Measures the loss of a family's members on held-out text: one in turn, all at the end."""

    def after_step(self, context: HookContext) -> None:
        job, step = self.job, context.step
        due = self._due(step)
        if job.evaluation is None or not due:
            return
        whole = ModelConfig(**job.facts["model"])
        with job.progress.phase("evaluating"):
            started = time.perf_counter()
            losses = {
                member_name(member): job.evaluation.loss(
                    job.engine, job.layout, job.world, job.inside(member)
                )
                for member in due
            }
            more: dict[str, Any] = {}
            if len(due) > 1 or self._is_last(step):
                more["latency_ms"] = {
                    member_name(member): 1000
                    * job.evaluation.latency_s(job.engine, job.inside(member))
                    for member in due
                }
                more["sizes"] = {
                    member_name(member): counts.parameters(member.config if member else whole)
                    for member in due
                }
                more["latency_of"] = {
                    "tokens": job.settings.data.sequence_length,
                    "processes": job.world.size,
                    "device": job.world.device.type,
                }
            job.engine.finish_scoring()
            facts = {"unseen": job.evaluation.held_out.unseen, "sequences": job.evaluation.count}
            seconds = time.perf_counter() - started
            job.metrics.log("evaluation", step, losses=losses, **facts, **more, seconds=seconds)

    def _due(self, step: int) -> list[Member | None]:
        """Return who is evaluated after a step; where members grow it is one that trains, and at
        the end of a stage all of its.
        """
        job = self.job
        if job.evaluation is None:
            return []
        if job.growing is None:
            return job.evaluation.due(step, job.settings.steps)
        if self._is_last(step):
            return list(job.scored)
        return job.evaluation.turn(step, job.settings.steps, job.scored)

    def _is_last(self, step: int) -> bool:
        """Return whether a member that grows, or the whole that was grown, is as it will be."""
        growing = self.job.growing
        return growing is not None and step in (*growing.ends(), self.job.settings.steps)


class Divergences(OwnHook):
    """Measures how far neighbours of a family that grows lie apart, at the end of each stage."""

    def after_step(self, context: HookContext) -> None:
        if divergence_due(self.job, context.step):
            with self.job.progress.phase("comparing neighbours"):
                measure(self.job, context.step)


class Validations(OwnHook):
    """Measures the loss on text that is not trained on; at the end of a run, and of a stage of one
    that grows, that of every member too.
    """

    def after_step(self, context: HookContext) -> None:
        job, step, total = self.job, context.step, self.job.settings.steps
        growing = job.growing
        ends = growing is not None and step in growing.ends()
        if job.validation is None or not (ends or job.validation.due(step, total)):
            return
        with job.progress.phase("validating"):
            started = time.perf_counter()
            place = job.engine, job.layout, job.world
            losses = job.validation.losses(*place)
            own = {} if job.held is None else {job.held.name: losses}
            if ends or step == total:
                own |= {one.name: job.validation.losses(*place, one) for one in job.slices}
            more: dict[str, Any] = {"members": own} if own else {}
            job.engine.finish_scoring()
            labels = {name: text.n_labels for name, text in job.validation.texts.items()}
            seconds = time.perf_counter() - started
            job.metrics.log(
                "validation", step, losses=losses, labels=labels, **more, seconds=seconds
            )
        shown = ", ".join(f"{name} {format.loss(loss)}" for name, loss in losses.items())
        job.progress.print(f"step {step:,}/{total:,}  validation loss {shown}")


def member_name(member: Member | None) -> str:
    """The name of a member in rows; the whole model's is `WHOLE`."""
    return WHOLE if member is None else member.name


def members_of_row(result: StepResult) -> dict[str, Any]:
    """Return what a step's row says of members: the one that trained, or the loss of each; nothing
    where the whole model trained alone.
    """
    if len(result.losses) > 1:
        return {"losses": {name or WHOLE: loss for name, loss in result.losses.items()}}
    (name,) = result.losses or (None,)
    return {"member": name} if name is not None else {}


def own_hooks(job: TrainingJob) -> list[Hook]:
    """Return them in the order in which they are called: a step is in the ledger before its row is
    shown.
    """
    kinds = (Probes, Ledger, LifeSign, Rows, Evaluations, Validations, Divergences)
    return [kind(job) for kind in kinds]
