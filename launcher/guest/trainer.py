"""A guest of transformers' Trainer: the run as a data set, and a callback that follows the
training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from motet.core.errors import Problem, raise_problems
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.stream import Stream
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.guest.attempt import Attempt
from motet.launcher.guest.model import model_inputs
from motet.launcher.runs.manifest import open_stream
from motet.launcher.runs.rundir import RunDir
from motet.parallel.runtime.mesh import World


class FollowedRun(Protocol):
    """What a callback needs of the Guest that follows its Trainer."""

    settings: RunSettings
    world: World
    stream: Stream
    resume: bool

    def begin(self, model: nn.Module, start_step: int | None = None) -> Attempt: ...

    def saved(self, step: int, folder: Path | str) -> None: ...

    def finish(self) -> None: ...


CHECKPOINT = "checkpoint-{step}"  # the Trainer's own name, below its output_dir


class SlotDataset(Dataset[dict[str, Tensor]]):
    """Every slot of a run in order, as `input_ids` and `labels` [T] (and `position_ids`, where
    documents are masked).

    Workers open the corpora themselves, so nothing but the run folder is sent to them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stream: Stream | None = None
        settings = run_yaml.load(RunDir(root).resolved_yaml)
        self._slots = settings.slots_before(settings.steps)

    def __len__(self) -> int:
        return self._slots

    def __getitem__(self, slot: int) -> dict[str, Tensor]:
        if self._stream is None:
            run = RunDir(self.root)
            plan = ExposurePlan(run.plan / "exposures.plan")
            self._stream = open_stream(run_yaml.load(run.resolved_yaml), plan)
        batch = self._stream.batch(int(slot), 1)
        return {name: value[0] for name, value in model_inputs(batch).items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}


class TrainerGuest(TrainerCallback):
    """Follows a Trainer that reads a `SlotDataset` in order.

    A step of the Trainer takes `gradient_accumulation_steps` rounds; in each, process p reads the
    p-th batch.
    """

    def __init__(self, guest: FollowedRun) -> None:
        self.guest = guest
        self._attempt: Attempt | None = None
        self._row: dict[str, Any] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check that the Trainer will read every slot once, in its step; then begin."""
        model: nn.Module = kwargs["model"]
        world = self.guest.world.size
        raise_problems(trainer_problems(args, state, model, self.guest.settings, world))
        resumed = state.global_step > 0 or self.guest.resume
        self._attempt = self.guest.begin(model, state.global_step if resumed else None)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write what the step consumed, and probe if due."""
        assert self._attempt is not None
        self._flush()
        first = self._attempt.steps.slots_before(state.global_step - 1)
        planned = [
            self.guest.stream.batch(first + offset, args.per_device_train_batch_size)
            for offset in deal(
                args.per_device_train_batch_size,
                args.gradient_accumulation_steps,
                self.guest.world.rank,
                self.guest.world.size,
            )
        ]
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self._row = self._attempt.done(planned, not skipped, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take over what the Trainer says of the step: its loss is the mean since it last
        logged.
        """
        logs = kwargs.get("logs") or {}
        if self._row is not None and self._row["step"] == state.global_step and "loss" in logs:
            self._row["loss"] = float(logs["loss"])
            self._row["lr"] = logs.get("learning_rate")
            self._row["grad_norm"] = logs.get("grad_norm")

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Record the checkpoint."""
        folder = Path(args.output_dir or ".") / CHECKPOINT.format(step=state.global_step)
        self.guest.saved(state.global_step, folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """End the start of the run; after the last step the run is finished."""
        self._flush()
        self.guest.finish()

    def _flush(self) -> None:
        if self._row is not None and self._attempt is not None:
            self._attempt.log(self._row)
        self._row = None


def deal(sequences: int, rounds: int, rank: int, world_size: int) -> list[int]:
    """Return the offset in the step of each batch of one process: batches go to the processes in
    turn.
    """
    return [(turn * world_size + rank) * sequences for turn in range(rounds)]


def trainer_problems(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    settings: RunSettings,
    world_size: int,
) -> list[Problem]:
    """Return every argument of the Trainer under which it would not read each slot once, in its
    step.
    """
    wanted: list[tuple[str, Any, Any, str]] = [
        (
            "train_sampling_strategy",
            getattr(args, "train_sampling_strategy", "random"),
            "sequential",
            "the order is Motet's",
        ),
        ("max_steps", state.max_steps, settings.steps, "as many as training.steps"),
        ("ignore_data_skip", args.ignore_data_skip, False, "a resumed run reads on where it was"),
        (
            "load_best_model_at_end",
            args.load_best_model_at_end,
            False,
            "answers are about the last weights",
        ),
        (
            "auto_find_batch_size",
            args.auto_find_batch_size,
            False,
            "batch.sequences is fixed",
        ),
        (
            "accelerator_config.split_batches",
            bool(getattr(args.accelerator_config, "split_batches", False)),
            False,
            "a batch belongs to one process",
        ),
        ("n_gpu", max(args.n_gpu, 1), 1, "start one process per GPU (torchrun)"),
    ]
    if settings.data.document_masks:
        cached = bool(getattr(getattr(model, "config", None), "use_cache", False))
        wanted.append(("use_cache", cached, False, "a cache keeps transformers from masking"))
    problems = [
        Problem(f"TrainingArguments.{name}", f"is {value!r} and must be {needed!r}: {why}")
        for name, value, needed, why in wanted
        if value != needed
    ]
    return problems + batch_problems(args, settings, world_size)


def batch_problems(
    args: TrainingArguments, settings: RunSettings, world_size: int
) -> list[Problem]:
    """Return why the Trainer's batch is not the run's."""
    problems = []
    if len(settings.batch_steps.changes) > 1:
        problems.append(Problem("batch.ramp", "the Trainer's batch is constant; leave it out"))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    if batch != settings.batch.sequences:
        why = (
            f"{args.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x "
            f"{world_size} process{'es' if world_size > 1 else ''} = {batch:,} sequences a step, "
            "but batch.sequences is "
            f"{settings.batch.sequences:,}"
        )
        problems.append(Problem("TrainingArguments.per_device_train_batch_size", why))
    return problems
