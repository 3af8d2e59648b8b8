"""A small corpus, run and model for tests of guests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from motet.experiments.corpora.prepare import PrepareRequest, prepare
from motet.launcher.guest.guest import Guest

VOCABULARY, STEPS = 320, 12
RUN_YAML = """
name: {name}
data: {{sequence_length: 64, document_masks: {masks}, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 8}}
layout: {{micro_sequences: 2}}
training: {{steps: 12}}
experiments:
  draws: 100
  controls: false
  list:
  - {{name: canaries, use: memorization, doses: [0, 1], generate: {{count: 10}}, options: {{n_references: 3}}}}
"""
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "and",
    "then",
    "ran",
    "over",
    "under",
    "quickly,",
    "slowly.",
    "Motet",
    "voices",
    "sing",
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
]


def make_corpus(folder: Path) -> Path:
    """Prepare a few thousand tokens of invented text."""
    draw = random.Random(0)
    with open(folder / "in.jsonl", "w") as file:
        for number in range(120):
            text = " ".join(draw.choice(WORDS) for _ in range(60))
            file.write(json.dumps({"id": str(number), "text": text}) + "\n")
    request = PrepareRequest(
        [str(folder / "in.jsonl")], folder / "c", vocabulary_size=VOCABULARY, workers=1
    )
    return prepare(request).path


def write_yaml(folder: Path, corpus: Path, name: str = "r", masks: bool = False) -> Path:
    """Write a run.yaml; its runs go to FOLDER/runs."""
    path = folder / f"{name}.yaml"
    path.write_text(RUN_YAML.format(name=name, corpus=corpus, masks=str(masks).lower()))
    return path


def llama(**changes: Any) -> LlamaForCausalLM:
    """Return a tiny model, always with the same weights."""
    sizes = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).train()


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def one_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]]
) -> float:
    """Accumulate the gradients of some micro-batches, update, and return the loss."""
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(
    guest: Guest,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    start_step: int | None = None,
    until: int = STEPS,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Run a plain loop to the end, or until some step; `after` is called with the updates made."""
    losses = []
    for step, batches in guest.steps(model, start_step):
        losses.append(one_step(model, optimizer, batches))
        guest.done(step, losses[-1])
        after(step + 1)
        if step + 1 == until:
            break
    guest.finish()
    return losses
