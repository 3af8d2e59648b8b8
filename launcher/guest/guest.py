"""Experiments in a training loop that is not Motet's: transformers' Trainer, Accelerate, DeepSpeed,
or a plain one.

The guest reads a run.yaml, freezes the study into a run folder as `motet train` does, hands out the
tokens, probes the model, and writes the ledger from what the model's forward passes really saw. The
optimizer, the parallelism and the checkpoints stay the loop's own. `docs/guests.md` shows the three
loops.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from motet.core.access import follow
from motet.core.errors import UserError
from motet.experiments.stream.stream import Batch
from motet.launcher.guest.attempt import Attempt
from motet.launcher.guest.model import device_of, model_facts, model_inputs, takes_label_count
from motet.launcher.guest.run_folder import (
    adopt,
    agree,
    freeze_or_open,
    join_guest,
    load_settings,
    run_of,
    tell,
)
from motet.launcher.launch.holding import only_one
from motet.launcher.rank.feed import Feed
from motet.launcher.runs.manifest import check_frozen, open_stream
from motet.launcher.runs.seals import read_checkpoint
from motet.parallel.layout.layout import Layout

if TYPE_CHECKING:
    from motet.launcher.guest.trainer import SlotDataset, TrainerGuest


class Guest:
    """The experiments of one run, for a loop that trains the model itself.

    Args:
        run_yaml: as for `motet train`; sections that a foreign loop does not obey (model,
            optimizer, ...) are refused.
        settings: `a.b.c=value`, over the file.
        resume: go on with the run folder that an earlier start made; else it must not exist.

    Make it after the processes joined (`torch.distributed`), on every process.

    Raises:
        UserError: settings, run folder or data that do not fit, all problems at once and on every
            process.
    """

    def __init__(
        self, run_yaml: Path | str, settings: Sequence[str] = (), *, resume: bool = False
    ) -> None:
        path = Path(run_yaml)
        self.settings = load_settings(path, settings, resume)
        self.world = join_guest(self.settings.layout.timeout_s)
        self.run = run_of(self.settings)
        self.resume = resume
        self._held = contextlib.ExitStack()
        complaint = None
        if self.world.rank == 0:
            try:
                freeze_or_open(self.run, self.settings, path, settings, resume)
                self._held.enter_context(only_one(self.run))
            except UserError as error:
                complaint = str(error)
        agree(complaint, self.world)
        follow(self.run.root)
        self._plan = self._verified()
        self.stream = open_stream(self.settings, self._plan)
        self._attempt: Attempt | None = None
        self._handed: tuple[int, list[Batch], float] | None = None

    def _verified(self) -> Any:
        """Return the plan once every process has found definition, plan and corpora as frozen."""
        complaint, plan = None, None
        try:
            _, plan = check_frozen(self.run, self.settings)
        except UserError as error:
            complaint = str(error)
        agree(complaint, self.world)
        return plan

    def saved_steps(self) -> dict[int, Path | None]:
        """Return {step: folder} of every checkpoint that was recorded, oldest first."""
        found = {}
        for step in self.run.checkpoint_steps():
            folder = read_checkpoint(self.run, step)["folder"]
            found[step] = None if folder is None else Path(folder)
        return found

    def last_saved(self) -> Path | None:
        """Return the folder of the newest recorded checkpoint, None before the first: what a script
        that goes on should load.
        """
        folders = [folder for folder in self.saved_steps().values() if folder is not None]
        return folders[-1] if folders else None

    def begin(self, model: nn.Module, start_step: int | None = None) -> Attempt:
        """Start to follow a model that has had `start_step` updates (a collective); `steps` and the
        Trainer's callback call this.

        Raises:
            UserError: the run was begun and `start_step` is missing, or is a step that was never
                recorded as saved.
        """
        if self._attempt is not None:
            raise UserError("this Guest follows a model already; make another to train again")
        known = tell(self.run.checkpoint_steps(), self.world)
        if start_step is None and known:
            listed = ", ".join(f"{step:,}" for step in known)
            raise UserError(
                f"{self.run.root} goes on, but from which checkpoint? Load its weights and give "
                f"start_step; recorded: {listed}"
            )
        complaint = None
        if self.world.rank == 0:
            try:
                vocabulary_size = self.stream.corpora[0].vocabulary_size  # type: ignore[attr-defined]
                adopt(self.run, model_facts(model), vocabulary_size)
            except UserError as error:
                complaint = str(error)
        agree(complaint, self.world)
        self._attempt = Attempt(
            self.run,
            self.settings,
            self.world,
            self.stream,
            self._plan,
            model,
            start_step or 0,
        )
        return self._attempt

    def steps(
        self, model: nn.Module, start_step: int | None = None
    ) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        """Yield (step, this process's micro-batches), one optimizer step after the other; end each
        with `done`.

        Args:
            model: what trains, wrapped or not; its forward takes `input_ids` and `labels` and
                returns `.loss` and `.logits`.
            start_step: updates that its weights have had; needed when the run goes on.

        A micro-batch has `input_ids` and `labels` (as transformers takes them: the model shifts),
        int64 [layout.micro_sequences, data.sequence_length], on the model's device. Divide the loss
        of each by the number of micro-batches, as Accelerate and DeepSpeed do themselves: the mean
        over processes is then the mean over all labels.
        """
        layout = self._layout()
        attempt = self.begin(model, start_step)
        feed = Feed(self.stream, attempt.steps, layout, self.world.rank)
        masked = self.settings.data.document_masks
        try:
            for step in range(attempt.step, self.settings.steps):
                started = time.perf_counter()
                share = feed.take(step)
                waited = time.perf_counter() - started
                self._handed = (step, share.batches, waited)
                yield step, self._for_model(model, share.batches, masked)
                if attempt.step == step:
                    raise UserError(
                        f"step {step:,} was handed out, but guest.done({step}) was not called"
                    )
        finally:
            feed.close()

    def micro_batches(self, step: int = 0) -> int:
        """Return how many micro-batches of a step each process gets: the loop's gradient
        accumulation.
        """
        layout = self._layout()
        sequences = self.settings.batch_steps.sequences(step)
        return layout.dp_sequences(sequences, 0)[1] // layout.micro_sequences

    def _layout(self) -> Layout:
        """Return how a step is divided among the processes.

        Raises:
            UserError: a batch that cannot be divided evenly.
        """
        world, micro = self.world.size, self.settings.layout.micro_sequences
        for first, sequences in self.settings.batch_steps.changes:
            if sequences % (world * micro):
                setting = "batch.ramp" if first else "batch.sequences"
                raise UserError(
                    f"{setting}: {sequences:,} sequences cannot be divided over {world} "
                    f"process{'es' if world > 1 else ''} in "
                    f"micro-batches of layout.micro_sequences={micro:,}; take a multiple of "
                    f"{world * micro:,}, or other micro-batches"
                )
        return Layout(dp_replicate=world, micro_sequences=micro)

    def _for_model(
        self, model: nn.Module, batches: Sequence[Batch], masked: bool
    ) -> list[dict[str, Any]]:
        """Return micro-batches on the model's device."""
        device = device_of(model)
        found: list[dict[str, Any]] = [
            {name: value.to(device) for name, value in model_inputs(batch).items()}
            for batch in batches
        ]
        if masked:
            # Micro-batches have different numbers of labels: the mean of their means would weigh
            # labels differently.
            extra: dict[str, Any] = {"use_cache": False}  # a cache keeps transformers from masking
            if takes_label_count(model):
                extra["num_items_in_batch"] = self._labels(batches) / (
                    self.world.size * len(batches)
                )
            found = [batch | extra for batch in found]
        return found

    def _labels(self, batches: Sequence[Batch]) -> float:
        """Return the labels of the global batch (a collective)."""
        count = torch.tensor([sum(int((batch.labels_BT >= 0).sum()) for batch in batches)])
        if self.world.size > 1:
            dist.all_reduce(count, group=self.world.control)
        return float(count.item())

    def done(
        self,
        step: int,
        loss: Tensor | float | None = None,
        *,
        applied: bool = True,
        **numbers: float,
    ) -> None:
        """Say that the optimizer has made update `step` (a collective).

        The ledger gets what the model saw since the last call; experiments that are due are probed;
        the row of the step is written.

        Args:
            loss: of this process in this step; the metrics keep the mean over processes.
            applied: False when the optimizer left the update out (overflow, say).
            numbers: more for the metrics, such as lr and grad_norm.

        Raises:
            UserError: on every process, when the model was not trained on exactly the planned
                sequences, each once.
        """
        handed, attempt = self._handed, self._attempt
        if attempt is None or handed is None or handed[0] != step:
            raise UserError(
                f"guest.done({step}) was called, but the step that guest.steps handed out is "
                f"{handed[0] if handed else 'none'}"
            )
        self._handed = None
        mine = float(loss) if loss is not None else None
        row = attempt.done(handed[1], applied, mine, **numbers)
        row["seconds"] |= {"data": handed[2]}
        attempt.log(row)

    def saved(self, step: int, folder: Path | str) -> None:
        """Record a checkpoint that the loop has written: the model after `step` updates, with the
        SHA-256 of its files (a collective).

        Only a recorded step can be gone on from, and only with the weights in that folder the
        ledger's lineage is true.
        """
        if self._attempt is None:
            raise UserError("guest.saved was called before the first step")
        self._attempt.saved(step, Path(folder))

    def finish(self) -> None:
        """End this start of the run (a collective); after its last step the run counts as finished.
        Further calls do nothing.
        """
        if self._attempt is not None:
            self._attempt.close()
        self._held.close()

    def dataset(self) -> SlotDataset:
        """Return the whole run as a map-style data set for `Trainer(train_dataset=...)`: item s is
        slot s.
        """
        from motet.launcher.guest.trainer import SlotDataset

        return SlotDataset(self.run.root)

    @staticmethod
    def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack items of `dataset`, for `Trainer(data_collator=...)`."""
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def trainer_callback(self) -> TrainerGuest:
        """Return the callback for `Trainer(callbacks=[...])`: ledger, probes, metrics, records of
        checkpoints, and the end.
        """
        from motet.launcher.guest.trainer import TrainerGuest

        return TrainerGuest(self)
