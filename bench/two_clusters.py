"""Does the planner choose well between two clusters and a slow link? `sudo python
bench/two_clusters.py [--rates 50 200 1000] [--json]`.

Four nodes in network namespaces, two on either side of a link that a token bucket shapes; the ranks
of the second cluster have half the speed of the first one's (`two_clusters_cpu.py`). For each rate
`motet cluster probe` measures the machines as the ranks have them, and the planner searches.
One-rank runs on every node calibrate the cost model (`prediction.calibrate`). Then every layout is
trained by `motet train --nnodes`: the link's rate changes while it runs, and the median wall clock
time of a step is taken at each rate. The first choices and what was nearly the fastest are trained
in two more rounds, in turn; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from two_clusters_cpu import Shares
from two_clusters_plan import (
    CALIBRATED,
    HOSTS,
    NAIVE,
    Asked,
    Row,
    chosen,
    merged,
    predicted_s,
    written,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests have the tools

from motet.core.files import read_json
from motet.launcher.config import run_yaml
from motet.launcher.planning import calibrate, prediction
from motet.models.config import ModelConfig
from motet.parallel.cluster.calibration import shipped
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster, Device
from motet.parallel.cluster.file import read
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.placement import trimmed
from motet.slurm.testbed.bed import Testbed
from tests.system.cluster_runs import NodesRun, layout_words, step_seconds
from tests.system.runs import MOTET, environment, motet

SHARES = {"n1": 0.5, "n2": 0.5, "n3": 0.25, "n4": 0.25}
"""Of one core, for the computing thread of a node's rank: what is left of two cores carries
packets.
"""
WARM_STEPS = 2
LEAST_STEPS = 4
WITHIN, LOSS_WITHIN, LOSS_STEPS = 0.05, 1e-5, 8
NEAR = 1.15
"""Layouts within this factor of the fastest are trained in every round."""
START_S, STEP_S = 180.0, 60.0
PORT = 29_720
RUN_YAML = """
name: r
seed: 3
model: {{preset: 1m}}
data: {{sequence_length: 128, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 24}}
training: {{steps: 20000, precision: fp32, optimizer: {{lr: 1.0e-4}}, schedule: {{kind: constant, warmup_steps: 4}}, max_restarts: 0}}
checkpoint: {{every_steps: 0}}
layout: {{device: cpu, timeout_s: 120}}
"""


@dataclass
class Place:
    """Where everything happens."""

    bed: Testbed
    shares: Shares
    yaml: Path
    port: int = PORT

    def next_port(self) -> int:
        """Return a port that no launch had: one that was just closed may still be taken."""
        self.port += 1
        return self.port

    def start(self, row: Row, name: str, *settings: str) -> NodesRun:
        """Start a run; its ranks have all of their core until `hold`."""
        words = [*layout_words(row.layout), *settings]
        return NodesRun(self.bed, row.nodes, self.yaml, name, self.next_port(), words)

    def hold(self, run: NodesRun) -> None:
        """Slow the ranks of a run down to their nodes' shares."""
        for node, process in zip(run.nodes, run.processes, strict=True):
            self.shares.hold(node, process.pid)

    def stop(self, run: NodesRun) -> list[dict[str, Any]]:
        """Let a run end at full speed; returns the rows of all steps."""
        for process in run.processes:
            self.shares.free(process.pid)
        return run.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[50.0, 200.0, 1000.0])
    parser.add_argument("--steps", type=int, default=8, help="measured at each rate, or 4 if slow")
    parser.add_argument("--seconds", type=float, default=8.0, help="after which 4 steps are enough")
    parser.add_argument("--rounds", type=int, default=3, help="for what is nearly the fastest")
    parser.add_argument("--top", type=int, default=2, help="choices of the planner trained")
    parser.add_argument("--only", default="", help="written layouts whose name holds this text")
    parser.add_argument("--folder", default="/var/lib/motet-two-clusters", help="of the testbed")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bed = Testbed(Path(options.folder))
    bed.start(max(options.rates))
    try:
        with tempfile.TemporaryDirectory() as made, Shares(bed.names.tag, SHARES) as shares:
            place = Place(bed, shares, _yaml(options.keep or Path(made)))
            found = measured(place, options)
    finally:
        bed.stop()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0 if all(one["ok"] for one in found["rates"]) else 1


def _yaml(folder: Path) -> Path:
    """Write run.yaml and a corpus of the Python standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus"
    if not corpus.exists():
        library = Path(sysconfig.get_path("stdlib"))
        inputs = [str(library / name) for name in ("email", "json", "asyncio", "unittest")]
        command = ("data", "prepare", *inputs, "--output", str(corpus), "--vocabulary-size", "1024")
        done = motet(*command)
        if done.returncode:
            raise SystemExit(done.stderr)
    path = folder / "run.yaml"
    path.write_text(RUN_YAML.format(corpus=corpus))
    return path


def measured(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Probe, calibrate, search and train everything; returns what is printed."""
    say(f"probing at {', '.join(f'{rate:g}' for rate in options.rates)} Mbit/s")
    clusters = undisturbed({rate: probed(place, rate) for rate in options.rates})
    constants, asked, fit = calibrated(place, clusters[options.rates[0]])
    say(fit)
    rows = [row for row in written() if options.only in row.name or row.name == NAIVE]
    firsts = {}
    for rate, cluster in clusters.items():
        best = chosen(asked, cluster, constants, options.top)
        firsts[rate] = best[0]
        say(f"{rate:g} Mbit/s: the planner chooses {best[0].name} on {', '.join(best[0].nodes)}")
        rows = merged(rows, best)
    tries: dict[Any, list[dict[float, float]]] = {row.key(): [] for row in rows}
    losses: dict[Any, list[float]] = {}
    for turn in range(options.rounds):
        again = rows if not turn else contenders(rows, firsts, tries)
        for number, row in enumerate(again, 1):
            name = f"layout-{turn}-{number}"
            seconds, losses[row.key()] = trained(place, row, name, options)
            tries[row.key()].append(seconds)
            shown = ", ".join(f"{value:.3f}" for value in seconds.values())
            say(f"round {turn + 1}, {number} of {len(again)}: {row.name}: {shown} s")
    times = {key: medians(found) for key, found in tries.items()}
    naive = next(row for row in rows if row.name == NAIVE)
    off = max(difference(one, losses[naive.key()]) for one in losses.values())
    tables = []
    for rate, cluster in clusters.items():
        table = [
            {
                "layout": row.name,
                "nodes": row.nodes,
                "sheet_s": predicted_s(row, asked, cluster, None),
                "predicted_s": predicted_s(row, asked, cluster, constants),
                "measured_s": times[row.key()][rate],
                "rounds_s": [one[rate] for one in tries[row.key()]],
                "first_choice": row.key() == firsts[rate].key(),
            }
            for row in rows
        ]
        tables.append(judged(rate, table, off))
    shown = {f"{rate:g}": cluster.to_mapping() for rate, cluster in clusters.items()}
    return {"rates": tables, "calibration": fit, "clusters": shown, "loss_difference": off}


def contenders(
    rows: Sequence[Row], firsts: Mapping[float, Row], tries: Mapping[Any, list[dict[float, float]]]
) -> list[Row]:
    """Return the first choices, and what was nearly the fastest at some rate: the machine's own
    speed wanders by a tenth within minutes.
    """
    times = {key: medians(found) for key, found in tries.items()}
    fastest = {rate: min(one[rate] for one in times.values()) for rate in firsts}
    chosen_ones = {row.key() for row in firsts.values()}
    return [
        row
        for row in rows
        if row.key() in chosen_ones
        or any(times[row.key()][rate] < NEAR * best_s for rate, best_s in fastest.items())
    ]


def medians(tries: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """Return the median of several rounds at every rate."""
    return {rate: statistics.median(one[rate] for one in tries) for rate in tries[0]}


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def probed(place: Place, rate_mbit: float) -> Cluster:
    """Return the machines as `motet cluster probe` finds them while every rank is held to its
    share.
    """
    place.bed.set_rate(rate_mbit)
    output = place.yaml.parent / f"cluster-{rate_mbit:g}.yaml"
    words = [*MOTET, "cluster", "probe", "--device", "cpu", "--force", "--output", str(output)]
    words += ["--groups", *(f"{name}:{','.join(hosts)}" for name, hosts in HOSTS.items())]
    words += ["--nnodes", str(len(SHARES)), "--endpoint", f"n1:{place.next_port()}"]
    running = [
        subprocess.Popen(
            [*place.bed.enter(node), *words, "--node-rank", str(rank)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank, node in enumerate(SHARES)
    ]
    told = []
    first = running[0].stderr
    assert first is not None
    try:
        for line in first:
            told.append(line)
            if "found each other" in line:
                for node, process in zip(SHARES, running, strict=True):
                    place.shares.hold(node, process.pid)
        codes = [process.wait(START_S) for process in running]
    finally:
        for process in running:
            process.terminate()
            process.wait()
    if any(codes):
        raise RuntimeError(f"the probe ended with {codes}: {''.join(told)}")
    return read(output)


def undisturbed(clusters: Mapping[float, Cluster]) -> dict[float, Cluster]:
    """Return the clusters with the fastest of all probes' devices: what else the machine does can
    slow a probe down, not speed it up.
    """
    best = [
        max((cluster.groups[g].device for cluster in clusters.values()), key=_fp32)
        for g in range(len(HOSTS))
    ]
    return {
        rate: replace(
            cluster,
            groups=tuple(
                replace(group, device=device)
                for group, device in zip(cluster.groups, best, strict=True)
            ),
        )
        for rate, cluster in clusters.items()
    }


def _fp32(device: Device) -> float:
    return device.measured_tflops["fp32"]


def calibrated(place: Place, cluster: Cluster) -> tuple[Mapping[str, Constants], Asked, str]:
    """Train one rank on every node for a few steps; returns constants, what is trained, and how
    well they fit.
    """
    ends = {"a": trimmed(cluster, (1, 0)), "b": trimmed(cluster, (0, 1))}
    started: list[NodesRun] = []
    try:
        for group, hosts in HOSTS.items():
            path = place.yaml.parent / f"one-{group}.yaml"
            path.write_text(ends[group].to_yaml())
            for node, micro in zip(hosts, CALIBRATED, strict=True):
                row = Row(f"one-{node}", Layout(micro_sequences=micro), ())
                words = [*layout_words(row.layout), f"layout.cluster={path}"]
                started.append(NodesRun(place.bed, (node,), place.yaml, row.name, 0, words))
        for run in started:
            run.wait(1, START_S)
        for run in started:
            place.hold(run)
        reached = [run.steps()[-1]["step"] for run in started]
        for run, step in zip(started, reached, strict=True):
            run.wait(step + prediction.WARM_UP_STEPS + 6, STEP_S)
        for run in started:
            place.stop(run)
    finally:
        for run in started:
            run.__exit__()
    known = calibrate.compared([run.root for run in started])
    found = {kind: calibrate.fitted(kind, several) for kind, several in known.items()}
    constants = {kind: replace(shipped(kind), **one.constants) for kind, one in found.items()}
    text = "; ".join(calibrate.said(kind, one) for kind, one in found.items())
    settings = run_yaml.load(place.yaml, [f"runs={place.yaml.parent}"])
    training, traits = prediction.training_of(settings, settings.batch.sequences, "fp32")
    model = ModelConfig(**read_json(started[0].root / "manifest.json")["model"])
    return constants, Asked(model, training, traits), text


def trained(
    place: Place, row: Row, name: str, options: argparse.Namespace
) -> tuple[dict[float, float], list[float]]:
    """Train a layout; returns the median seconds of a step at every rate, and the losses of the
    first steps.
    """
    times = {}
    place.bed.set_rate(max(options.rates))  # to start quickly
    with place.start(row, name) as run:
        run.wait(1, START_S)
        place.hold(run)
        for rate in options.rates:
            place.bed.set_rate(rate)
            began, first = time.monotonic(), run.steps()[-1]["step"] + WARM_STEPS
            found = run.wait(first + LEAST_STEPS, STEP_S)
            while (
                time.monotonic() - began < options.seconds
                and found[-1]["step"] < first + options.steps
            ):
                found = run.wait(found[-1]["step"] + 1, STEP_S)
            times[rate] = step_seconds(found, first)
        place.bed.set_rate(max(options.rates))
        rows = place.stop(run)
    return times, [one["loss"] for one in rows[:LOSS_STEPS]]


def difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))


def judged(rate: float, table: list[dict[str, Any]], off: float) -> dict[str, Any]:
    """Return a table with the place of every row and what the first choice is worth."""
    table.sort(key=lambda row: row["measured_s"])
    by_prediction = sorted(table, key=lambda row: row["predicted_s"])
    for place, row in enumerate(table, 1):
        row |= {"place": place, "predicted_place": by_prediction.index(row) + 1}
    first = next(row for row in table if row["first_choice"])
    naive = next(row for row in table if row["layout"] == NAIVE)
    behind = first["measured_s"] / table[0]["measured_s"] - 1
    return {
        "rate_mbit": rate,
        "layouts": len(table),
        "first_choice": first["layout"],
        "place": first["place"],
        "behind_fastest": behind,
        "over_naive": naive["measured_s"] / first["measured_s"],
        "rank_correlation": correlation(table),
        "ok": behind <= WITHIN and off <= LOSS_WITHIN,
        "rows": table,
    }


def correlation(table: Sequence[Mapping[str, Any]]) -> float:
    """Return Spearman's rank correlation between predicted and measured seconds."""
    from scipy.stats import spearmanr

    pairs = [(row["predicted_s"], row["measured_s"]) for row in table]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def show(found: Mapping[str, Any]) -> None:
    """Print the tables."""
    print(f"losses of all layouts differ by at most {found['loss_difference']:.1e} (relative)")
    for one in found["rates"]:
        print(
            f"\n{one['rate_mbit']:g} Mbit/s: {one['layouts']} layouts; first choice: "
            f"{one['first_choice']}"
        )
        print(
            f"place {one['place']}, {one['behind_fastest']:+.1%} behind the fastest; "
            f"{one['over_naive']:.2f} times as fast as {NAIVE}; "
            f"rank correlation {one['rank_correlation']:.2f}\n"
        )
        print("| place | layout | measured s | predicted s | uncalibrated s | predicted place |")
        print("|---|---|---|---|---|---|")
        for row in one["rows"]:
            mark = "**" if row["first_choice"] else ""
            print(
                f"| {row['place']} | {mark}{row['layout']}{mark} | {row['measured_s']:.3f} | "
                f"{row['predicted_s']:.3f} | "
                f"{row['sheet_s']:.3f} | {row['predicted_place']} |"
            )


if __name__ == "__main__":
    sys.exit(main())
