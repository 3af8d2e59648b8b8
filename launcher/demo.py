"""The run that `motet demo` makes: an ordinary run.yaml over text that every Python installation
has.
"""

from __future__ import annotations

from pathlib import Path

DEMO_STEPS = 400
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
  controls: true          # adds an A/A placebo (must find nothing) and a positive control (must be found)
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
    placement: anywhere     # as at the start of sequences, but a step of this small run has only 16 of them
    schedule: {{start: 0.06, every: 0.08}}
  - name: one_look
    use: forgetting
    hypothesis: A single exposure leaves a trace that fades over the following steps.
    generate: {{count: 24, seed: 4}}

probes: {{every: 0.2}}
checkpoint: {{every_steps: {every_steps}, keep: 2}}
layout: {{processes: {processes}, micro_sequences: 8}}   # FSDP2 over both
"""


def demo_yaml(steps: int = DEMO_STEPS, processes: int = DEMO_PROCESSES) -> str:
    """The run.yaml of the demo.

    `steps` is the length of the run; warm-up and checkpoints follow it.
    """
    return _TEMPLATE.format(
        corpus=CORPUS,
        vocabulary_size=VOCABULARY_SIZE,
        steps=steps,
        warmup_steps=min(max(steps // 15, 1), max(steps - 1, 0)),
        every_steps=max(steps // 3, 1),
        processes=processes,
    )


def corpus_folder(folder: Path) -> Path:
    """Where the demo's corpus lies under `folder`."""
    return folder / CORPUS
