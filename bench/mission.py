"""One run that answers for several sizes on two unequal clusters, and loses a node on its way.

    sudo python bench/mission.py [--text FILE] [--steps 400] [--rate 400] [--keep FOLDER] [--json]

What a user would do, one command after the other, on a testbed of its own (docs/testbed.md): four
nodes, a link between their two clusters that a token bucket shapes.

1. `motet cluster probe` measures two nodes of cluster ib and one of cluster eth, in a job.
2. `motet plan --write` chooses the layout for the largest member; `--pick` leaves out layouts that
   do not use both clusters, and the table says how many were before it.
3. `motet submit` starts one heterogeneous job: a family of three sizes whose last stage is nested and
   so has a fourth, four experiments, an A/A and a positive control at every size, W&B offline.
4. In the second stage the only node of eth that the job has is killed. Slurm requeues the job on the
   other one; the run goes on from its newest checkpoint.
5. `motet report`, `motet experiments audit --replay`, and the same run in one process, whose losses
   are compared step by step.

Both runs are kept with `--keep` and not trained again. The last result is in
`bench/results/mission.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests of the same faults have the tools

from motet.core.files import read_json, write_json
from motet.launcher.report.collect import read_attempts
from motet.launcher.runs.rundir import RunDir
from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import job_field, slurm
from tests.slurm.fault_runs import loss_by_step, mirrored, motet_audit, rows_since, steps_lost
from tests.slurm.jobs import environment, output
from tests.system.cluster_runs import step_seconds
from tests.system.runs import newest_step, rows

KEPT = Path(__file__).parent / "results" / "mission.json"
NODES, LOST = ("n1", "n2", "n3"), "n3"
GROUPS = ("ib:n1,n2", "eth:n3")
CONSTRAINTS = ("ib", "eth")
LOSS_APART = 1e-3
"""Tolerance, relative: sums of 3 ranks round otherwise than one's, and training amplifies it."""
WAIT_S = 7200.0
POLL_S = 0.5
RUN_YAML = """
name: mission
seed: 0
model: {{preset: 1m, d_model: 128, n_layers: 4, n_heads: 8, n_kv_heads: 4, d_ffn: 384, head_dim: 16}}
family:
  kind: progressive
  options:
    stages:
    - {{name: quarter, depth: 0.5, width: 0.5, steps: {first}, warmup_steps: {warmup}}}
    - {{name: half, depth: 0.5, steps: {second}, warmup_steps: {warmup}, operator: {{name: hypercloning, noise: 0.1}}}}
    - {{operator: stack, warmup_steps: {warmup}, nested: {{members: {{slim: {{d_ffn: 0.5}}}}, sampler: joint, draws: 1}}}}
data: {{sequence_length: 320, corpora: [{{path: corpus}}]}}
batch: {{sequences: 24}}
training: {{steps: {steps}, precision: fp32, optimizer: {{lr: 4.0e-3}}, schedule: {{kind: cosine, warmup_steps: {warmup}}}}}
experiments:
  controls: true
  list:
  - {{name: canaries, use: memorization, generate: {{count: 96, seed: 1}}, doses: [0, {dose}, {dose4}, {dose16}], options: {{n_references: 31}}}}
  - {{name: leaked, use: contamination, generate: {{count: 96, seed: 2}}, doses: [0, {dose3}, {dose9}]}}
  - {{name: facts, use: knowledge, generate: {{count: 24, seed: 3}}, placement: anywhere, schedule: {{start: 0.06, every: 0.08}}}}
  - {{name: one_look, use: forgetting, generate: {{count: 12, seed: 4}}, schedule: {{kind: steps, at: [{glance}]}}}}
probes: {{every: 0.25}}
metrics: {{wandb: offline, evaluate_every: 0.05}}
checkpoint: {{every_steps: {every}, keep: 2}}
layout: {{device: cpu, timeout_s: 300}}
slurm: {{time: 180, partition: low}}
"""
DEGREES = ("dp_replicate", "dp_shard", "tp", "pp", "cp", "virtual_stages")
ONE_PROCESS = (
    *(f"layout.{name}=1" for name in DEGREES),
    *(f"layout.{name}=[]" for name in ("stage_layers", "shares", "placement")),
    "layout.micro_sequences=8",
    "layout.cluster=null",
    "slurm.groups=[]",
    "metrics.wandb=off",
)


@dataclass(frozen=True)
class Told:
    """What the mission found.

    Attributes:
        layout: that the planner chose; passed_over: how many it ranked before it.
        predicted_s, measured_s: a step of the largest member; the median, of the last stage.
        attempts: how each ended.
        steps_again: trained twice, because a node was lost; recovery_s: from the loss of the node
            to the next new step.
        loss_apart: largest relative difference from the run in one process, by stage.
        audit: what `motet experiments audit --replay` said last.
        wandb_steps: in the merged files of W&B, which are one run.
        effects: {question: its primary outcome at each member, from the smallest to the largest}.
        controls: {control: {member: [p, whether it found what it should]}}.
    """

    layout: dict[str, Any]
    passed_over: int
    predicted_s: float
    measured_s: float
    components: int
    attempts: list[str]
    steps_again: int
    recovery_s: float
    loss_apart: dict[str, float]
    audit: str
    wandb_steps: int
    effects: dict[str, list[dict[str, Any]]]
    controls: dict[str, dict[str, tuple[float, bool]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default="stdlib:", help="what `motet data prepare` takes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=400.0, help="of the link, Mbit/s")
    parser.add_argument("--keep", type=Path, help="keep corpus and runs in this folder")
    parser.add_argument("--bed", default="/var/lib/motet-mission", help="folder of the testbed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="motet-mission-") as made:
        folder = (arguments.keep or Path(made)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        bed = Testbed(Path(arguments.bed))
        bed.start()
        try:
            bed.set_rate(arguments.rate)
            told = Mission(bed, folder, arguments.steps).told(arguments.text)
        finally:
            bed.stop()
    write_json(KEPT, asdict(told) | {"steps": arguments.steps, "rate_mbit_s": arguments.rate})
    print(json.dumps(asdict(told), indent=1) if arguments.json else "", end="")
    if not arguments.json:
        show(told)
    return 0


class Mission:
    """The commands, in a folder that all nodes see."""

    def __init__(self, bed: Testbed, folder: Path, steps: int) -> None:
        self.bed, self.folder, self.steps = bed, folder, steps
        self.run = RunDir(folder / "runs" / "mission")
        self.alone = RunDir(folder / "runs" / "alone")
        self.ends = {"quarter": steps * 4 // 10, "half": steps * 7 // 10, "whole": steps}

    def told(self, text: str) -> Told:
        """Do all of it."""
        self.prepare(text)
        if not (self.folder / "planned.yaml").exists():
            self.probe()
            self.plan()
        planned = read_json(self.folder / "planned.json")
        if not self.run.done.exists():
            self.train()
        say("the same run in one process")
        if not self.alone.done.exists():
            self.check(["train", "planned.yaml", "name=alone", *ONE_PROCESS])
        return self.judged(planned, read_json(self.folder / "lost.json"))

    def prepare(self, text: str) -> None:
        if not (self.folder / "corpus" / "corpus.json").exists():
            words = ["data", "prepare", text, "--output", "corpus", "--vocabulary-size", "1024"]
            self.check(words)

    def probe(self) -> None:
        """Measure the nodes within a job, as docs/clusters.md says."""
        say("measuring the nodes")
        words = ["srun", f"--nodelist={','.join(NODES)}", f"--nodes={len(NODES)}", "--ntasks-per-node=1"]  # fmt: skip
        probe = ["motet", "cluster", "probe", "--groups", *GROUPS, "--output", "cluster.yaml"]
        self.command([*words, "--exclusive", *probe, "--seconds", "0.7", "--force"])

    def plan(self) -> None:
        """Take the best layout that both clusters have a part in."""
        self.write_run()
        asked = ["plan", "run.yaml", "--cluster", "cluster.yaml"]
        ranked = json.loads(self.check([*asked, "--json"]))["layouts"]
        picked = next(n for n, row in enumerate(ranked, start=1) if ">" in row["on"])
        self.check([*asked, "--pick", str(picked), "--write", "layout.yaml"])
        chosen = OmegaConf.load(self.folder / "layout.yaml")
        for group, constraint in zip(chosen.slurm.groups, CONSTRAINTS, strict=True):
            group.constraint = constraint
        chosen.layout.cluster = "cluster.yaml"
        merged = OmegaConf.merge(OmegaConf.load(self.folder / "run.yaml"), chosen)
        OmegaConf.save(merged, self.folder / "planned.yaml")
        layout = OmegaConf.to_container(chosen.layout)
        step_s = ranked[picked - 1]["step_time_s"]
        write_json(self.folder / "planned.json", {"layout": layout, "before": picked - 1, "step_s": step_s})  # fmt: skip

    def write_run(self) -> None:
        """The run, with no layout of its own yet."""
        first, second = self.ends["quarter"], self.ends["half"] - self.ends["quarter"]
        lengths = {"first": first, "second": second, "steps": self.steps}
        often = {"warmup": max(self.steps // 40, 1), "every": max(self.steps // 20, 1)}
        dose = max(self.steps // 200, 1)
        doses = {"dose": dose, "glance": self.steps // 2 + 1} | {
            f"dose{n}": n * dose for n in (3, 4, 9, 16)
        }
        (self.folder / "run.yaml").write_text(RUN_YAML.format(**lengths, **often, **doses))

    def train(self) -> None:
        """Submit, kill a node in the second stage, let Slurm and the run go on."""
        if not self.run.root.exists():
            say("submitting one heterogeneous job")
            say(self.check(["submit", "planned.yaml"]).strip().splitlines()[0])
        middle = (self.ends["quarter"] + self.ends["half"]) // 2
        if not (self.folder / "lost.json").exists():
            self.until(lambda: newest_step(self.run.root) >= middle, f"step {middle}")
            self.lose()
        self.until(self.run.done.exists, "the run ends")

    def lose(self) -> None:
        """Kill every process of the node of eth that the job has."""
        job = slurm(self.bed, "squeue", "--noheader", "--format=%i").split()
        nodes = [job_field(self.bed, one, "NodeList") for one in job]
        lost = next(node for node in nodes if node in ("n3", "n4"))
        say(f"job {', '.join(job)} on {', '.join(nodes)}: killing {lost}")
        before, at = self.run.latest_attempt(), time.time()
        self.bed.crash(lost)
        self.until(lambda: any(self.rows_after(before)), "the run trains again")
        again = self.rows_after(before)[0]["time"]
        write_json(self.folder / "lost.json", {"seconds": again - at, "components": len(job)})
        self.bed.mend(lost)

    def rows_after(self, attempts: int) -> list[dict[str, Any]]:
        return [row for row in rows_since(self.run, attempts) if row["kind"] == "step"]

    def until(self, seen: Callable[[], object], what: str) -> None:
        """Wait, and say every minute how far the run is."""
        ends, told = time.monotonic() + WAIT_S, time.monotonic()
        while not seen():
            if time.monotonic() > ends:
                raise SystemExit(f"not after {WAIT_S:.0f} s: {what}\n{output(self.run)}")
            if time.monotonic() > told + 60:
                say(f"step {newest_step(self.run.root)} of {self.steps}, waiting until {what}")
                told = time.monotonic()
            time.sleep(POLL_S)

    def check(self, words: Sequence[str]) -> str:
        """Run a command of ours that must succeed; returns what it printed."""
        return self.command(["motet", *words])

    def command(self, words: Sequence[str]) -> str:
        """Run a command in a shell that knows the testbed, as a user does."""
        path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
        shell = environment(self.bed, PATH=path)
        done = subprocess.run(words, capture_output=True, text=True, cwd=self.folder, env=shell)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def judged(self, planned: Mapping[str, Any], lost: Mapping[str, Any]) -> Told:
        """What the report, the audit and the run in one process say."""
        say("report and audit")
        self.check(["report", str(self.run.root)])
        report = read_json(self.run.root / "report.json")
        losses = mirrored(self.run)
        attempts = read_attempts(self.run)
        return Told(
            layout=planned["layout"],
            passed_over=planned["before"],
            predicted_s=planned["step_s"],
            measured_s=self.step_s(),
            components=lost["components"],
            attempts=[str(one["reason"]) for one in attempts],
            steps_again=steps_lost(self.run),
            recovery_s=lost["seconds"],
            loss_apart=self.apart(),
            audit=next(line for line in motet_audit(self.run).splitlines() if "missing" in line),
            wandb_steps=len(losses),
            effects=effects(report),
            controls=controls(report),
        )

    def step_s(self) -> float:
        """Median seconds of a step of the largest member."""
        found = [row for row in rows(self.run.root, "step") if row["step"] > self.ends["half"] + 3]
        return step_seconds(found, found[0]["step"])

    def apart(self) -> dict[str, float]:
        """Largest relative difference of a step's loss from the run in one process, by stage."""
        found, first = {}, 1
        mine, theirs = (loss_by_step(run.root, self.steps) for run in (self.run, self.alone))
        for name, end in self.ends.items():
            pairs = zip(mine[first - 1 : end], theirs[first - 1 : end], strict=True)
            found[name] = max(abs(a - b) / b for a, b in pairs)
            first = end + 1
        return found


def effects(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Every question's primary outcome, from the smallest member to the largest."""
    by_size: dict[str, list[dict[str, Any]]] = {}
    run = report["run"]
    sizes = {one["name"]: one["parameters"] for one in (*run["members"], {**run, "name": "whole"})}
    for entry in report["answers"]["experiments"]:
        seen = [*entry["members"], entry]
        for at in sorted(seen, key=lambda one: sizes[one["member"] or "whole"]):
            found = {key: at["primary"].get(key) for key in ("effect", "low", "high", "p", "unit")}
            found |= {"member": at["member"] or "whole", "invalid": at.get("invalid") or ""}
            by_size.setdefault(entry["name"], []).append(found)
    return by_size


def controls(report: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, bool]]]:
    """What the A/A and the positive control said at every member."""
    return {
        one["name"]: {row["member"] or "whole": (row["p"], row["ok"]) for row in one["by_member"]}
        for one in report["answers"]["controls"].values()
    }


def show(told: Told) -> None:
    """Print what a reader wants to know."""
    console = Console(soft_wrap=True)
    console.print(f"layout {told.layout}; {told.passed_over} ranked before it use one cluster")
    console.print(
        f"a step of the largest {told.measured_s:.2f} s, predicted {told.predicted_s:.2f}"
    )
    console.print(
        f"{told.components} components; attempts {', '.join(told.attempts)}; {told.steps_again} "
        f"steps again; {told.recovery_s:.0f} s from the loss of the node to the next step"
    )
    apart = ", ".join(f"{name} {value:.1e}" for name, value in told.loss_apart.items())
    console.print(f"losses apart from one process: {apart}")
    console.print(f"audit: {told.audit}; {told.wandb_steps} steps in W&B's files")
    for name, found in told.effects.items():
        texts = [effect_text(one) for one in found]
        console.print(f"{name}: {'; '.join(texts)} {found[0]['unit']}")
    for name, by_size in told.controls.items():
        said = [f"{one} p {p:.3f}{'' if ok else ' (failed)'}" for one, (p, ok) in by_size.items()]
        console.print(f"{name}: {', '.join(said)}")


def effect_text(one: Mapping[str, Any]) -> str:
    """One member's effect; none where its stage ended before the first exposure."""
    if one["effect"] is None:
        return f"{one['member']} none"
    return f"{one['member']} {one['effect']:+.3g} [{one['low']:+.3g}, {one['high']:+.3g}]"


def say(what: str) -> None:
    """Tell what is done now, beside the answer."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
