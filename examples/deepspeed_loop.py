"""Experiments inside a loop with DeepSpeed.

The lines of Motet end in `# motet`; the rest is an ordinary script.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_loop.py RUN.yaml (on a CPU with
DS_ACCELERATOR=cpu)
Then: motet experiments audit runs/NAME, and motet report runs/NAME.
"""

from __future__ import annotations

import sys

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import motet  # motet

SAVE_EVERY = 20
ZERO_STAGE = int(sys.argv[2]) if len(sys.argv) > 2 else 1

set_seed(0)
deepspeed.init_distributed()
guest = motet.Guest(sys.argv[1])  # motet
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
engine, _, _, _ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
    config={
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": guest.micro_batches(),  # motet
        "zero_optimization": {"stage": ZERO_STAGE},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    },
)
engine.train()
for step, batches in guest.steps(engine):  # motet
    total = 0.0
    for batch in batches:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        total += loss.item() / len(batches)
    guest.done(step, total, applied=engine.was_step_applied())  # motet
    if (step + 1) % SAVE_EVERY == 0:
        engine.save_checkpoint("deepspeed-output", tag=f"step-{step + 1}")
        guest.saved(step + 1, f"deepspeed-output/step-{step + 1}")  # motet
guest.finish()  # motet
