"""Experiments inside transformers' Trainer.

The lines of Motet end in `# motet`; the rest is an ordinary script.

python examples/trainer.py RUN.yaml, or torchrun --standalone --nproc-per-node 2 examples/trainer.py
RUN.yaml
Then: motet experiments audit runs/NAME, and motet report runs/NAME. To go on after a stop: add
--resume.
"""

from __future__ import annotations

import os
import sys

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import motet  # motet

SEQUENCES, MICRO, STEPS = 8, 2, 120  # batch.sequences and training.steps of the run.yaml

set_seed(0)
processes = int(os.environ.get("WORLD_SIZE", "1"))
args = TrainingArguments(
    "trainer-output",
    max_steps=STEPS,
    per_device_train_batch_size=MICRO,
    gradient_accumulation_steps=SEQUENCES // MICRO // processes,
    train_sampling_strategy="sequential",  # motet
    learning_rate=1e-2,
    logging_steps=1,
    save_steps=10,
    dataloader_num_workers=2,
    report_to="none",
    use_cpu="--cpu" in sys.argv,
    disable_tqdm=True,
)
guest = motet.Guest(sys.argv[1], resume="--resume" in sys.argv)  # motet
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
trainer = Trainer(
    model,
    args,
    train_dataset=guest.dataset(),  # motet
    data_collator=guest.collate,  # motet
    callbacks=[guest.trainer_callback()],  # motet
)
trainer.train(resume_from_checkpoint=guest.last_saved())  # motet
