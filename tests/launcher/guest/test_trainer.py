"""A guest of transformers' Trainer: every slot once and in its step, whatever the Trainer's
settings, or an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import Trainer, TrainerCallback, TrainingArguments

from motet.core.errors import UserError
from motet.launcher.guest.guest import Guest
from motet.launcher.guest.trainer import deal
from motet.launcher.runs.metrics import read_metrics, rows_of
from motet.launcher.study.after_training import audit_run
from motet.parallel.runtime.mesh import World
from tests.launcher.guests import STEPS, adamw, llama, make_corpus, one_step, train, write_yaml
from tests.parallel.ranks import run_ranks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    chosen = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder / "out"), **{**chosen, **changes})


def trainer(
    guest: Guest,
    args: TrainingArguments,
    kind: type[Trainer] = Trainer,
    extra: tuple[TrainerCallback, ...] = (),
) -> Trainer:
    return kind(
        llama(),
        args,
        train_dataset=guest.dataset(),
        data_collator=guest.collate,
        callbacks=[guest.trainer_callback(), *extra],
    )


def losses(guest: Guest) -> list[float]:
    return [row["loss"] for row in rows_of(read_metrics(guest.run.metrics), "step")]


def assert_proved(guest: Guest, words: str) -> None:
    result = audit_run(guest.run.root, replay=True)
    assert result.ok, result.lines
    assert words in result.lines[0]
    assert "missing 0, repeated 0, unplanned 0" in result.lines[1]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_reads_what_a_plain_loop_reads(
    corpus: Path, tmp_path: Path, masks: bool, workers: int
) -> None:
    plain, model = Guest(write_yaml(tmp_path, corpus, "plain", masks)), llama(use_cache=False)
    wanted = train(plain, model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0))
    guest = Guest(write_yaml(tmp_path, corpus, "trainer", masks))
    trainer(guest, arguments(tmp_path, dataloader_num_workers=workers)).train()
    np.testing.assert_allclose(losses(guest), wanted, rtol=1e-5)
    assert_proved(guest, f"model after step {STEPS}; 1 segment(s)")
    assert guest.run.done.exists()
    assert list(guest.saved_steps()) == [4, 8, 12]


class Crash(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_a_trainer_that_crashed_goes_on_from_its_checkpoint(corpus: Path, tmp_path: Path) -> None:
    whole = Guest(write_yaml(tmp_path, corpus, "whole"))
    trainer(whole, arguments(tmp_path / "w")).train()
    yaml = write_yaml(tmp_path, corpus, "cut")
    guest = Guest(yaml)
    with pytest.raises(KeyboardInterrupt):
        trainer(guest, arguments(tmp_path), extra=(Crash(),)).train()
    guest._held.close()  # as the end of the process would
    guest = Guest(yaml, resume=True)
    trainer(guest, arguments(tmp_path)).train(resume_from_checkpoint=guest.last_saved())
    assert_proved(guest, f"model after step {STEPS}; 2 segment(s), ranks 1 -> 1")
    assert losses(guest) == losses(whole)


def test_arguments_under_which_slots_would_stray_are_refused_together(
    corpus: Path, tmp_path: Path
) -> None:
    guest = Guest(write_yaml(tmp_path, corpus, masks=True))
    args = arguments(
        tmp_path,
        train_sampling_strategy="random",
        max_steps=5,
        gradient_accumulation_steps=3,
        ignore_data_skip=True,
        use_cache=True,
        accelerator_config={"split_batches": True},
    )
    with pytest.raises(UserError) as error:
        trainer(guest, args).train()
    for words in (
        "train_sampling_strategy: is 'random' and must be 'sequential'",
        "max_steps: is 5 and must be 12",
        "ignore_data_skip: is True",
        "accelerator_config.split_batches: is True",
        "use_cache: is True",
        "2 x gradient_accumulation_steps 3 x 1 process = 6 sequences a step, but batch.sequences "
        "is 8",
    ):
        assert words in str(error.value)


class Shuffling(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.RandomSampler(self.train_dataset)


def test_a_shuffle_that_no_argument_shows_stops_the_first_step(
    corpus: Path, tmp_path: Path
) -> None:
    guest = Guest(write_yaml(tmp_path, corpus))
    with pytest.raises(UserError, match=r"step 0 was not trained as planned: slots .* never"):
        trainer(guest, arguments(tmp_path), Shuffling).train()


def test_batches_are_dealt_to_processes_in_turn() -> None:
    assert deal(2, 2, 0, 2) == [0, 4]
    assert deal(2, 2, 1, 2) == [2, 6]


def on_two_ranks(world: World, corpus: Path, folder: Path) -> dict[str, Any]:
    """A Trainer; a plain DDP loop, whose rank 1 strays; loops with FSDP2 and FSDP1."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    guest = Guest(folder / "trainer.yaml")
    args = arguments(folder, gradient_accumulation_steps=2)
    trainer(guest, args).train()
    found: dict[str, Any] = {"trainer": losses(guest)}

    guest, model = Guest(folder / "ddp.yaml"), DistributedDataParallel(llama(use_cache=False))
    optimizer = adamw(model)
    try:
        for step, batches in guest.steps(model):
            if (step, world.rank) == (3, 1):
                batches[-1]["input_ids"][0] = 7
            guest.done(step, one_step(model, optimizer, batches))
    except UserError as error:
        found["complaint"] = str(error)
    found["ddp"] = losses(guest)

    guest, sharded = Guest(folder / "fsdp.yaml"), llama(use_cache=False)
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(guest, sharded, adamw(sharded))
    found["fsdp"] = losses(guest)

    guest, flat = Guest(folder / "fsdp1.yaml"), llama(use_cache=False)
    flat = FullyShardedDataParallel(flat, use_orig_params=True, device_id=world.device)
    train(guest, flat, adamw(flat))
    found["fsdp1"] = losses(guest)
    return found


def test_two_processes_read_what_one_reads_and_both_stop_where_one_strays(
    corpus: Path, tmp_path: Path
) -> None:
    alone, model = Guest(write_yaml(tmp_path, corpus, "alone", masks=True)), llama(use_cache=False)
    wanted = train(alone, model, adamw(model))
    for name in ("trainer", "ddp", "fsdp", "fsdp1"):
        write_yaml(tmp_path, corpus, name, masks=True)
    one, other = run_ranks(2, on_two_ranks, corpus, tmp_path)
    assert one == other
    assert one["complaint"].startswith("rank 1: step 3 was not trained as planned: slot 30 never")
    np.testing.assert_allclose(one["ddp"], wanted[:3], rtol=1e-5)
    np.testing.assert_allclose(one["fsdp"], wanted, rtol=1e-5)
    np.testing.assert_allclose(one["fsdp1"], wanted, rtol=1e-5)
    for name in ("trainer", "fsdp", "fsdp1"):
        result = audit_run(tmp_path / "runs" / name, replay=True)
        assert result.ok, result.lines
        assert "1 segment(s), ranks 2" in result.lines[0]
    for step in (0, STEPS):
        probes = (tmp_path / "runs" / name / "probes" for name in ("alone", "fsdp"))
        scores = [np.load(p / f"step-{step:08d}.npz")["canaries/logprob"] for p in probes]
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3)
