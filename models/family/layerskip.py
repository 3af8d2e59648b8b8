"""LayerSkip's recipe: blocks are dropped, the later the more, and early exits have losses of their
own. Torch-free.

Source: LayerSkip (arXiv:2404.16710), sections 4.1 and 4.2; its training code is not public. Ours
where the paper does otherwise: a block is dropped for a whole share of a step, on all ranks, and
not for single sequences, so that a dropped block costs nothing; exits are the family's members, not
every block; and a chance is a function of seed, step, share and block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from motet.core.schema import MappingReader
from motet.models.config import ModelConfig
from motet.models.keyed import key_of, uniforms
from motet.models.member import UNCUT, Exit, Member, Term, block_cuts

KEYS = (
    *("dropout", "dropout_steps", "exit_scale"),
    *("curriculum", "every", "curriculum_steps"),
)
CURRICULA = ("none", "rotational", "gradual")


class LayerSkip(NamedTuple):
    """Layer dropout and early exits over one run.

    Attributes:
        seed, n_layers: of the run and of the whole model.
        exits: members of the first blocks, the smallest first.
        dropout: chance that the last block is dropped; block l of L: x (2^(l / (L - 1)) - 1).
        dropout_steps: over so many steps the chances grow from 0, as 2^(t / (T - 1)) - 1; 0: they
            are whole from the first.
        exit_scale: weight of the exits over the last block's: e(l) = scale x (0 + 1 + .. + l) for
            an exit after block l, e(L - 1) = L - 1 + scale x (0 + 1 + .. + L - 2); they are made
            to sum to 1.
        curriculum: which exits have a loss: "none": all; "rotational": in turn every `every`-th;
            "gradual": the deepest from the first step, the shallowest after
            (n - 1) / n x `curriculum_steps`.
    """

    seed: int
    n_layers: int
    exits: tuple[Member, ...]
    dropout: float = 0.1
    dropout_steps: int = 0
    exit_scale: float = 0.2
    curriculum: str = "rotational"
    every: int = 2
    curriculum_steps: int = 0

    def terms(self, step: int, share: int, draws: int) -> list[Term]:
        """Return the pass of a share: the whole model's, with its exits."""
        weights = self.weights(step)
        exits = tuple(Exit(member, weight) for member, weight in weights.items() if member)
        return [Term(None, weights[None], skips=self.skips(step, share), exits=exits)]

    def skips(self, step: int, share: int) -> tuple[int, ...]:
        """Return the blocks that a share leaves out."""
        last = self.n_layers - 1
        if not self.dropout or last < 1:
            return ()
        grown = min(step / max(self.dropout_steps - 1, 1), 1.0) if self.dropout_steps else 1.0
        most = self.dropout * (2.0**grown - 1.0)
        chances = uniforms(key_of("layer dropout", self.seed, step, share), 0, self.n_layers)
        return tuple(
            layer
            for layer, chance in enumerate(chances.tolist())
            if chance < most * (2.0 ** (layer / last) - 1.0)
        )

    def weights(self, step: int) -> dict[Member | None, float]:
        """Return the weights of the exits that have a loss in a step, and of the whole model
        (None).
        """
        last = self.n_layers - 1
        found: dict[Member | None, float] = {}
        for number, member in enumerate(self.exits):
            if self._is_on(number, step):
                layer = member.layers[-1]
                found[member] = self.exit_scale * layer * (layer + 1) / 2
        found[None] = last + self.exit_scale * (last - 1) * last / 2
        total = sum(found.values()) or 1.0
        return {member: weight / total for member, weight in found.items()}

    def _is_on(self, number: int, step: int) -> bool:
        if self.curriculum == "rotational":
            return number % self.every == step % self.every
        if self.curriculum == "gradual":
            before = len(self.exits) - 1 - number
            return step * len(self.exits) >= before * self.curriculum_steps
        return True

    def problems(self, steps: int) -> list[str]:
        """Say what of it never comes in a run of so many steps."""
        found = []
        first = (len(self.exits) - 1) * self.curriculum_steps / max(len(self.exits), 1)
        if self.curriculum == "gradual" and first >= steps:
            why = f"the shallowest exit would have its first loss at step {first:.0f}"
            found.append(f"layerskip.curriculum_steps={self.curriculum_steps}: {why}")
        if self.dropout_steps > steps:
            found.append(f"layerskip.dropout_steps={self.dropout_steps}: chances are never whole")
        return [f"{why}, but the run has {steps} steps" for why in found]


def read_layerskip(
    read: MappingReader, seed: int, whole: ModelConfig, members: Sequence[Member]
) -> LayerSkip:
    """Return what `family.options.layerskip` asks for; problems go to the reader."""
    inner = read.inner("layerskip", KEYS)
    known = LayerSkip(seed, whole.n_layers, tuple(sorted(members, key=lambda m: len(m.layers))))
    for member in known.exits:
        first = member.layers == tuple(range(len(member.layers)))
        if not first or any(cuts != UNCUT for cuts in block_cuts(whole, member)):
            why = (
                "is no early exit: it must have the first layers at all widths; set depth: first, "
                "and n_layers alone"
            )
            read.problem("members", f"member {member.name!r} {why}")
        elif len(member.layers) == 1:
            why = "has one layer, whose loss has the weight 0 by the rule; give it two or more"
            read.problem("members", f"member {member.name!r} {why}")
    found = known._replace(
        dropout=inner.number("dropout", known.dropout, 0.0, 0.99),
        dropout_steps=inner.whole("dropout_steps", 0, 1),
        exit_scale=inner.number("exit_scale", known.exit_scale, 0.0, 1.0),
        curriculum=inner.choice("curriculum", CURRICULA, known.curriculum),
        every=inner.whole("every", min(known.every, max(len(members), 1)), 1),
        curriculum_steps=inner.whole("curriculum_steps", 0, 1),
    )
    if found.curriculum == "gradual" and not found.curriculum_steps:
        inner.problem("curriculum_steps", "must say over how many steps exits are switched on")
    if found.curriculum == "rotational" and found.every > len(found.exits):
        why = f"{found.every} is more than the {len(found.exits)} exits: some steps would have none"
        inner.problem("every", why)
    return found
