"""Experiments inside a loop with Accelerate.

The lines of Motet end in `# motet`; the rest is an ordinary script.

python examples/accelerate_loop.py RUN.yaml, or accelerate launch --num_processes 2
examples/accelerate_loop.py RUN.yaml
Then: motet experiments audit runs/NAME, and motet report runs/NAME.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

import motet  # motet

SAVE_EVERY = 20

set_seed(0)
accelerator = Accelerator(cpu="--cpu" in sys.argv)
guest = motet.Guest(sys.argv[1])  # motet
accelerator.gradient_accumulation_steps = guest.micro_batches()  # motet
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,  # a model so narrow learns in 100 steps with it, not with 0.02
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
model.train()
for step, batches in guest.steps(model):  # motet
    total = 0.0
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() / len(batches)
    guest.done(step, total)  # motet
    if (step + 1) % SAVE_EVERY == 0:
        folder = f"accelerate-output/step-{step + 1}"
        accelerator.save_state(folder)
        guest.saved(step + 1, folder)  # motet
guest.finish()  # motet
accelerator.end_training()
