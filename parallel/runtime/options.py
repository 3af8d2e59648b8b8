"""What an engine is told: how to train, and the sequences of one forward pass. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from motet.models.config import ModelConfig


class Noise(Protocol):
    """What is added to the input embeddings of some tokens of one row."""

    @property
    def row(self) -> int: ...

    @property
    def offset(self) -> int: ...

    def values(self, width: int) -> npt.NDArray[np.float32]:
        """Return the noise of the tokens from `offset` on, [tokens, width]."""
        ...


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
        compile: torch.compile every block.
        clip_norm: largest gradient norm, 0 for no clipping.
        z_loss: weight of the squared log-partition.
        betas, eps, weight_decay, fused: of AdamW; decay applies to matrices other than the
            embedding.
        mask_update: values outside all slices of a step's members stay as they are: no momentum,
            no decay.
        by_users: a value's gradient is a mean over the shares of a step whose members used it, not
            over all.
        teacher: a second set of the weights is kept for members to follow.
        taught_by: a trained model of these sizes is kept instead, and never changes.
        base_width: a model that the learning rate is for: that of a matrix which reads r times as
            many channels is divided by r, and its decay multiplied, so that a step takes as much of
            it (`width_multipliers`); None: all have it as it is.
        seed: of the initial weights.
        zero_stage, offload, deepspeed: of the DeepSpeed engine: 1 to 3; "none", "optimizer" or
            "parameters"; settings passed through.
    """

    precision: str = "fp32"
    compile: bool = False
    clip_norm: float = 1.0
    z_loss: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True
    mask_update: bool = False
    by_users: bool = False
    teacher: bool = False
    taught_by: ModelConfig | None = None
    base_width: ModelConfig | None = None
    seed: int = 0
    zero_stage: int = 2
    offload: str = "none"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
