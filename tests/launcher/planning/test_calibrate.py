"""Constants fitted to runs, and the file that carries them to plans, runs and forecasts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.launcher.cli import main
from motet.launcher.jobs import forecast
from motet.launcher.planning import calibrate, prediction
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Calibration, Cluster, homogeneous
from motet.parallel.cluster.file import read
from motet.parallel.cost.stages import predict
from motet.slurm.config import JobComponent
from tests.launcher.planning.test_prediction import made_run, model_of, settings_of

TRUTH = Constants(matmul=0.41)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs on eight H100 whose products reach less than the catalogue says."""
    (tmp_path / "machines.yaml").write_text("# ours\n" + homogeneous("h100", 1).to_yaml())
    for number, sequences in enumerate((32, 64, 128)):
        settings = settings_of(tmp_path, f"r{number}", sequences)
        training, traits = prediction.training_of(settings, sequences, "bf16")
        took = predict(
            model_of(),
            homogeneous("h100", 1),
            settings.layout_for(8),
            training,
            traits,
            {"h100": TRUTH},
        )
        # what the run spends on waiting for data is no part of what is fitted
        made_run(tmp_path, settings, [took.step_time_s / 0.9] * 10)
    return tmp_path / "runs"


def calibration_of(cluster: Cluster) -> Calibration:
    found = cluster.groups[0].calibration
    assert found is not None
    return found


def test_the_file_holds_the_constants_that_made_the_measurements_and_what_they_come_from(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--calibrate", str(runs)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    path = runs.parent / "calibrated.yaml"
    cluster = str(runs.parent / "machines.yaml")
    assert main([*words, "--cluster", cluster, "--output", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    text = path.read_text()
    assert text.startswith("# ours\n# Calibrated: h100: 3 attempts, median error ")
    (group,) = read(path).groups
    found = group.calibration
    assert found is not None
    assert found.constants["matmul"] == pytest.approx(0.41, rel=0.1)
    assert (found.devices, len(found.runs)) == (8, 3)
    assert found.runs[0].endswith("r0/attempts/1")
    assert printed.endswith(text.removeprefix("# ours\n"))
    again = [*words, "--cluster", cluster, "--output", str(path)]
    assert main(again) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert main([*again, "--force"]) == 0
    assert path.read_text() == text


def test_plans_runs_and_forecasts_use_the_file(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.parent
    plain = folder / "machines.yaml"
    cluster, _ = calibrate.calibrate([runs], read(plain))
    settings = settings_of(folder, "again")
    groups = [JobComponent(nodes=1, processes=8, cpus=8, gpus=8)]
    before = forecast.forecast(settings, model_of(), 8, groups, None, "slurm")
    plan = ["plan", str(folder / "again.yaml"), "--cluster", str(plain), "--top", "1", "--json"]
    assert main(plan) == 0
    planned = json.loads(capsys.readouterr().out)["layouts"][0]["step_time_s"]
    plain.write_text(cluster.to_yaml())
    assert main(plan) == 0
    assert json.loads(capsys.readouterr().out)["layouts"][0]["step_time_s"] > 1.1 * planned
    run = made_run(folder, settings, [1.0] * 10)
    row = prediction.history(run.root)[0]
    training, traits = prediction.training_of(settings, 64, "bf16")
    layout = settings.layout_for(8)
    expected = predict(model_of(), cluster, layout, training, traits).step_time_s
    assert row["predicted_s"] == pytest.approx(expected)
    assert before != forecast.forecast(settings, model_of(), 8, groups, None, "slurm")


def test_a_second_fit_does_not_start_from_the_first(runs: Path) -> None:
    once, _ = calibrate.calibrate([runs])
    twice, _ = calibrate.calibrate([runs], once)
    assert calibration_of(twice) == calibration_of(once)


def test_runs_on_other_devices_calibrate_nothing(runs: Path) -> None:
    with pytest.raises(UserError, match="the runs were on h100, the cluster has t4"):
        calibrate.calibrate([runs], homogeneous("t4", 1))


def test_a_fit_at_a_bound_or_of_runs_that_disagree_says_so() -> None:
    sound = Calibration({"matmul": 0.5}, runs=("a",), median_error=0.02)
    assert calibrate.doubts(sound) == []
    odd = Calibration({"matmul": 0.95}, runs=("a",), median_error=0.4, at_bounds=("matmul",))
    first, second = calibrate.doubts(odd)
    assert "matmul at a physical bound" in first
    assert "by 40% or more" in second
