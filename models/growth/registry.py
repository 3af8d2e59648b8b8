"""The operators by name, and pairs of them as `width+depth`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from motet.core.errors import Problem, suggest
from motet.models.config import ModelConfig, ModelError
from motet.models.growth.depth import (
    DepthOperator,
    FrozenSubstrate,
    IdentityBlocks,
    Incremental,
    Interpolate,
    Stack,
)
from motet.models.growth.growth import Chained, Growth
from motet.models.growth.ligo import LigoOperator
from motet.models.growth.mango import MangoOperator
from motet.models.growth.multilevel import Coalesce, Decoalesce
from motet.models.growth.operator import GrowthOperator, OperatorFacts
from motet.models.growth.prefix import Prefix
from motet.models.growth.prune import Prune
from motet.models.growth.state import Moments
from motet.models.growth.upcycling import Upcycling
from motet.models.growth.width import AdvancedKnowledge, Bert2Bert, HyperCloning, Sparkling

OPERATORS: dict[str, type[GrowthOperator]] = {
    kind.facts.name: kind
    for kind in (
        *(Stack, Interpolate, IdentityBlocks, FrozenSubstrate, Incremental),
        *(HyperCloning, Bert2Bert, AdvancedKnowledge, Sparkling, Prefix),
        *(Coalesce, Decoalesce, Upcycling, LigoOperator, MangoOperator, Prune),
    )
}


@dataclass(frozen=True)
class WidthThenDepth(GrowthOperator):
    """A wider model, and then more layers of it."""

    width: GrowthOperator | None = None
    depth: DepthOperator | None = None

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="width+depth",
        source="both operators",
        exact="where both are",
        loss_jump_nats=float("inf"),
        jump_seen="the sum of both",
        symmetry="as both say",
        moments=Moments.KEEP,
        state="one after the other",
        changes=(),
    )

    @property
    def name(self) -> str:
        """See `GrowthOperator.name`."""
        assert self.width is not None
        assert self.depth is not None
        return f"{self.width.name}+{self.depth.name}"

    def problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.problems`: those of both, each with the model between them."""
        assert self.width is not None
        assert self.depth is not None
        between = self.between(source, target)
        found = self.width.problems(source, between)
        return found or self.depth.problems(between, target)

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        return []

    def mapped(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """See `GrowthOperator.mapped`."""
        assert self.width is not None
        assert self.depth is not None
        between = self.between(source, target)
        first, second = self.width.mapped(source, between), self.depth.mapped(between, target)
        return Chained(first, second)

    def between(self, source: ModelConfig, target: ModelConfig) -> ModelConfig:
        """Return the model between: as wide as the new one, as deep as the old one."""
        assert self.depth is not None
        widths = None
        if target.layer_ffn is not None and target.n_layers >= source.n_layers:
            layers = self.depth.layers(source, target)
            at = [layers.index(old) if old in layers else 0 for old in range(source.n_layers)]
            widths = tuple(target.layer_ffn[new] for new in at)
        return replace(
            target,
            n_layers=source.n_layers,
            layer_ffn=widths,
            n_dense_layers=source.n_dense_layers,
            moe_every=source.moe_every,
            # One of the two unties; the second does.
            tied_embeddings=source.tied_embeddings,
        )


def operator(name: str, **options: Any) -> GrowthOperator:
    """Return the operator of a name, or of `width+depth` as in "hypercloning+identity".

    Args:
        options: its fields; of a pair each goes to the operator that has it, to both where both do.

    Raises:
        ModelError: a name or an option that there is not; the message has the nearest ones.
    """
    kinds = [_kind(part.strip()) for part in name.split("+")]
    if len(kinds) > 2 or (len(kinds) == 2 and not issubclass(kinds[1], DepthOperator)):
        depths = ", ".join(
            key for key, kind in OPERATORS.items() if issubclass(kind, DepthOperator)
        )
        raise ModelError(
            f"operator {name!r} is no pair of a width and a depth; write width+depth, where depth "
            f"is one of {depths}"
        )
    known = {field.name for kind in kinds for field in fields(kind)}
    for key in options:
        if key not in known:
            raise ModelError(
                f"operator {name!r} has no option {key!r}{suggest(key, known)}; it has "
                f"{', '.join(sorted(known))}"
            )
    made = [
        kind(**{field.name: options[field.name] for field in fields(kind) if field.name in options})
        for kind in kinds
    ]
    if len(made) == 1:
        return made[0]
    assert isinstance(made[1], DepthOperator)
    return WidthThenDepth(width=made[0], depth=made[1])


def stated_jump(name: str) -> float:
    """Return the most that the loss of a trained model is expected to rise by, nats: of a pair the
    sum of both.
    """
    return sum(_kind(part.strip()).facts.loss_jump_nats for part in name.split("+"))


def _kind(name: str) -> type[GrowthOperator]:
    if name not in OPERATORS:
        raise ModelError(
            f"operator {name!r} is not one of {', '.join(OPERATORS)}{suggest(name, OPERATORS)}"
        )
    return OPERATORS[name]
