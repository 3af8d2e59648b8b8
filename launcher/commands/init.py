"""`motet init NAME`: a folder with a commented run.yaml and questions to start from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from motet.core.errors import UserError, raise_problems
from motet.core.files import atomic_write
from motet.launcher.commands import options

QUESTIONS = "questions.jsonl"
N_QUESTIONS = 48

_TEMPLATE = """\
# A run of Motet. Any setting can be given on the command line too, as training.steps=100.
# Every setting, with its default and unit: docs/reference.md. Paths start from this file's folder.
name: {name}
seed: 0                   # weights, order of the data, randomization of the experiments

model:
  preset: 1m              # 1m 4m 15m 60m 190m 370m 1b 3b 7b: parameters without embeddings
  # n_layers: 6           # any size of a preset can be changed

data:
  sequence_length: 256    # tokens
  corpora:                # made by `motet data prepare my_texts/ --output corpora/mine`
  - path: corpora/mine
    weight: 1.0           # share of the sequences, when there are several corpora

batch:
  sequences: 32           # per step over all processes

training:
  steps: 1000             # or `tokens: 8_000_000`
  optimizer: {{lr: 3.0e-3}}
  schedule: {{kind: cosine, warmup_steps: 50}}
  precision: auto         # bf16 where the device is fast at it

# The questions. See them before paying for them: motet experiments check | power | preview run.yaml
experiments:
  controls: true          # adds an A/A placebo, which must find nothing, and a positive control
  list:
  - name: leaked_questions
    use: contamination    # all that there are: motet experiments list
    hypothesis: Questions that were seen with their answer are answered better.
    items: {questions}  # one question per line; put yours here
    doses: [0, 4, 16]     # times that a question is shown; 0 is the control and must be there
  - name: canaries
    use: memorization
    hypothesis: A random secret is memorized better, the more often it is seen.
    generate: {{count: 64, seed: 1}}   # invented from a seed instead of read from a file
    doses: [0, 1, 4, 16]

probes: {{every: 0.1}}      # measure at every tenth of the run
checkpoint: {{every_steps: 200, keep: 3}}
layout:
  processes: 2            # per node; FSDP2 divides the model over them. More ways: docs/layouts.md
  micro_sequences: 8      # sequences of one forward pass of a process
metrics: {{wandb: "off"}}   # off | online | offline
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The name."""
    options.dry_run(parser)
    parser.add_argument("name", metavar="NAME", help="name of the run and of the new folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder, or print its run.yaml."""
    from motet.launcher.config.checks import name_problems
    from motet.launcher.config.sections import RunSettings

    folder = Path(arguments.name)
    raise_problems(name_problems(RunSettings(name=folder.name)))
    text = _TEMPLATE.format(name=folder.name, questions=QUESTIONS)
    if arguments.dry_run:
        print(text, end="")
        return 0
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; choose another name")
    atomic_write(folder / "run.yaml", text)
    atomic_write(folder / QUESTIONS, example_questions())
    print(f"wrote {folder}/run.yaml and {folder}/{QUESTIONS}; now:")
    print(f"  cd {folder}")
    print("  motet data prepare YOUR_TEXTS --output corpora/mine --vocabulary-size 8192")
    print("  motet experiments check run.yaml")
    print("  motet train run.yaml")
    print(f"  motet report runs/{folder.name}")
    return 0


def example_questions() -> str:
    """Invented multiple-choice questions as JSON lines, in the form that `use: contamination`
    reads.
    """
    from motet.experiments.design.parser import parse_experiments
    from motet.experiments.library.kinds import LIBRARY, Library

    entry = {"name": "example", "use": "contamination"}
    (spec,), _ = parse_experiments([entry], Path.cwd(), Library(Path.cwd()))
    rows = LIBRARY["contamination"](spec).generate_rows(N_QUESTIONS, 0)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
