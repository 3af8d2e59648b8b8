"""The same weights, data and AdamW give the loss curve of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from motet.experiments.stream.stream import Batch
from motet.launcher.config.sections import ScheduleSettings
from motet.launcher.guest.guest import Guest
from motet.launcher.guest.model import model_inputs
from motet.launcher.runs.lr_schedule import learning_rate
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize
from motet.models.hf import hf_names, to_hf
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import BATCH, LENGTH, global_batch, share

STEPS, PEAK_LR, MICRO = 50, 3e-3, 4
MODEL = ModelConfig(
    vocabulary_size=96,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ffn=64,
    qk_norm="head",
    init_std=0.1,
)
OPTIONS = EngineOptions(weight_decay=0.1, clip_norm=1.0, seed=3)
SCHEDULE = ScheduleSettings(kind="cosine", warmup_steps=5)


def rate(step: int) -> float:
    return learning_rate(SCHEDULE, step, STEPS, PEAK_LR)


def engine_losses(world: World, masked: bool) -> list[float]:
    layout = Layout(micro_sequences=MICRO)
    engine = build_engine(MODEL, OPTIONS, layout, world)
    return [
        engine.step(
            share(layout, 0, step, masked)[0], rate(step), lambda *_: True, lambda: False
        ).loss
        for step in range(STEPS)
    ]


def rows(masked: bool) -> list[dict[str, torch.Tensor]]:
    """Return every sequence of the run in the form that transformers takes."""
    found = []
    for step in range(STEPS):
        micro = global_batch(step, masked)
        nothing = np.empty(0, dtype=np.uint64)
        batch = Batch(0, micro.tokens_BT, micro.labels_BT, micro.document_ids_BT, nothing)
        inputs = model_inputs(batch)
        found += [{name: value[row] for name, value in inputs.items()} for row in range(BATCH)]
    return found


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])


def trainer_losses(folder: Path, masked: bool) -> list[float]:
    decoder = Decoder(MODEL)
    initialize(decoder, OPTIONS.seed)
    to_hf(decoder.state_dict(), MODEL, None, folder, sequence_length=LENGTH)
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = dict(model.named_parameters())
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in decoder.named_parameters():
        decays = parameter.ndim >= 2 and "embed" not in name
        groups[decays].append(theirs[hf_names(MODEL)[name]])
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": OPTIONS.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=1.0,
        betas=OPTIONS.betas,
        eps=OPTIONS.eps,
    )
    args = TrainingArguments(
        str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        train_sampling_strategy="sequential",
        max_grad_norm=OPTIONS.clip_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    kept = Losses()
    Trainer(
        model,
        args,
        train_dataset=rows(masked),  # type: ignore[arg-type]
        data_collator=Guest.collate,
        callbacks=[kept],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
    ).train()
    return kept.losses


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "packed-documents"])
def test_losses_of_50_steps_are_those_of_the_trainer(masked: bool, tmp_path: Path) -> None:
    (ours,) = run_ranks(1, engine_losses, masked)
    theirs = trainer_losses(tmp_path / "hf", masked)
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1] < 0.8 * ours[0], "something was learned"
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    print("largest relative difference", np.abs(np.array(theirs) / np.array(ours) - 1).max())
