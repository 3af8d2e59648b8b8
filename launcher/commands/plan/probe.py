"""`motet plan RUN.yaml --probe`: train a ranked layout for a minute, fit constants to it, write
them down, and plan again.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.launcher.commands import common
from motet.launcher.commands.plan import told
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.measure import calibration_run
from motet.launcher.planning import summary as plan_words
from motet.launcher.planning import table as plan_table
from motet.launcher.runs.begun import yaml_with_overrides
from motet.launcher.runs.rundir import RunDir
from motet.parallel.cluster.description import Cluster
from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout

MOST_MEASURED = 8
"""Processes at most that measure a machine without GPUs; its cores are divided among them."""
MEASURED_S = 0.5
"""Of one series of transfers between them."""


def probe(
    arguments: argparse.Namespace, settings: RunSettings, question: PlanQuestion, answer: PlanAnswer
) -> int:
    """Run it, or in a dry run say what would be run and where.

    Raises:
        UserError: this machine cannot train the layout; the message says what can, and how.
    """
    from motet.parallel.cluster.this_machine import this_machine

    here = this_machine()
    number, lacks = calibration_run.chosen(answer, arguments.probe, here)
    choice = answer.choices[number - 1]
    run = _free(Path(settings.runs), f"{settings.name}-probe")
    described = arguments.cluster is not None or question.cluster != here
    machines = Path(f"{run.root}.cluster.yaml") if described else None
    words = calibration_run.overrides(
        choice, run.name, str(run.root.parent), None if machines is None else str(machines)
    )
    if arguments.dry_run:
        _say(arguments, number, choice, words, lacks, run, machines)
        return 0
    if lacks:
        raise UserError(
            f"--probe: layout {number} ({plan_table.words(choice)}) needs {lacks}. --dry-run "
            "prints the commands that run it "
            "there and calibrate with it; --probe N takes another layout"
        )
    seconds = calibration_run.steps_of(choice) * choice.prediction.step_time_s
    print(f"Layout {number}: {plan_table.words(choice)}; about {seconds:.0f} s of steps")
    code = _train(arguments, words, run, machines, choice.cluster)
    if code:
        return code
    return _plan_again(arguments, settings, question, answer, run)


def measured() -> Cluster:
    """Measure this machine as `motet cluster probe` does: data sheets say too little of CPUs for
    constants to make up for it.
    """
    from motet.launcher.launch.command import ONE_NODE
    from motet.launcher.measure import cluster_launch
    from motet.parallel.cluster import this_machine
    from motet.parallel.cluster.probe.result import cluster_of

    processes = min(this_machine.cores(), MOST_MEASURED)
    print(f"Measuring this machine first, with {processes} processes ...", flush=True)
    asked = cluster_launch.Asked(processes, "cpu", series_s=MEASURED_S)
    with told.telling() as tell:
        return cluster_of(cluster_launch.run(asked, ONE_NODE, tell, this_machine.cores()))[0]


def _free(runs: Path, name: str) -> RunDir:
    """Return a run's folder that does not exist yet."""
    number = 1
    while (runs / f"{name}-{number}").exists():
        number += 1
    return RunDir(runs / f"{name}-{number}")


def _say(
    arguments: argparse.Namespace,
    number: int,
    choice: RankedLayout,
    words: list[str],
    lacks: str,
    run: RunDir,
    machines: Path | None,
) -> None:
    """Print the commands of the run and of the fit."""
    print(f"# layout {number}: {plan_table.words(choice)} on {plan_table.machines(choice)}")
    if machines is None and choice.cluster.groups[0].device.kind == "cpu":
        print(
            "# data sheets say little of CPUs: measure this machine first (motet cluster probe), "
            "and give --cluster"
        )
    if machines is not None:
        path, folder = shlex.quote(str(machines)), shlex.quote(str(machines.parent))
        print(f"# its machines, as a part of {arguments.cluster}:")
        print(f"mkdir -p {folder} && cat > {path} <<'END'\n{choice.cluster.to_yaml()}END")
    steps = f"training.steps={calibration_run.steps_of(choice)}"
    given = [str(arguments.run_yaml), *arguments.settings, *words, steps]
    if lacks:
        print(f"# this machine lacks {lacks}; as a Slurm job (add what your site asks for):")
        print(shlex.join(["motet", "submit", *given, *calibration_run.job_words(choice)]))
    else:
        print("# about a minute of steps:")
        print(shlex.join(["motet", "train", *given]))
    output = arguments.output or told.CALIBRATED
    cluster = ["--cluster", arguments.cluster] if arguments.cluster else []
    print("# then")
    print(shlex.join(["motet", "plan", "--calibrate", str(run.root), *cluster, "--output", output]))


def _train(
    arguments: argparse.Namespace,
    words: list[str],
    run: RunDir,
    machines: Path | None,
    cluster: Cluster,
) -> int:
    """Train until the timer or a person stops it; return the exit code of the run."""
    from motet.launcher.commands.train import start

    if machines is not None:
        machines.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(machines, cluster.to_yaml())
    try:
        given = [*arguments.settings, *words]
        path = common.run_yaml(arguments)
        settings = run_yaml.load(path, given)
        text = yaml_with_overrides(path.read_text(encoding="utf-8"), given)
        print(f"run folder: {run.root}")
        with calibration_run.Timer(run, calibration_run.PROBE_S):
            return start(settings, text, dry_run=False)
    finally:
        if machines is not None and not run.manifest.exists():
            machines.unlink(missing_ok=True)


def _plan_again(
    arguments: argparse.Namespace,
    settings: RunSettings,
    question: PlanQuestion,
    before: PlanAnswer,
    run: RunDir,
) -> int:
    """Fit, write, search again, and tell what changed."""
    from motet.launcher.planning.calibrate import calibrate
    from motet.launcher.planning.prediction import newest, sentence
    from motet.parallel.planner.best_first import plan

    measured = newest(run)
    if measured is None:
        raise UserError(
            f"{run.root} stopped before it had steps enough to be measured; start --probe again"
        )
    print(sentence(measured))
    cluster, sentences = calibrate([run.root], question.cluster)
    told.write_calibrated(arguments, cluster, sentences)
    with told.telling() as tell:
        tell("searching layouts with the new constants")
        asked = replace(question, cluster=cluster)
        after = plan(asked)
    if not after.choices:
        raise UserError(
            f"with these constants no layout fits; look at {arguments.output or told.CALIBRATED}"
        )
    tokens = settings.slots_before(settings.steps) * settings.data.sequence_length
    print()
    told.tell_answer(arguments, settings.name, asked, after, tokens)
    if not arguments.json:
        print("\n".join(["", *plan_words.changes(before, after)]))
    return 0
