"""The planner's order of layouts against layouts that really trained, over a slow link between two
clusters.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motet.core.files import read_json
from motet.launcher.config import run_yaml
from motet.launcher.planning.prediction import training_of
from motet.models.config import ModelConfig
from motet.parallel.cluster.description import Cluster, Group, Link
from motet.parallel.cluster.this_machine import cpu
from motet.parallel.cost.predictor import Predictor
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.question import PlanQuestion
from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import healed, testbed
from tests.system.cluster_runs import NodesRun, layout_words, step_seconds

__all__ = ["healed", "testbed"]
pytestmark = pytest.mark.xdist_group("testbed")
RATE_MBIT = 50.0
SEQUENCES, LENGTH = 8, 64
START_S, STEPS_S = 120.0, 60.0
PORT = 29_760
RUN_YAML = """
name: r
seed: 3
model: {{preset: 1m}}
data: {{sequence_length: {length}, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: {sequences}}}
training: {{steps: 20000, precision: fp32, optimizer: {{lr: 1.0e-4}}, schedule: {{kind: constant, warmup_steps: 4}}, max_restarts: 0}}
checkpoint: {{every_steps: 0}}
layout: {{device: cpu, timeout_s: 60}}
"""
LAYOUTS = {
    "naive": Layout(dp_replicate=4, micro_sequences=2),
    "hybrid": Layout(dp_replicate=2, dp_shard=2, micro_sequences=2),
    "pipeline": Layout(pp=2, dp_replicate=2, stage_layers=(2, 2), micro_sequences=2),
}


def two_clusters() -> Cluster:
    """The testbed at this rate; cores and links inside a cluster as on any machine."""
    device, memory = cpu(0.5, 8.0), Link(20.0, 20.0, "memory")
    inside = Link(0.5, 100.0, "ethernet", measured=True)
    groups = tuple(Group(name, device, 2, 1, memory, inside) for name in "ab")
    return Cluster(groups, {("a", "b"): Link(RATE_MBIT / 8e3, 300.0, "ethernet", measured=True)})


def trained(bed: Testbed, yaml: Path, name: str, port: int) -> tuple[float, list[float], Path]:
    """Train a layout on all nodes; returns seconds of a step, the first losses, and the run."""
    bed.set_rate(1000.0)  # to start quickly
    words = layout_words(LAYOUTS[name])
    with NodesRun(bed, bed.nodes, yaml, name, port, words) as run:
        first = run.wait(1, START_S)[-1]["step"]
        bed.set_rate(RATE_MBIT)
        found = run.wait(first + 6, STEPS_S)
        bed.set_rate(1000.0)
        rows = run.stop()
    return step_seconds(found, first + 2), [row["loss"] for row in rows[:6]], run.root


@pytest.mark.long  # two minutes; bench/two_clusters.py has the numbers
def test_the_planner_and_the_clock_agree_that_stages_not_gradients_cross_a_slow_link(
    healed: Testbed, corpus: Path, tmp_path: Path
) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(RUN_YAML.format(corpus=corpus, sequences=SEQUENCES, length=LENGTH))
    measured_s, losses = {}, {}
    for number, name in enumerate(LAYOUTS):
        measured_s[name], losses[name], root = trained(healed, yaml, name, PORT + number)
    np.testing.assert_allclose(losses["pipeline"], losses["naive"], rtol=1e-5)
    np.testing.assert_allclose(losses["hybrid"], losses["naive"], rtol=1e-5)

    model = ModelConfig(**read_json(root / "manifest.json")["model"])
    training, traits = training_of(run_yaml.load(yaml), SEQUENCES, "fp32")
    predictor = Predictor(model, two_clusters(), training, traits)
    predicted_s = {n: predictor.predict(layout).step_time_s for n, layout in LAYOUTS.items()}
    told = f"measured {measured_s}, predicted {predicted_s}"
    assert predicted_s["naive"] > 3 * predicted_s["pipeline"], told
    assert measured_s["naive"] > 2 * measured_s["pipeline"], told
    assert measured_s["hybrid"] > 2 * measured_s["pipeline"], told

    question = PlanQuestion(model, two_clusters(), training, traits=traits)
    assert plan(question).best.spread.across == "pipeline"
