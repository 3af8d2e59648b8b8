"""Constants of the cost model, fitted to runs and written into the description of their machines.

No torch.

`motet plan --calibrate RUNS` and `motet plan --probe` end here: predicted and measured attempts in,
a cluster.yaml out whose groups carry a `calibration` that everything which reads it uses.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.launcher.planning.prediction import records, runs_in
from motet.models.config import ModelConfig
from motet.parallel.cluster.calibration import shipped
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Calibration, Cluster, Device
from motet.parallel.cluster.file import from_mapping
from motet.parallel.cost.stages import predict
from motet.parallel.cost.terms import Training, Traits
from motet.parallel.layout.layout import Layout

CORE_HOST_US = 1500.0
"""Where the fit of `host_us` starts for CPUs: what half a core took to start the kernels of a
block's forward pass.
"""
MARK = "# Calibrated: "
UNLIKE = 0.15
"""A fit whose median error is larger does not describe its runs."""
RunRecord = Mapping[str, Any]


def compared(runs: Sequence[Path]) -> dict[str, list[RunRecord]]:
    """Return the attempts that were predicted and measured on one kind of device, by that kind,
    oldest run first.

    Args:
        runs: folders of runs, or of single ones.

    Raises:
        UserError: there is none.
    """
    known: dict[str, list[RunRecord]] = {}
    for found in (one for path in runs for run in runs_in(path) for one in records(run)):
        kinds = {group["device"]["kind"] for group in found.get("cluster", {}).get("groups", ())}
        if "measured" in found and len(kinds) == 1:
            known.setdefault(kinds.pop(), []).append(found)
    if not known:
        shown = ", ".join(map(str, runs))
        raise UserError(
            f"{shown}: no attempt on one kind of device was predicted and measured; train first"
        )
    return known


def fitted(kind: str, several: Sequence[RunRecord]) -> Calibration:
    """Return what attempts on a kind of device say of its constants: one constant for every two
    attempts, at least one.
    """
    from motet.parallel.cost.fit import UNSURE, UNSURE_MATMUL, fit, telling

    usual = shipped(kind)
    start = usual
    if not several[0]["traits"].get("ahead", True):
        start = dataclasses.replace(start, host_us=CORE_HOST_US)
    predictors = [_predictor(kind, run) for run in several]
    unsure = dict(UNSURE)
    if not usual.most_devices:
        unsure["matmul"] = UNSURE_MATMUL
    valued = dataclasses.replace(start, matmul=start.matmul or _reached(several[0]))
    names = telling(valued, predictors, max(1, len(several) // 2), unsure) or ["matmul"]
    start = valued if "matmul" in names else start
    found = fit(names, start, predictors, [run["measured"]["step_time_s"] for run in several])
    values = vars(found.constants)
    return Calibration(
        {n: float(f"{v:.4g}") for n, v in values.items() if v != getattr(usual, n) or n in names},
        max(_devices(run) for run in several),
        tuple(str(run["folder"]) for run in several),
        float(f"{found.median_error:.2g}"),
        found.at_bounds,
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        several[-1].get("versions") or {},
    )


def _reached(found: RunRecord) -> float:
    """Return the share of its peak that the device of a run reaches in large products: measured, or
    by its description.
    """
    device = Device(**found["cluster"]["groups"][0]["device"])
    dtype = found["training"]["dtype"]
    if dtype in device.measured_tflops:
        return device.measured_tflops[dtype] / device.peak(dtype)
    return device.matmul_efficiency


def _devices(found: RunRecord) -> int:
    return Layout(**_tuples(found["layout"])).world_size


def _predictor(kind: str, found: RunRecord) -> Any:
    """Return a function from constants to the predicted seconds of a recorded step."""
    model = ModelConfig(**_tuples(found["model"]))
    cluster, layout = from_mapping(found["cluster"]), Layout(**_tuples(found["layout"]))
    training = Training(**{**found["training"], "data_s": found["measured"].get("data_s", 0.0)})
    traits = Traits(**found["traits"])

    def step_time_s(constants: Constants) -> float:
        return predict(model, cluster, layout, training, traits, {kind: constants}).step_time_s

    return step_time_s


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of JSON as the tuples that they were."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


# --- into the description of machines


def with_calibrations(cluster: Cluster, found: Mapping[str, Calibration]) -> Cluster:
    """Return a cluster whose groups of these kinds of devices carry what was fitted."""
    groups = tuple(
        dataclasses.replace(group, calibration=found.get(group.device.kind, group.calibration))
        for group in cluster.groups
    )
    return dataclasses.replace(cluster, groups=groups)


def calibrate(runs: Sequence[Path], cluster: Cluster | None = None) -> tuple[Cluster, list[str]]:
    """Fit constants of every kind of device to runs; return machines that carry them, and what to
    say of each fit.

    Args:
        runs: see `compared`.
        cluster: the machines; None: those of the last attempt that was compared.

    Raises:
        UserError: no attempt can be compared, or none was on devices of this cluster.
    """
    known = compared(runs)
    machines = cluster or from_mapping([*known.values()][-1][-1]["cluster"])
    kinds = {group.device.kind for group in machines.groups}
    there = {kind: several for kind, several in known.items() if kind in kinds}
    if not there:
        raise UserError(
            f"the runs were on {', '.join(sorted(known))}, the cluster has "
            f"{', '.join(sorted(kinds))}: nothing to calibrate"
        )
    found = {kind: fitted(kind, several) for kind, several in there.items()}
    return with_calibrations(machines, found), [said(kind, one) for kind, one in found.items()]


def said(kind: str, found: Calibration) -> str:
    """Return one sentence on a fit."""
    shown = ", ".join(f"{name} {value:g}" for name, value in found.constants.items())
    attempts = f"{len(found.runs)} attempt{'s' if len(found.runs) > 1 else ''}"
    text = f"{kind}: {attempts}, median error {found.median_error:.1%}; {shown}"
    return "; ".join([text, *doubts(found)])


def doubts(found: Calibration) -> list[str]:
    """Return why a fit is not to be trusted; [] where it ended inside its bounds and the runs
    agree.
    """
    out = []
    if found.at_bounds:
        out.append(
            f"{', '.join(found.at_bounds)} at a physical bound: the machines are not as described; "
            "measure them (motet cluster probe) and fit again"
        )
    if found.median_error > UNLIKE:
        out.append(
            f"the constants miss half of the runs by {found.median_error:.0%} or more: other work "
            "on the machines, or runs of unlike kinds"
        )
    return out


def text_of(cluster: Cluster, sentences: Sequence[str], before: str = "") -> str:
    """Return the text of a calibrated cluster.yaml; comments at the top of the file that it comes
    from (`before`) stay.
    """
    head = []
    for line in before.splitlines():
        if not line.startswith("#"):
            break
        head += [] if line.startswith(MARK) else [line]
    return "\n".join([*head, *(f"{MARK}{one}" for one in sentences), cluster.to_yaml()])
