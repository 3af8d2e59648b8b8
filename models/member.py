"""A model inside the whole one, as a value that needs no torch; `family/` says which there are."""

from __future__ import annotations

from dataclasses import dataclass

from motet.models.config import ModelConfig


@dataclass(frozen=True)
class Member:
    """A model inside the whole one.

    Attributes:
        name: letters, digits, `.`, `_` and `-`, as in `half`.
        config: of the plain model that it is by itself, once exported.
        layers: numbers of the whole model's blocks that it runs, in order.
    """

    name: str
    config: ModelConfig
    layers: tuple[int, ...]


Choice = tuple[Member | None, ...]
"""The members that train on one micro-batch; None is the whole model."""
