"""Predicted against measured: what the cost model says of a run's layout, and what the run took.

No torch.

Every attempt leaves `attempts/N/prediction.json` when it starts; what it took is in
`metrics.jsonl`. `history` lists both, and `calibrate.py` fits constants to them. Measured are the
median seconds of a step (data and training; no probes, no checkpoints) and rank 0's peak memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import read_json, write_json
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.metrics import Row, read_metrics, rows_of
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig
from motet.parallel.cluster.description import Cluster, Device
from motet.parallel.cluster.file import from_mapping
from motet.parallel.cluster.this_machine import multiplies_bf16, node_of, read_cluster
from motet.parallel.cost.stages import predict
from motet.parallel.cost.terms import NATIVE, Prediction, Training, Traits
from motet.parallel.layout.layout import Layout

FILE = "prediction.json"
WARM_UP_STEPS = 3
"""Left out: they compile, allocate and fill caches."""
LEAST_STEPS = 3
VALUE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
FAST_BF16 = 1.2
"""Cores whose measured products are faster in bf16 by this factor multiply it in hardware."""
ON_CORES: dict[str, Any] = {"data_overlap": 0.0, "send_overlap": 0.5, "ahead": False}
"""On CPUs FSDP2 waits for each of its collectives; gloo's threads send, and with 1F1B two stages
wait for one of two sends (`bench/two_clusters.py`); nothing is started ahead."""


def training_of(
    settings: RunSettings, sequences: int, precision: str, on_cores: bool | None = None
) -> tuple[Training, Traits]:
    """Return a step and a backend as the cost model knows them.

    Args:
        sequences: of the step.
        precision: "bf16" or "fp32".
        on_cores: it trains on CPUs; None: if `layout.device` says so.
    """
    layout = settings.layout
    sharded = layout.engine == "deepspeed"
    training = Training(
        sequences,
        settings.data.sequence_length,
        dtype=precision,
        zero_stage=layout.zero_stage if sharded else None,
        offload=sharded and layout.offload != "none",
        teacher=keeps_teacher(settings),
    )
    traits = dataclasses.replace(
        NATIVE,
        compute_bytes=VALUE_BYTES[precision],
        fused_elementwise=settings.training.compile,
    )
    if on_cores or (on_cores is None and layout.device == "cpu"):
        traits = dataclasses.replace(traits, **ON_CORES)
    return training, traits


def keeps_teacher(settings: RunSettings) -> bool:
    """Return whether a nested family keeps a second set of the weights; a class of the user's own
    is not asked.
    """
    family = settings.family
    return family.kind == "nested" and family.options.get("teacher", "largest") != "largest"


def expected_training(settings: RunSettings, cluster: Cluster) -> tuple[Training, Traits]:
    """Return `training_of` as a run on these machines will be, before it has begun; `auto` is bf16
    where every device is fast at it.
    """
    on_cores = all(group.device.kind == "cpu" for group in cluster.groups)
    precision = settings.training.precision
    if precision == "auto":
        fast = all(_multiplies_bf16(group.device) for group in cluster.groups)
        precision = "bf16" if fast else "fp32"
    return training_of(settings, settings.batch.sequences, precision, on_cores=on_cores)


def _multiplies_bf16(device: Device) -> bool:
    """Return whether a device is fast at bf16; cores that were not measured are taken for this
    machine's.
    """
    if device.kind != "cpu":
        return "bf16" in device.peak_tflops
    rates = device.measured_tflops
    if "bf16" in rates and "fp32" in rates:
        return rates["bf16"] > FAST_BF16 * rates["fp32"]
    return multiplies_bf16()


def cluster_for(settings: RunSettings, nodes: int, gpu: tuple[str, float] | None = None) -> Cluster:
    """Return the machines that a run trains on: those of `layout.cluster`, else this one, by data
    sheets.

    Args:
        gpu: name and GiB of the GPUs that it trains on; None: on cores.

    Raises:
        UserError: several machines, and no description of them; or a description that cannot be
            read.
    """
    if settings.layout.cluster:
        return read_cluster(settings.layout.cluster)
    if nodes > 1:
        raise UserError(
            f"{nodes} machines, and nothing says what joins them; measure it (srun motet cluster "
            "probe) and set "
            "layout.cluster: cluster.yaml"
        )
    return node_of(settings.layout.processes, gpu)


def record(
    run: RunDir,
    attempt: int,
    settings: RunSettings,
    layout: Layout,
    *,
    sequences: int,
    precision: str,
    nodes: int,
    gpu: tuple[str, float] | None = None,
) -> None:
    """Write down what is predicted of an attempt that starts, or why nothing can be.

    Never raises: a run needs no prediction.

    Args:
        sequences: of its first step.
        nodes, gpu: see `cluster_for`.
    """
    try:
        model = ModelConfig(**read_json(run.manifest)["model"])
        cluster = cluster_for(settings, nodes, gpu)
        training, traits = training_of(settings, sequences, precision, on_cores=gpu is None)
        found = predict(model, cluster, layout, training, traits)
        facts: dict[str, Any] = _plain(found, seen=1.0 if gpu is None else 0.0)
        facts |= {"cluster": cluster.to_mapping()}
        for name, value in (
            ("model", model),
            ("layout", layout),
            ("training", training),
            ("traits", traits),
        ):
            facts[name] = dataclasses.asdict(value)
    except Exception as error:
        facts = {"problem": f"{error}" or type(error).__name__}
    with contextlib.suppress(OSError, ValueError):
        write_json(run.attempt(attempt) / FILE, {"version": 1, "attempt": attempt, **facts})


def _plain(found: Prediction, seen: float) -> dict[str, Any]:
    """A prediction as plain values; `seen`: the share of what contexts and libraries take that the
    meter of a run sees.

    A GPU's allocator sees none of it, and a process on a CPU is measured whole.
    """
    unseen_gib = (1.0 - seen) * found.memory_parts.get("reserved", 0.0)
    return {
        "predicted": {
            "step_time_s": found.step_time_s,
            "interval_s": list(found.interval_s),
            "memory_gib": found.memory_gib - unseen_gib,
            "parts": dict(found.parts),
            "trust": list(found.trust),
        }
    }


def measure(
    rows: Sequence[Row], attempt: Mapping[str, Any], until_step: int | None = None
) -> dict[str, Any]:
    """Return steps, median seconds and peak memory of an attempt.

    Args:
        rows: of metrics.jsonl.
        attempt: its attempt.json.
        until_step: where the batch grows; None: it does not.

    Raises:
        UserError: too few steps.
    """
    ends = [step for step in (attempt.get("end_step"), until_step) if step is not None]
    first, last = attempt.get("start_step") or 0, min(ends, default=math.inf)
    steps = [row for row in rows_of(rows, "step") if first < row["step"] <= last]
    warm = [row for row in steps if row.get("seconds")][WARM_UP_STEPS:]
    if len(warm) < LEAST_STEPS:
        least = LEAST_STEPS + WARM_UP_STEPS
        raise UserError(f"it has {len(steps)} steps of one size; {least} tell how long one takes")
    data = [row["seconds"].get("data", 0.0) for row in warm]
    seconds = [row["seconds"]["train"] + waited for row, waited in zip(warm, data, strict=True)]
    return {
        "steps": len(warm),
        "step_time_s": statistics.median(seconds),
        "data_s": statistics.median(data),
        "memory_gib": max(row.get("memory_mib") or 0.0 for row in warm) / 1024,
    }


def records(run: RunDir) -> list[dict[str, Any]]:
    """Return for every attempt, in order, what was predicted and, where it has steps enough,
    measured; else `problem` says why not.
    """
    out = []
    rows = read_metrics(run.metrics)
    for number in range(1, run.latest_attempt() + 1):
        path = run.attempt(number) / FILE
        if not path.exists():
            continue
        try:
            found = read_json(path)
            if "predicted" in found:
                facts = read_json(run.attempt(number) / "attempt.json")
                found["measured"] = measure(rows, facts, _grows(run, facts))
                found |= {
                    "folder": str(run.attempt(number)),
                    "versions": facts.get("versions") or {},
                }
        except UserError as error:
            found = {"attempt": number, "problem": str(error)}
        out.append(found)
    return out


def _grows(run: RunDir, attempt: Mapping[str, Any]) -> int | None:
    """The first step after the start of an attempt at which the batch changes."""
    config = read_json(run.manifest).get("config") or {}
    ramp = (config.get("batch") or {}).get("ramp") or []
    start = attempt.get("start_step") or 0
    return min((stage["step"] for stage in ramp if stage["step"] > start), default=None)


def newest(run: RunDir) -> dict[str, Any] | None:
    """Return the last attempt of a run that was predicted and measured; None where none was."""
    return next((one for one in reversed(records(run)) if "measured" in one), None)


def sentence(found: Mapping[str, Any]) -> str:
    """A comparison in one line."""
    predicted, measured = found["predicted"], found["measured"]
    low, high = predicted["interval_s"]
    inside = low <= measured["step_time_s"] <= high
    return (
        f"step {measured['step_time_s']:.3g} s measured, {predicted['step_time_s']:.3g} s "
        "predicted "
        f"({low:.3g} to {high:.3g}{'' if inside else ', missed'}); memory "
        f"{measured['memory_gib']:.3g} GiB measured, "
        f"{predicted['memory_gib']:.3g} GiB predicted"
    )


def cluster_of_run(run: RunDir) -> Cluster:
    """Return the machines that a run was trained on, as its newest attempt has them.

    Raises:
        UserError: no attempt wrote them down.
    """
    for number in range(run.latest_attempt(), 0, -1):
        path = run.attempt(number) / FILE
        found = read_json(path) if path.exists() else {}
        if "cluster" in found:
            return from_mapping(found["cluster"])
        if "problem" in found:
            raise UserError(f"{path}: {found['problem']}")
    raise UserError(f"{run.root}: no attempt wrote down its machines; it does when it starts")


def history(runs: Path) -> list[dict[str, Any]]:
    """Return a row for every attempt of the runs in a folder (or of the one run that it is), oldest
    first.

    Keys: run, attempt, devices, layout, predicted_s, measured_s, error (predicted / measured - 1),
    inside (the interval), predicted_gib, measured_gib, problem (why there is no comparison, else
    None).
    """
    return [_row(run, one) for run in runs_in(runs) for one in records(run)]


def runs_in(folder: Path) -> list[RunDir]:
    """Return the runs in a folder, or the one that it is, oldest first."""
    found = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder} does not exist; give a folder of runs, such as runs")
    made = [RunDir(path) for path in found if path.is_dir()]
    runs = [run for run in made if run.resolved_yaml.exists()]
    return sorted(runs, key=lambda run: run.resolved_yaml.stat().st_mtime)


def _row(run: RunDir, found: Mapping[str, Any]) -> dict[str, Any]:
    row = {"run": run.name, "attempt": found.get("attempt"), "problem": found.get("problem")}
    if "measured" not in found:
        return row
    predicted, measured = found["predicted"], found["measured"]
    low, high = predicted["interval_s"]
    groups = [
        f"{g['nodes']} x {g['devices_per_node']} {g['device']['kind']}"
        for g in found["cluster"]["groups"]
    ]
    layout = found["layout"]
    degrees = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
    return row | {
        "devices": ", ".join(groups),
        "layout": " ".join(f"{n}={layout[n]}" for n in degrees if layout[n] > 1) or "one rank",
        "predicted_s": predicted["step_time_s"],
        "measured_s": measured["step_time_s"],
        "error": predicted["step_time_s"] / measured["step_time_s"] - 1,
        "inside": low <= measured["step_time_s"] <= high,
        "predicted_gib": predicted["memory_gib"],
        "measured_gib": measured["memory_gib"],
    }
