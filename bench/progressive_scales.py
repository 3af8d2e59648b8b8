"""How large and how long the arms of `bench/progressive.py` are: on two cores, on one GPU, and as a
test has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from motet.models.config import ModelConfig

VOCABULARY_SIZE = 257
"""Bytes, and an end of document."""


@dataclass(frozen=True)
class Scale:
    """Sizes and lengths that all arms share; lengths are steps.

    Attributes:
        whole: the largest model; half: sizes of one of half its width.
        every: steps between measurements on `held_out_often` of the `held_out` sequences.
        fall: share of a stage of the family over which its rate falls to 0.
        grid: learning rates that are tried from scratch; one is taken as it is.
        family: of the largest member alone; smaller ones have as many tokens for each parameter.
    """

    whole: ModelConfig
    half: Mapping[str, int]
    sequences: int = 16
    length: int = 128
    held_out: int = 384
    held_out_often: int = 96
    every: int = 25
    warmup: int = 40
    rewarm: int = 20
    fall: float = 0.2
    base: int = 300
    grown: int = 400
    scratch: int = 800
    tuning: int = 300
    learn: int = 100
    family: int = 720
    depths: tuple[str, ...] = ("1/8", "1/4", "1/2")
    cycle: Mapping[str, float] = field(
        default_factory=lambda: {"large": 60, "small": 300, "grown": 350, "alpha": 0.5}
    )
    increment: Mapping[str, Any] = field(
        default_factory=lambda: {"depths": (2, 4, 6, 8), "phase": 50, "after": 300}
    )
    grid: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    precision: str = "fp32"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    @property
    def shallow(self) -> ModelConfig:
        return replace(self.whole, n_layers=self.whole.n_layers // 4)

    @property
    def narrow(self) -> ModelConfig:
        return replace(self.whole, **self.half)  # type: ignore[arg-type]

    @property
    def small(self) -> ModelConfig:
        return replace(self.narrow, n_layers=self.whole.n_layers // 2)


CORES = Scale(
    ModelConfig(VOCABULARY_SIZE, 64, 8, 4, 4, 128),
    {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "d_ffn": 64},
)
GPU = Scale(
    ModelConfig(VOCABULARY_SIZE, 896, 16, 14, 14, 2688),
    {"d_model": 448, "n_heads": 7, "n_kv_heads": 7, "head_dim": 64, "d_ffn": 1344},
    sequences=32,
    length=256,
    increment={"depths": (4, 8, 12, 16), "phase": 50, "after": 300},
    grid=(1e-3,),
    precision="bf16",
)
"""A family of 19, 39, 77 and 154 million parameters, embedding and head aside."""
TINY = Scale(
    ModelConfig(VOCABULARY_SIZE, 16, 8, 4, 4, 32),
    {"d_model": 8, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4, "d_ffn": 16},
    sequences=4,
    length=32,
    held_out=8,
    held_out_often=4,
    every=1,
    warmup=1,
    rewarm=1,
    base=3,
    grown=8,
    scratch=9,
    tuning=2,
    learn=2,
    family=16,
    cycle={"large": 1, "small": 3, "grown": 7, "alpha": 0.5},
    increment={"depths": (2, 4, 6, 8), "phase": 1, "after": 6},
    grid=(4e-3,),
)
"""To see every arm run to its end; it answers nothing."""
SCALES = {"cores": CORES, "gpu": GPU, "tiny": TINY}
