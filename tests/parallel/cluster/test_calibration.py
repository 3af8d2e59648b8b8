"""Constants that a cluster.yaml carries: read, refused, used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.models.config import preset
from motet.parallel.cluster.calibration import shipped
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Calibration, Cluster, ClusterError, homogeneous
from motet.parallel.cluster.file import from_mapping, read
from motet.parallel.cost.fit import telling
from motet.parallel.cost.predictor import predict
from motet.parallel.cost.terms import Training
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.placement import trimmed

MODEL = preset("1b", 32_768)
TRAINING = Training(64, 2048)
FOUND = Calibration(
    {"matmul": 0.5, "inter": 0.6},
    devices=16,
    runs=("runs/a/attempts/1", "runs/b/attempts/2"),
    median_error=0.02,
    date="2026-11-21",
    versions={"torch": "2.13.0"},
)


def with_calibration(cluster: Cluster, found: Calibration | None) -> Cluster:
    groups = tuple(replace(group, calibration=found) for group in cluster.groups)
    return replace(cluster, groups=groups)


def test_a_calibration_survives_being_written_and_read(tmp_path: Path) -> None:
    cluster = with_calibration(homogeneous("h100", 2), FOUND)
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster.to_yaml())
    assert read(path) == cluster


def test_a_date_that_yaml_reads_as_one_is_a_text() -> None:
    values = homogeneous("h100", 1).to_mapping()
    values["groups"][0]["calibration"] = {"constants": {"matmul": 0.5}, "date": "2026-11-21"}
    (group,) = from_mapping(values).groups
    assert group.calibration is not None
    assert group.calibration.date == "2026-11-21"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"constants": {"matmul": 1.4}}, r"constants\.matmul: 1\.4 is not a number from 0\.1"),
        ({"constants": {"matmul": "much"}}, r"constants\.matmul: 'much' is not a number"),
        ({"constants": {"matmull": 0.4}}, r"constants\.matmull: is none of the constants matmul"),
        ({"constants": {}}, r"constants: \{\} is not a mapping such as"),
        ({"constants": {"matmul": 0.5}, "run": 3}, r"calibration\.run: is not known .did you mean"),
        ({"constants": {"matmul": 0.5}, "runs": "a"}, r"runs: 'a' is not a list"),
        ({"constants": {"matmul": 0.5}, "devices": -1}, r"devices: -1 is not a number"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: Any, told: str) -> None:
    cluster = homogeneous("h100", 1).to_mapping()
    cluster["groups"][0]["calibration"] = values
    with pytest.raises(ClusterError, match=told):
        from_mapping(cluster)


def test_predictions_use_what_the_cluster_carries_unless_constants_are_given() -> None:
    plain, layout = homogeneous("h100", 1), Layout(dp_shard=8)
    carried = predict(MODEL, with_calibration(plain, FOUND), layout, TRAINING)
    given = {"h100": replace(shipped("h100"), matmul=0.5, inter=0.6)}
    assert (
        carried.step_time_s == predict(MODEL, plain, layout, TRAINING, constants=given).step_time_s
    )
    assert carried.step_time_s > predict(MODEL, plain, layout, TRAINING).step_time_s
    other = {"h100": Constants(matmul=0.9)}
    assert (
        predict(MODEL, with_calibration(plain, FOUND), layout, TRAINING, constants=other).parts
        == predict(MODEL, plain, layout, TRAINING, constants=other).parts
    )


def test_devices_without_any_run_are_trusted_more_once_they_are_calibrated() -> None:
    plain, layout = homogeneous("b200", 1), Layout(dp_shard=8)
    before = predict(MODEL, plain, layout, TRAINING)
    after = predict(MODEL, with_calibration(plain, FOUND), layout, TRAINING)
    assert any("no run on b200" in reason for reason in before.trust)
    assert not any("no run on b200" in reason for reason in after.trust)
    widths = [found.interval_s[1] / found.interval_s[0] for found in (before, after)]
    assert widths[1] < widths[0]


def test_a_part_of_the_machines_keeps_their_calibration() -> None:
    part = trimmed(with_calibration(homogeneous("h100", 4), FOUND), [16])
    assert part is not None
    assert part.groups[0].calibration == FOUND


def test_the_constants_that_are_fitted_are_those_that_move_the_runs() -> None:
    def computing(constants: Constants) -> float:
        return 1.0 / constants.matmul + 1e-4 * constants.host_us  # type: ignore[operator]

    def sending(constants: Constants) -> float:
        return 0.2 / constants.matmul + 5.0 / constants.inter  # type: ignore[operator]

    start = replace(Constants(), matmul=0.7)
    assert telling(start, [computing], 1) == ["matmul"]
    assert telling(start, [sending], 2) == ["inter"]  # the rest changes it by less than 1 %
    assert telling(start, [computing, sending], 8) == ["inter", "matmul"]
    assert telling(start, [lambda constants: 3.0], 8) == []
