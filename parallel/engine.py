"""The protocol between the step loop and whatever trains the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class MicroBatch(Protocol):
    """Sequences of one forward pass: B sequences of T tokens, as the stream gives them."""

    @property
    def tokens_BT(self) -> npt.NDArray[np.int32]: ...

    @property
    def labels_BT(self) -> npt.NDArray[np.int64]: ...

    @property
    def document_ids_BT(self) -> npt.NDArray[np.int32] | None: ...


@dataclass(frozen=True)
class EngineOptions:
    """How a model is trained; the launcher fills it from the run's settings.

    Attributes:
        precision: "fp32" or "bf16" (bf16 compute, fp32 weights and reductions).
        shard: FSDP2 over all ranks; otherwise weights are replicated.
        compile: torch.compile every block.
        recompute: recompute activations in the backward pass.
        clip_norm: largest gradient norm, 0 for no clipping.
        z_loss: weight of the squared log-partition.
        betas, eps, weight_decay, fused: of AdamW; decay applies to matrices other than the embedding.
        seed: of the initial weights.
    """

    precision: str = "fp32"
    shard: bool = True
    compile: bool = False
    recompute: bool = False
    clip_norm: float = 1.0
    z_loss: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True
    seed: int = 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        loss: mean cross-entropy over the labels of the global batch, nats.
        z_loss: mean squared log-partition, times its weight.
        grad_norm: before clipping.
        n_labels: labels of the global batch.
        applied: False when the judge refused the update.
        stop: some rank was asked to stop.
    """

    loss: float
    z_loss: float
    grad_norm: float
    n_labels: int
    applied: bool
    stop: bool


Judge = Callable[[float, float], bool]
"""(loss, gradient norm) -> whether to apply the update. Both are global, so every rank decides alike."""


class Engine(Protocol):
    """What trains a model; the same experiments, probes and checkpoints run on any of them."""

    def step(
        self,
        batches: Sequence[MicroBatch],
        expected_labels: int,
        lr: float,
        judge: Judge,
        stop: bool,
    ) -> StepResult:
        """Train on this rank's share of one global batch.

        Args:
            batches: this rank's micro-batches.
            expected_labels: labels of the global batch if none were masked; only a scale, corrected by the true count.
            lr: learning rate of this step.
            judge: decides whether the update is applied.
            stop: this rank was asked to stop.
        """

    def score(
        self, tokens_BT: npt.NDArray[np.int64], labels_BT: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Return log-probability (nats) and greedy agreement of every label, [B, T]. A collective under FSDP."""

    def finish_scoring(self) -> None:
        """Give back what scoring held, so that the next step finds the engine as it was."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor of model and optimizer by a layout-independent name; loading writes into them."""

    def full_model(self) -> dict[str, torch.Tensor]:
        """Return the unsharded model on the CPU of rank 0, {} elsewhere. A collective."""

    def load_model(self, state: dict[str, torch.Tensor]) -> None:
        """Set the weights from unsharded tensors, present on every rank."""
