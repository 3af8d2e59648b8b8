"""Predicted against measured, on run folders whose steps took a known time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.core.files import write_json
from motet.launcher.cli import main
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.planning import calibrate, prediction
from motet.launcher.report import collect
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig, preset
from motet.parallel.cluster.description import Cluster, homogeneous
from motet.parallel.cluster.this_machine import read_cluster
from motet.parallel.cost.stages import predict
from motet.parallel.layout.layout import Layout

RUN_YAML = """\
name: {name}
data: {{sequence_length: 2048, corpora: [{{path: nowhere}}]}}
training: {{steps: 1000}}
model: {{preset: 1b, vocabulary_size: 32000}}
batch: {{sequences: {sequences}}}
layout: {{processes: 8, micro_sequences: 2, cluster: machines.yaml}}
"""
H100 = "NVIDIA H100 80GB HBM3", 79.1


def settings_of(folder: Path, name: str = "one", sequences: int = 64) -> RunSettings:
    path = folder / f"{name}.yaml"
    path.write_text(RUN_YAML.format(name=name, sequences=sequences))
    return run_yaml.load(path)


def model_of() -> ModelConfig:
    return preset("1b", vocabulary_size=32000)


def step(number: int, seconds: float, memory_mib: float = 2048.0) -> dict[str, Any]:
    timed = {"train": 0.9 * seconds, "data": 0.1 * seconds}
    return {"kind": "step", "step": number, "seconds": timed, "memory_mib": memory_mib}


def made_run(
    folder: Path,
    settings: RunSettings,
    seconds: list[float],
    *,
    ramp: tuple[int, ...] = (),
    **options: Any,
) -> RunDir:
    """A run of one attempt whose steps took these seconds."""
    run = RunDir(folder / "runs" / settings.name)
    write_json(
        run.manifest,
        {
            "model": dataclasses.asdict(model_of()),
            "config": {"batch": {"ramp": [{"step": s, "sequences": 128} for s in ramp]}},
        },
    )
    run.resolved_yaml.write_text("name: x\n")
    rows = [step(i + 1, took) for i, took in enumerate(seconds)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(run.attempt(1) / "attempt.json", {"start_step": 0, "end_step": len(seconds)})
    given = {"sequences": settings.batch.sequences, "precision": "bf16", "nodes": 1, "gpu": H100}
    layout = settings.layout_for(8)
    prediction.record(run, 1, settings, layout, **{**given, **options})
    return run


@pytest.fixture
def machines(tmp_path: Path) -> Path:
    path = tmp_path / "machines.yaml"
    path.write_text(homogeneous("h100", 1).to_yaml())
    return path


def test_a_run_is_compared_with_what_was_predicted_when_it_started(
    tmp_path: Path, machines: Path
) -> None:
    settings = settings_of(tmp_path)
    run = made_run(tmp_path, settings, [60.0, 9.0, 5.0, *[2.0] * 10, 8.0])
    found = prediction.newest(run)
    assert found is not None
    assert found["measured"]["step_time_s"] == pytest.approx(2.0)
    assert found["measured"]["memory_gib"] == 2.0
    training, traits = prediction.training_of(settings, 64, "bf16")
    expected = predict(model_of(), homogeneous("h100", 1), settings.layout_for(8), training, traits)
    assert found["predicted"]["step_time_s"] == pytest.approx(expected.step_time_s)
    reserved = expected.memory_parts["reserved"]
    assert found["predicted"]["memory_gib"] == pytest.approx(expected.memory_gib - reserved)
    (row,) = prediction.history(tmp_path / "runs")
    assert row["devices"] == "1 x 8 h100"
    assert row["layout"] == "dp_shard=8"
    assert row["error"] == pytest.approx(expected.step_time_s / 2.0 - 1)
    assert row["problem"] is None
    assert prediction.sentence(found) == collect.predicted(run)
    assert "step 2 s measured" in collect.predicted(run)
    assert prediction.cluster_of_run(run) == homogeneous("h100", 1)


def test_on_cores_no_transfer_of_gradients_is_hidden_and_nothing_is_started_ahead(
    tmp_path: Path,
) -> None:
    settings = settings_of(tmp_path)
    gpu, core = (
        prediction.training_of(settings, 64, "fp32", on_cores=one)[1] for one in (False, True)
    )
    assert (gpu.data_overlap, gpu.ahead) == (0.9, True)
    assert (core.data_overlap, core.ahead) == (0.0, False)


def test_a_teacher_of_a_nested_family_is_planned_for(tmp_path: Path) -> None:
    family = "family: {{kind: nested, options: {{members: {{m: {{d_ffn: 0.5}}}}, {}}}}}\n"
    follow = "loss: distill, distill_from_step: 10"
    for number, (options, kept) in enumerate(
        [(follow, False), (f"{follow}, teacher: largest", False), (f"{follow}, teacher: ema", True)]
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(RUN_YAML.format(name="one", sequences=64) + family.format(options))
        assert prediction.training_of(run_yaml.load(path), 64, "bf16")[0].teacher is kept
    assert not prediction.training_of(settings_of(tmp_path), 64, "bf16")[0].teacher


def test_steps_of_another_attempt_or_of_a_larger_batch_are_not_counted(
    tmp_path: Path, machines: Path
) -> None:
    run = made_run(tmp_path, settings_of(tmp_path), [1.0] * 10 + [3.0] * 30, ramp=(10,))
    found = prediction.newest(run)
    assert found is not None
    assert found["measured"]["step_time_s"] == pytest.approx(1.0)
    rows = [step(i, 1.0 if i <= 20 else 5.0) for i in range(1, 41)]
    measured = prediction.measure(rows, {"start_step": 20, "end_step": 30})
    assert measured["step_time_s"] == pytest.approx(5.0)
    assert measured["steps"] == 10 - prediction.WARM_UP_STEPS


def test_a_run_too_short_to_be_measured_says_so(tmp_path: Path, machines: Path) -> None:
    run = made_run(tmp_path, settings_of(tmp_path), [1.0] * 5)
    assert prediction.newest(run) is None
    (row,) = prediction.history(run.root)
    assert "it has 5 steps of one size; 6 tell" in row["problem"]
    assert collect.predicted(run) == ""
    with pytest.raises(UserError, match="no attempt on one kind of device was predicted"):
        calibrate.compared([run.root])


def test_several_machines_of_which_nothing_is_known_are_not_predicted(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    bare = dataclasses.replace(settings.layout, cluster=None)
    settings = dataclasses.replace(settings, layout=bare)
    run = made_run(tmp_path, settings, [1.0] * 10, nodes=2)
    (row,) = prediction.history(run.root)
    assert "2 machines, and nothing says what joins them" in row["problem"]
    with pytest.raises(UserError, match="nothing says what joins them"):
        prediction.cluster_of_run(run)
    alone = made_run(tmp_path, dataclasses.replace(settings, name="alone"), [1.0] * 10)
    assert prediction.cluster_of_run(alone).groups[0].device.kind == "h100"


def test_a_prediction_that_fails_never_stops_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "broken")
    settings = settings_of(tmp_path)
    prediction.record(run, 1, settings, Layout(), sequences=8, precision="bf16", nodes=1)
    told = json.loads((run.attempt(1) / prediction.FILE).read_text())
    assert "manifest.json does not exist" in told["problem"]


def test_machines_that_cannot_be_read_are_refused_before_a_run_starts(
    tmp_path: Path, machines: Path
) -> None:
    read_cluster(str(machines))
    with pytest.raises(UserError, match=r"layout\.cluster: .*none\.yaml: No such file"):
        read_cluster(str(tmp_path / "none.yaml"))
    machines.write_text("groups: 3\n")
    with pytest.raises(UserError, match=r"layout\.cluster: .*is not a list"):
        read_cluster(str(machines))


def test_history_is_told_as_json(
    tmp_path: Path, machines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path, settings_of(tmp_path), [1.0] * 10)
    assert main(["plan", "--history", str(tmp_path / "runs"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["attempts"]
    assert rows == prediction.history(tmp_path / "runs")
    assert main(["plan"]) == 2
    assert "give a RUN.yaml, or --history or --calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "precision"),
    [({"bf16": 0.06, "fp32": 0.03}, "bf16"), ({"bf16": 0.03, "fp32": 0.03}, "fp32")],
)
def test_cores_train_in_bf16_where_they_were_measured_to_be_faster_at_it(
    tmp_path: Path, measured: dict[str, float], precision: str
) -> None:
    one = homogeneous("cpu", 1).groups[0]
    group = dataclasses.replace(
        one, device=dataclasses.replace(one.device, measured_tflops=measured)
    )
    training, _ = prediction.expected_training(settings_of(tmp_path), Cluster((group,)))
    assert training.dtype == precision
