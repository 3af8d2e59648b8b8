"""`motet demo`: corpus, training and report in one command. The run is an ordinary run.yaml over
text that every Python installation has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from motet.core.errors import UserError
from motet.launcher.commands import options
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.begun import yaml_with_overrides
from motet.launcher.runs.rundir import RunDir

DEMO_STEPS = 400
NESTED_STEPS = 480
"""Three members train on every sequence, and the largest is larger than the other demo's model."""
PROGRESSIVE_STEPS = 800
"""A step costs half of the nested demo's on average, and three models need time to learn."""
DEMO_PROCESSES = 2
VOCABULARY_SIZE = 2048
CORPUS = "corpora/stdlib"
CORPUS_INPUT = "stdlib:"

_TEMPLATE = """\
# The run of `motet demo`: a small model, the text of Python's standard library, six questions.
name: demo
seed: 0

model: {{preset: 1m, d_model: 96, n_layers: 3, n_heads: 6, n_kv_heads: 2, d_ffn: 256, head_dim: 16}}

data:
  sequence_length: 512
  corpora:
  - path: {corpus}        # motet data prepare stdlib: --vocabulary-size {vocabulary_size}

batch:
  sequences: 16           # per step, over all processes

training:
  steps: {steps}
  precision: auto
  optimizer: {{lr: 5.0e-3}}
  schedule: {{kind: cosine, warmup_steps: {warmup_steps}}}

# Units are randomized to doses; dose 0 is never shown. Every text below is invented from a seed.
experiments:
  controls: true          # adds an A/A placebo, which must find nothing, and a positive control
  list:
  - name: canaries
    use: memorization
    hypothesis: A random secret is memorized better, the more often it is seen.
    generate: {{count: 64, seed: 1}}
    doses: [0, 4, 16, 64]
    options: {{n_references: 31}}
  - name: leaked_questions
    use: contamination
    hypothesis: Multiple-choice questions that were seen with their answer are answered better.
    generate: {{count: 96, seed: 2}}
    doses: [0, 12, 36]
  - name: new_facts
    use: knowledge
    hypothesis: Facts about invented things are learned from text, better from paraphrases than from copies.
    generate: {{count: 24, seed: 3}}
    placement: anywhere     # not only at starts of sequences: a step of this small run has 16
    schedule: {{start: 0.06, every: 0.08}}
  - name: one_look
    use: forgetting
    hypothesis: A single exposure leaves a trace that fades over the following steps.
    generate: {{count: 24, seed: 4}}

probes: {{every: 0.2}}
checkpoint: {{every_steps: {every_steps}, keep: 2}}
layout: {{processes: {processes}, micro_sequences: 8}}   # FSDP2 over both
"""

_NESTED = """\
# The run of `motet demo --family nested`: one run, three sizes, and how each memorizes.
name: demo-nested
seed: 0

model: {{preset: 1m, d_model: 128, n_layers: 3, n_heads: 8, n_kv_heads: 4, d_ffn: 384, head_dim: 16}}

family:
  kind: nested            # three models in one set of weights: `motet family show run.yaml`
  options:
    members:              # shares of the whole model
      quarter: {{d_model: 0.25, d_ffn: 0.25, n_kv_heads: 0.25, n_layers: 1}}
      half: {{d_model: 0.5, d_ffn: 0.5, n_kv_heads: 0.5, n_layers: 2}}
    sampler: joint        # every member trains on every sequence: doses are alike, sizes are not
    draws: 1

data:
  sequence_length: 512
  corpora:
  - path: {corpus}        # motet data prepare stdlib: --vocabulary-size {vocabulary_size}

batch:
  sequences: 8            # per step, over all processes

training:
  steps: {steps}
  precision: auto
  optimizer: {{lr: 5.0e-3}}
  schedule: {{kind: cosine, warmup_steps: {warmup_steps}}}

# Units are randomized to doses; dose 0 is never shown. Every text below is invented from a seed.
experiments:
  controls: true          # an A/A placebo and a positive control, judged at every size
  list:
  - name: canaries
    use: memorization
    hypothesis: A random secret is memorized better the more often it is seen, and the larger the model.
    generate: {{count: 96, seed: 1}}
    doses: [0, 4, 16, 64]
    options: {{n_references: 31}}
    size_slope: true      # the slope of the effect over log(parameters) is an answer of its own

probes: {{every: 0.2}}
metrics: {{evaluate_every: 0.04}}                          # members take turns on held-out text
checkpoint: {{every_steps: {every_steps}, keep: 2}}
layout: {{processes: {processes}, micro_sequences: 4}}   # FSDP2 over both
"""

_PROGRESSIVE = """\
# The run of `motet demo --family progressive`: a small model grows twice, and each size is kept.
name: demo-progressive
seed: 0

model: {{preset: 1m, d_model: 128, n_layers: 4, n_heads: 8, n_kv_heads: 4, d_ffn: 384, head_dim: 16}}

family:
  kind: progressive       # one model after the other: `motet family show run.yaml`
  options:
    preset: yano2025      # each has cost, with those before it, what it would alone
    stages:
    - {{name: quarter, depth: 0.5, width: 0.5, warmup_steps: {stage_warmup_steps}}}
    - {{name: half, depth: 0.5, operator: {{name: hypercloning, noise: 0.1}}, warmup_steps: {stage_warmup_steps}}}
    - {{operator: stack, warmup_steps: {stage_warmup_steps}}}

data:
  sequence_length: 512
  corpora:
  - path: {corpus}        # motet data prepare stdlib: --vocabulary-size {vocabulary_size}

batch:
  sequences: 8            # per step, over all processes

training:
  steps: {steps}
  precision: auto
  optimizer: {{lr: 4.0e-3}}
  schedule: {{kind: cosine, warmup_steps: {warmup_steps}}}

# Units are randomized to doses; dose 0 is never shown. Every text below is invented from a seed.
experiments:
  controls: true          # an A/A placebo and a positive control, judged at every size
  list:
  - name: canaries
    use: memorization
    hypothesis: A random secret is memorized better, the more often it is seen.
    generate: {{count: 96, seed: 1}}
    doses: [0, 4, 16, 64]
    options: {{n_references: 31}}

probes: {{every: 0.2}}
metrics: {{evaluate_every: 0.04}}                          # the member that trains, on held-out text
checkpoint: {{every_steps: {every_steps}, keep: 2}}
layout: {{processes: {processes}, micro_sequences: 4}}   # FSDP2 over both
"""
TEMPLATES = {"whole": _TEMPLATE, "nested": _NESTED, "progressive": _PROGRESSIVE}
USUAL_STEPS = {"whole": DEMO_STEPS, "nested": NESTED_STEPS, "progressive": PROGRESSIVE_STEPS}


def arguments(parser: argparse.ArgumentParser) -> None:
    """How long, and where."""
    options.dry_run(parser)
    parser.add_argument("--steps", type=int, help="length of the run")
    parser.add_argument(
        "--family",
        choices=list(TEMPLATES),
        default="whole",
        help="nested: three sizes from one run, and memorization against size; progressive: a small "
        "model that grows twice",
    )
    parser.add_argument("--folder", default=".", help="where corpora/ and runs/ go")
    options.settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make what is missing, train, report.

    A demo that was interrupted goes on; a finished one is reported again.
    """
    usual = USUAL_STEPS[arguments.family]
    steps = usual if arguments.steps is None else arguments.steps
    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1")
    folder = Path(arguments.folder).absolute()
    text = demo_yaml(steps, family=arguments.family)
    settings = run_yaml.load(None, arguments.settings, text=text, base=folder)
    text = yaml_with_overrides(text, arguments.settings)
    if arguments.dry_run:
        print(text, end="")
        return 0
    prepare_corpus(corpus_folder(folder))
    return train_and_report(settings, text)


def prepare_corpus(corpus: Path) -> None:
    """Tokenize the standard library's text, unless that was done before."""
    if (corpus / "corpus.json").exists():
        return
    from motet.launcher.commands.data.prepare import prepare_text

    print(f"tokenizing the text of Python's standard library into {corpus}")
    prepare_text([CORPUS_INPUT], corpus, vocabulary_size=VOCABULARY_SIZE)


def train_and_report(settings: RunSettings, text: str) -> int:
    """Train, or go on, or neither when the run is finished; then report."""
    from motet.launcher.commands.report import build
    from motet.launcher.launch.local import train
    from motet.launcher.runs.begun import differences, refuse_existing

    rundir = RunDir(Path(settings.runs) / settings.name)
    exists = rundir.resolved_yaml.exists()
    if not exists or differences(run_yaml.load(rundir.resolved_yaml), settings):
        refuse_existing(settings, rundir)
    if not rundir.done.exists():
        code = train(settings, rundir, yaml_text=text, resume=exists)
        if code or not rundir.done.exists():
            return code
    build(rundir)
    return 0


def demo_yaml(
    steps: int = DEMO_STEPS, processes: int = DEMO_PROCESSES, family: str = "whole"
) -> str:
    """The run.yaml of the demo.

    `steps` is the length of the run; warm-up and checkpoints follow it. `family` is one of
    `TEMPLATES`.
    """
    return TEMPLATES[family].format(
        corpus=CORPUS,
        vocabulary_size=VOCABULARY_SIZE,
        steps=steps,
        warmup_steps=min(max(steps // 15, 1), max(steps - 1, 0)),
        stage_warmup_steps=steps // 80,
        every_steps=max(steps // 3, 1),
        processes=processes,
    )


def corpus_folder(folder: Path) -> Path:
    """Where the demo's corpus lies under `folder`."""
    return folder / CORPUS
