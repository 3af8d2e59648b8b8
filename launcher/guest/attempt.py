"""One start of a guest run: its segment of the ledger, its metrics and its probes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

import motet
from motet.core.errors import UserError
from motet.core.files import atomic_write, write_json
from motet.experiments.design.frozen import read_definition
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.ledger import LedgerWriter, Segment, ancestry, open_segment
from motet.experiments.stream.stream import Batch, Stream
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.guest.model import Scorer, untouched
from motet.launcher.guest.run_folder import agree, parent_segment, record_checkpoint, tell
from motet.launcher.guest.watch import Watch, compare, complaint, records
from motet.launcher.jobs.schedulers import recorded
from motet.launcher.launch.command import recorded_environment
from motet.launcher.rank.probing import ProbeSet
from motet.launcher.rank.trackers import open_trackers
from motet.launcher.report import ended
from motet.launcher.runs.blame import Heartbeat
from motet.launcher.runs.metrics import MetricsWriter
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint, read_manifest, run_sha256
from motet.parallel.engines.protocol import Engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World


class Attempt:
    """Follows the user's loop from `step` on, which counts the updates that the model has had."""

    def __init__(
        self,
        run: RunDir,
        settings: RunSettings,
        world: World,
        stream: Stream,
        plan: ExposurePlan,
        model: nn.Module,
        start_step: int,
    ) -> None:
        self.run, self.settings, self.world, self.stream = run, settings, world, stream
        self.model, self.step, self.open, self.failed = model, start_step, True, False
        self.steps: Steps = settings.batch_steps
        self.hashes = {
            "definition_sha256": read_definition(run.plan)[1],
            "plan_sha256": plan.sha256,
        }
        self.probes = ProbeSet.of_run(run, settings)
        self.measured: list[dict[str, Any]] = []
        self.scorer = Scorer(model)
        if settings.data.document_masks:
            self._check_masks()
        parent = parent_segment(run, start_step, world)
        self.segment, self.number = self._open(parent, plan)
        grew_from = read_checkpoint(run, start_step) if parent else None
        self.lineage = ancestry(run.ledger, self.segment, grew_from)
        self.ledger = LedgerWriter(run.ledger, self.segment.segment, world.rank)
        config = run_yaml.public(settings)
        self.mirror = open_trackers(run, config, world.rank, self.hashes)
        self.metrics = MetricsWriter(run, config, world.rank, self.mirror)
        self.metrics.log(
            "attempt",
            start_step,
            attempt=self.number,
            start_step=start_step,
            world_size=world.size,
            run_sha256=run_sha256(read_manifest(run)),
        )
        self.facts = self._facts()
        self._write_facts()
        self.probe()
        self.watch = Watch(model)
        self._since = time.perf_counter()

    def _check_masks(self) -> None:
        with untouched(self.model):
            mixes = self.scorer.mixes_documents()
        agree(
            "data.document_masks=true, but this model lets a token see the document before its own "
            "when position_ids restart; "
            "use data.document_masks=false, or an attention that heeds packed documents "
            "(transformers 5: sdpa, eager, flash)"
            if mixes
            else None,
            self.world,
        )

    def _open(self, parent: int, plan: ExposurePlan) -> tuple[Segment, int]:
        opened = None
        if self.world.rank == 0:
            number = self.run.next_attempt()
            command = {
                "command": sys.argv[:1],  # arguments of a foreign script may hold a secret
                "environment": recorded_environment(os.environ, recorded()),
            }
            write_json(self.run.attempt(number) / "environment.json", command, private=True)
            run_yaml.store(self.run.launch_settings(number), self.settings)
            hashes = (plan.sha256, self.hashes["definition_sha256"])
            size = self.world.size
            segment = open_segment(self.run.ledger, parent, number, self.step, size, hashes)
            opened = (segment, number)
        found: tuple[Segment, int] = tell(opened, self.world)
        self.heartbeat = Heartbeat(self.run.attempt(found[1]), self.world.rank)
        return found

    def probe(self) -> None:
        """Measure every experiment that is due now (a collective); training does not notice."""
        if not self.probes.names(self.step):
            return
        started = time.perf_counter()
        layout = Layout(dp_replicate=self.world.size)
        with untouched(self.model):
            # Of an engine, probes need what `Scorer` has.
            engine = cast(Engine, self.scorer)
            scores = self.probes.score(self.step, engine, layout, self.world)
        if self.world.rank == 0:
            segment = self.segment.segment
            sha256 = self.hashes["definition_sha256"]
            written = self.probes.write(self.run, self.step, segment, sha256, scores)
            seconds = time.perf_counter() - started
            means = self.probes.means(scores)
            row = {"segment": segment, "sha256": written}
            self.measured.append({"step": self.step, **row})
            self.metrics.log("probe", self.step, experiments=means, seconds=seconds, **row)

    def done(
        self,
        planned: Sequence[Batch],
        applied: bool,
        loss: float | None,
        **numbers: Any,
    ) -> dict[str, Any]:
        """Write what the step under way consumed to the ledger, count its update, and probe if due
        (a collective).

        Args:
            planned: what this process was to read.
            applied: whether the optimizer took the update.
            loss: of this process; the row has the mean over processes.

        Returns:
            The step's row for the metrics, not yet written.

        Raises:
            UserError: on every process, after the ledger has the truth, when one of them did not
                train as planned.
        """
        found = compare(self.watch.take(), planned)
        for record in records(found, planned, self.step, applied, self.stream.batch):
            self.ledger.append(record)
        try:
            mean = self._agree(complaint(found, self.step), loss)
        except UserError as error:
            self._fail(error)
            raise
        now = time.perf_counter()
        seconds, self.step = now - self._since, self.step + 1
        tokens = self.steps.sequences(self.step - 1) * self.settings.data.sequence_length
        self.heartbeat.touch()
        self.probe()
        self._since = time.perf_counter()
        return {
            "step": self.step,
            "loss": mean,
            "tokens": self.steps.slots_before(self.step) * self.settings.data.sequence_length,
            "tokens_per_s": tokens / seconds,
            "seconds": {"train": seconds},
            "skipped": not applied,
            **numbers,
        }

    def _fail(self, error: UserError) -> None:
        """Write down why this start ends here."""
        self.failed = True
        self.facts |= {"end_step": self.step, "ended": time.time(), "reason": "crashed"}
        self._write_facts()
        if self.world.rank == 0:
            atomic_write(self.run.attempt(self.number) / "error.txt", f"{error}\n")

    def _agree(self, mine: str | None, loss: float | None) -> float | None:
        """Raise a complaint of any process on all, and return the mean loss: one small collective a
        step.
        """
        if self.world.size == 1:
            agree(mine, self.world)
            return loss
        told = torch.tensor(
            [mine is not None, loss is not None, 0.0 if loss is None else loss],
            dtype=torch.float64,
        )
        dist.all_reduce(told, group=self.world.control)
        complaints, losses, total = told.tolist()
        if complaints:
            agree(mine, self.world)
        return total / losses if losses else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a step's row."""
        self.metrics.log("step", **row)

    def saved(self, step: int, folder: Path | None) -> None:
        """Record that the weights of `step`, the model now, were saved (a collective).

        Raises:
            UserError: the model has had another number of updates.
        """
        if step != self.step:
            raise UserError(
                f"step {step:,} was to be recorded as saved, but {self.step:,} updates were "
                "counted in this run so far"
            )
        started = time.perf_counter()
        self.ledger.sync()
        facts = {
            **self.hashes,
            "segment": self.segment.segment,
            "lineage": self.lineage,
            "model": (manifest := read_manifest(self.run))["model"],
            "run_sha256": run_sha256(manifest),
            "probes": self.measured,
            "metrics": self.metrics.mark(),
            "motet_version": motet.__version__,
        }
        record_checkpoint(self.run, step, folder, facts, self.world)
        self.metrics.log("checkpoint", step, seconds=time.perf_counter() - started)

    def close(self) -> None:
        """End the attempt: finished when the run has all its steps, which are then recorded, else
        stopped (a collective).
        """
        if not self.open:
            return
        self.open = False
        finished = self.step >= self.settings.steps
        if finished and not (self.run.checkpoint(self.step) / "manifest.json").exists():
            self.saved(self.step, None)
        tell(None, self.world)
        self.watch.close()
        self.ledger.close()
        reason = "finished" if finished else "crashed" if self.failed else "stopped"
        self.metrics.log("event", self.step, event=reason)
        self.metrics.close()
        if self.mirror is not None:
            self.mirror.close()
        if self.world.rank == 0 and finished:
            atomic_write(self.run.done, f"{self.step}\n")
        self.facts |= {"end_step": self.step, "ended": time.time(), "reason": reason}
        self._write_facts()
        if self.world.rank == 0 and reason != "stopped":
            ended.after(self.run, "" if finished else "the loop ended with an error")

    def _facts(self) -> dict[str, Any]:
        parameter = next(self.model.parameters())
        return {
            "attempt": self.number,
            "start_step": self.step,
            "end_step": None,
            "world_size": self.world.size,
            "precision": str(parameter.dtype).removeprefix("torch."),
            "device": self.scorer.device.type,
            "started": time.time(),
            "ended": None,
            "reason": "running",
            "segment": self.segment.segment,
            "versions": {
                "motet": motet.__version__,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
            },
        }

    def _write_facts(self) -> None:
        if self.world.rank == 0:
            write_json(self.run.attempt(self.number) / "attempt.json", self.facts)
