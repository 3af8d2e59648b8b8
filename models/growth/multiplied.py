"""Growth between models that have width multipliers (`models.width_multipliers`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from motet.models.config import ModelConfig
from motet.models.growth.growth import Growth
from motet.models.growth.state import MOMENTS, Read, WeightState


@dataclass(frozen=True, eq=False)
class Multiplied(Growth):
    """A growth whose new model multiplies its logits by another number, and computes what it would
    with the old one's.

    What the operator wrote into the head, or where that is tied into the norm before it, it gives
    back: of a head that reads r copies of each channel it made 1 / r, and the multiplier is that
    now. Gradients of that weight are as many times smaller, so its moments are divided.

    Attributes:
        inner: the same growth, to a model with the old one's multiplier.
        target: the new model, with its own.
        scales: of first values by name, for weights that begin anew (`initial_scales`).
    """

    inner: Growth
    target: ModelConfig
    scales: Mapping[str, float]

    @property
    def source(self) -> ModelConfig:  # type: ignore[override]
        """The config before."""
        return self.inner.source

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the operator is."""
        return self.inner.exact

    @property
    def frozen(self) -> frozenset[str]:  # type: ignore[override]
        """What the operator freezes."""
        return self.inner.frozen

    def sources(self, name: str) -> tuple[str, ...]:
        """See `Growth.sources`."""
        return self.inner.sources(name)

    def make(self, name: str, read: Read) -> WeightState:
        """See `Growth.make`."""
        state, factor = self.inner.make(name, read), self.factor(name)
        if factor == 1.0:
            return state
        return {
            key: value * factor
            if key == "weight"
            else value / factor ** (2 if key == "exp_avg_sq" else 1)
            if key in MOMENTS
            else value
            for key, value in state.items()
        }

    def new_elements(self, name: str) -> Tensor | None:
        """See `Growth.new_elements`."""
        return self.inner.new_elements(name)

    def local_source(self, name: str) -> str | None:
        """See `Growth.local_source`."""
        return self.inner.local_source(name) if self.factor(name) == 1.0 else None

    def factor(self, name: str) -> float:
        """Return what a weight is, over what the operator alone makes it."""
        if name == ("norm.weight" if self.target.tied_embeddings else "head.weight"):
            return self.source.output_multiplier / self.target.output_multiplier
        return 1.0 if self.inner.sources(name) else self.scales.get(name, 1.0)
