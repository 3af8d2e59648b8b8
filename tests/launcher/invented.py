"""A run whose training is invented: frozen, with a ledger, probes and checkpoints as the real loop
writes them, and scores that a test decides. Seconds become milliseconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.files import atomic_write, read_json, write_json
from motet.core.listed import hash_of
from motet.experiments.design.frozen import read_definition, read_questions
from motet.experiments.library.kinds import Library
from motet.experiments.scoring.store import write_probe
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.ledger import (
    LedgerWriter,
    Record,
    ancestry,
    open_segment,
)
from motet.experiments.types import ItemScores
from motet.launcher import report
from motet.launcher.config import run_yaml
from motet.launcher.launch.local import model_facts, prepare_run
from motet.launcher.rank.probing import due_steps
from motet.launcher.report.collect import assemble, collect
from motet.launcher.runs.manifest import open_stream
from motet.launcher.runs.metrics import MetricsWriter
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_manifest, run_sha256

STEPS = 40
RUN_YAML = """
name: r
seed: 3
data: {{sequence_length: 128, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 16}}
training: {{steps: 40, schedule: {{warmup_steps: 2, kind: cosine}}}}
layout: {{processes: 1, device: cpu, micro_sequences: 16}}
probes: {{every: 0.25}}
experiments:
  draws: 400
  list:
  - {{name: canaries, use: memorization, doses: [0, 2], generate: {{count: 24}}, options: {{n_references: 15}}}}
  - {{name: aa, use: placebo, generate: {{count: 10}}}}
  - {{name: strong, use: positive_control, doses: [0, 6], generate: {{count: 12}}}}
"""
Gain = Callable[[str, int], float]


def gain(name: str, step: int) -> float:
    """Nats that a shown secret gains: clear in both from the first exposures on."""
    return 0.0 if name == "aa" else 3.0


class InventedRun:
    """One run folder, and its training in as many launches as a test wants. Members of its family
    score as the whole model does, and all train on everything (`sampler: joint`, one draw). `logs`: it writes metrics.jsonl and
    attempt.json too, and a checkpoint has the files that `weights` writes into its folder.
    """

    logs = False
    weights: Callable[[Path], None] | None = None

    def __init__(
        self,
        folder: Path,
        corpus: Path,
        edit: Callable[[str], str] = str,
        own: Path | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        yaml = folder / "run.yaml"
        yaml.write_text(edit(RUN_YAML.format(corpus=corpus)))
        if own is not None:
            shutil.copy(own, folder)
        settings = run_yaml.load(yaml)
        self.run = RunDir(Path(settings.runs) / settings.name)
        self.members: list[str] = []
        model = {"model": {}, "parameters": 1_000, "parameters_non_embedding": 500}
        if settings.family.kind != "whole":
            model = model_facts(settings)
            self.members = [one["name"] for one in model["members"]]
        prepare_run(settings, self.run, yaml.read_text(), {**model, **(facts or {})})
        self.questions = read_questions(self.run.plan, Library(self.run.plugins))
        self.plan = ExposurePlan(self.run.plan / "exposures.plan")

    def train(
        self,
        until: int,
        start: int = 0,
        overrides: Sequence[str] = (),
        gained: Gain = gain,
        save: bool = True,
    ) -> None:
        """Go on from the checkpoint at `start` up to step `until`."""
        settings = run_yaml.load(self.run.resolved_yaml, overrides)
        number = self.run.next_attempt()
        run_yaml.store(self.run.launch_settings(number), settings)
        run_yaml.store(self.run.resolved_yaml, settings)
        definition, sha256 = read_definition(self.run.plan)
        parent, grew_from = 0, None
        if start:
            grew_from = read_json(self.run.checkpoint(start) / "manifest.json")
            parent = grew_from["segment"]
            for step in self.run.checkpoint_steps():
                if step > start:
                    shutil.rmtree(self.run.checkpoint(step))
        hashes = (self.plan.sha256, sha256)
        draws = 1 if self.members else None
        segment = open_segment(self.run.ledger, parent, number, start, 1, hashes, draws)
        ledger = LedgerWriter(self.run.ledger, segment.segment, 0)
        stream, batches = open_stream(settings, self.plan), settings.batch_steps
        frozen = {e["spec"]["name"]: e["probe_steps"] for e in definition["experiments"]}
        total = definition["steps_total"]
        due = due_steps(frozen, self.questions, total, settings.steps)
        metrics = MetricsWriter(self.run, rank=0 if self.logs else 1)
        metrics.log("attempt", start, attempt=number, start_step=start)
        measured: list[dict[str, Any]] = []
        for step in range(start, until + 1):
            names = [name for name, steps in due.items() if step in steps]
            if names and (step > start or not parent):
                scores = {name: self.scores(name, step, gained) for name in names}
                others = {
                    member: {name: self.scores(name, step, gained) for name in names}
                    for member in self.members
                }
                written = write_probe(
                    self.run.probes, step, segment.segment, sha256, scores, others
                )
                row = {"segment": segment.segment, "sha256": written}
                measured.append({"step": step, **row})
                metrics.log("probe", step, **row)
            if step < until:
                first, count = batches.slots_before(step), batches.sequences(step)
                batch = stream.batch(first, count)
                ids = batch.exposure_ids
                who = ((None, *reversed(self.members)),) if self.members else ()
                ledger.append(Record(step, first, count, batch.digest(), True, ids, who))
                metrics.log("step", step + 1, loss=5.0 - step / 100, tokens=first * 128)
        ledger.close()
        if save:
            folder = self.run.checkpoint(until)
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"step": until, "segment": segment.segment, "definition_sha256": sha256}
            facts["plan_sha256"] = self.plan.sha256
            facts["lineage"] = ancestry(self.run.ledger, segment, grew_from)
            facts["run_sha256"] = run_sha256(read_manifest(self.run))
            if self.weights is not None:
                self.weights(folder)
                facts["files"] = {path.name: hash_of(path) for path in folder.iterdir()}
            if self.logs:
                facts |= {"probes": measured, "metrics": metrics.mark()}
            write_json(folder / "manifest.json", facts)
        self._ends(number, until, metrics, finished=until >= settings.steps)
        if until >= settings.steps:
            atomic_write(self.run.done, f"{until}\n")

    def _ends(self, number: int, step: int, metrics: MetricsWriter, finished: bool) -> None:
        """Write down how an attempt ended, as rank 0 does."""
        reason = "finished" if finished else "stopped"
        metrics.log("event", step, event=reason)
        metrics.close()
        if self.logs:
            facts = {"attempt": number, "start_step": 0, "end_step": step, "reason": reason}
            facts |= {"started": 1.0, "ended": 2.0, "world_size": 1, "segment": number}
            write_json(self.run.attempt(number) / "attempt.json", facts)

    def scores(self, name: str, step: int, gained: Gain) -> ItemScores:
        """Noise that lasts, a little that does not, and the gain of units that were shown."""
        question = next(q for q in self.questions if q.name == name)
        counts = [len(unit.items) for unit in question.units]
        secret_I = np.array([i.kind != "reference" for u in question.units for i in u.items])
        shown_I = np.repeat(question.treated(), counts) & (step > STEPS // 4)
        rng = np.random.default_rng([1, len(name), step])
        lasting = np.random.default_rng([1, len(name)]).normal(0, 1.0, sum(counts))
        logprob = lasting + rng.normal(0, 0.5, sum(counts)) - 20
        logprob = logprob + secret_I * shown_I * gained(name, step)
        tokens = np.full(len(logprob), 4)
        return ItemScores(logprob, tokens, 2 * tokens, logprob > 0)

    def report(self, page: bool = False) -> dict[str, Any]:
        """Return the report; `page` writes it and the page as well, whose drawings take seconds."""
        if page:
            report.build(self.run)
            return dict(json.loads(self.run.report_json.read_text()))
        return assemble(collect(self.run))

    def page(self) -> str:
        return self.run.report_html.read_text()
