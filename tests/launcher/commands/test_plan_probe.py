"""`motet plan --probe`: which layout is run and how, what is printed, and one that really
trains.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.experiments.corpora.prepare import PrepareRequest, prepare
from motet.launcher.commands.plan import probe as plan_probe
from motet.launcher.config import run_yaml
from motet.launcher.jobs.schedulers import world_size
from motet.launcher.measure import calibration_run
from motet.launcher.runs.rundir import RunDir
from motet.models.config import preset
from motet.parallel.cluster import this_machine
from motet.parallel.cluster.description import Cluster, homogeneous
from motet.parallel.cluster.file import read
from motet.parallel.cost.terms import Training
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.question import PlanAnswer, PlanQuestion
from motet.parallel.planner.which_probe import probes

Main = Callable[..., tuple[int, str, str]]
RUN = """\
name: small
model: {preset: 1m, d_model: 32, n_layers: 2, n_heads: 2, n_kv_heads: 2, d_ffn: 64, vocabulary_size: 512}
data: {sequence_length: 64, corpora: [{path: corpus}]}
batch: {sequences: 8, ramp: [{step: 3, sequences: 16}]}
training: {tokens: 1000000}
experiments:
  list:
  - {name: secrets, use: memorization, hypothesis: They are., generate: {count: 16, seed: 1}, doses: [0, 4]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run.yaml with experiments and a batch ramp, its corpus, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(this_machine, "gpus", lambda *_: [])
    (tmp_path / "run.yaml").write_text(RUN)
    text = tmp_path / "text.txt"
    text.write_text("All texts are sung at once, and each of them can be heard. " * 400)
    prepare(PrepareRequest(inputs=[str(text)], output=tmp_path / "corpus", vocabulary_size=300))
    return tmp_path


def answer(cluster: Cluster, top: int = 8) -> PlanAnswer:
    asked = PlanQuestion(preset("1b", 32_768), cluster, Training(64, 2048), worth=9.0, top=top)
    return plan(asked)


def test_the_most_telling_layout_that_this_machine_can_train_is_run() -> None:
    found = answer(homogeneous("h100", 2, 4), top=40)
    sizes = [choice.cluster.groups[0].nodes for choice in found.choices]
    assert set(sizes) == {1, 2}, "the case needs layouts on one node and on two"
    number, lacks = calibration_run.chosen(found, 0, homogeneous("h100", 1, 4))
    assert lacks == ""
    assert sizes[number - 1] == 1
    number, lacks = calibration_run.chosen(found, 0, homogeneous("cpu", 1, 4))
    assert number == probes(found.choices)[0].number
    assert lacks
    with pytest.raises(UserError, match="--probe 99: only"):
        calibration_run.chosen(found, 99, homogeneous("h100", 1, 4))


@pytest.mark.parametrize(
    ("here", "told"),
    [
        (homogeneous("h100", 1, 4), ""),
        (homogeneous("h100", 1, 2), "4 h100 on a node (here: 2 h100)"),
        (homogeneous("a100-80", 1, 8), "4 h100 on a node (here: 8 a100-80)"),
        (homogeneous("cpu", 1, 8), "4 h100 on a node (here: no GPU)"),
    ],
)
def test_what_a_layout_lacks_here_is_named(here: Cluster, told: str) -> None:
    choice = next(c for c in answer(homogeneous("h100", 1, 4)).choices if c.layout.world_size == 4)
    assert calibration_run.missing(choice, here) == told


def test_a_layout_on_two_nodes_lacks_nodes_here() -> None:
    choice = next(c for c in answer(homogeneous("h100", 2, 4)).choices if c.layout.world_size == 8)
    assert calibration_run.missing(choice, homogeneous("h100", 1, 8)) == "nodes: 2 of h100"


def test_any_run_becomes_a_short_plain_one_with_exactly_the_ranked_layout(folder: Path) -> None:
    for choice in answer(homogeneous("h100", 1, 4)).choices:
        words = calibration_run.overrides(choice, "probe", "runs", None)
        given = ["batch.sequences=64", "data.sequence_length=2048", "model.preset=1b"]
        given += [
            f"model.{n}=null" for n in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ffn")
        ]
        settings = run_yaml.load(folder / "run.yaml", [*given, "layout.tp=2", *words])
        made = settings.layout_for(settings.layout.processes)
        assert replace(made, placement=()) == replace(choice.layout, placement=())
        assert not settings.experiments.list
        assert settings.batch.ramp == ()
        assert settings.steps >= calibration_run.ENOUGH_STEPS
        job = run_yaml.load(
            folder / "run.yaml",
            [*given, *words, *calibration_run.job_words(choice)],
            world=world_size,
        )
        assert world_size(job) == choice.layout.world_size


def test_steps_are_enough_once_there_are_several_and_time_has_passed() -> None:
    def rows(count: int) -> list[dict[str, float]]:
        return [{"step": i} for i in range(count)]

    few, many = rows(calibration_run.ENOUGH_STEPS - 1), rows(calibration_run.ENOUGH_STEPS)
    assert not calibration_run.enough(few, 1000.0, 60.0)
    assert not calibration_run.enough(many, 59.0, 60.0)
    assert calibration_run.enough(many, 60.0, 60.0)
    assert not calibration_run.enough([], 1000.0, 60.0)


def test_cores_are_measured_before_a_probe_unless_a_file_describes_them(
    folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> Cluster:
        raise UserError("measured")

    monkeypatch.setattr(plan_probe, "measured", measured)
    assert "measured" in main("plan", "run.yaml", "--probe")[2]
    assert main("plan", "run.yaml", "--probe", "--dry-run")[0] == 0
    assert main("plan", "run.yaml")[0] == 0
    monkeypatch.setattr(this_machine, "gpus", lambda *_: [("NVIDIA H100 80GB HBM3", 79.1)])
    assert "--probe 99: only" in main("plan", "run.yaml", "--probe", "99")[2]


def test_only_the_timer_may_end_a_run_without_ending_the_plan(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with calibration_run.Timer(RunDir(tmp_path), 60.0) as timer:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        timer.fired = True  # the run ended by itself at this moment
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_dry_run_prints_commands_that_can_be_pasted_and_starts_nothing(
    folder: Path, main: Main
) -> None:
    code, out, _ = main("plan", "run.yaml", "--probe", "--dry-run")
    assert code == 0
    assert "\nmotet train run.yaml name=small-probe-1 " in out
    assert "motet plan --calibrate " in out
    assert not (folder / "runs").exists()
    (folder / "cluster.yaml").write_text(homogeneous("h100", 1, 4).to_yaml())
    code, out, _ = main("plan", "run.yaml", "--cluster", "cluster.yaml", "--probe", "--dry-run")
    assert code == 0
    assert "\nmotet submit run.yaml name=small-probe-1 " in out
    assert "slurm.groups=[{nodes: 1, processes: " in out
    code, _, err = main("plan", "run.yaml", "--cluster", "cluster.yaml", "--probe")
    assert code == 2
    assert "h100 on a node (here: no GPU)" in err
    assert "--dry-run" in err


def test_a_file_that_is_there_is_not_replaced(folder: Path, main: Main) -> None:
    (folder / "calibrated.yaml").write_text("mine\n")
    code, _, err = main("plan", "run.yaml", "--probe")
    assert code == 2
    assert "calibrated.yaml exists; --force replaces it" in err


def test_a_probe_trains_for_a_moment_and_calibrates_the_plan(
    folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_run, "PROBE_S", 0.5)
    (folder / "cluster.yaml").write_text("# ours\n" + this_machine.node_of(2).to_yaml())
    words = ["plan", "run.yaml", "--cluster", "cluster.yaml", "--probe", "--output", "out.yaml"]
    code, out, err = main(*words)
    assert code == 0, err
    assert "run folder: " in out
    assert "s measured" in out
    assert "Before -> after:" in out
    (group,) = read(folder / "out.yaml").groups
    assert group.calibration is not None
    assert group.calibration.runs == (str(folder / "runs/small-probe-1/attempts/1"),)
    assert (folder / "out.yaml").read_text().startswith("# ours\n# Calibrated: cpu: 1 attempt")
    assert (folder / "cluster.yaml").read_text().startswith("# ours\ngroups:")  # not touched
