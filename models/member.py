"""A model inside the whole one, as a value that needs no torch; `family/` says which there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from motet.models.config import ModelConfig


@dataclass(frozen=True)
class Member:
    """A model inside the whole one.

    Its weights are parts of the whole model's: some blocks, and of every axis the first channels,
    heads or experts, or with `groups` the first of each of so many equal groups. Grouped, a rank
    of tensor or expert parallelism that holds whole groups holds the same share of every member.

    Attributes:
        name: letters, digits, `.`, `_` and `-`, as in `half`.
        config: of the plain model that it is by itself, once exported.
        layers: numbers of the whole model's blocks that it runs, in order.
        groups: of the axes that ranks may divide: heads, hidden channels and experts. The residual
            stream is never divided, and has one.
    """

    name: str
    config: ModelConfig
    layers: tuple[int, ...]
    groups: int = 1


class Cut(NamedTuple):
    """What a member takes of one axis: the first `kept / groups` of each of `groups` equal groups.

    Attributes:
        whole, kept: channels, heads or experts of the whole model, and of the member.
    """

    whole: int
    kept: int
    groups: int = 1

    def of(self, size: int, parts: int = 1) -> tuple[int, int]:
        """Return (kept, groups) of one of `parts` equal parts of the axis.

        Args:
            size: of that part, counted in channels where the axis may count heads.

        Raises:
            ValueError: parts that cut a group.
        """
        # Not divmod: the compiler does not trace it.
        kept, groups = self.kept * size // self.whole, self.groups // parts
        uneven = self.kept * size % self.whole or self.groups % parts
        if uneven or kept % groups or size % groups:
            raise ValueError(f"{parts} parts of {size} each cut a group of {self}")
        return kept, groups


class BlockCuts(NamedTuple):
    """What a member takes of one block; None = all of an axis.

    Attributes:
        stream: channels of the residual stream.
        heads: key-value heads, each with its queries.
        hidden: hidden channels of the feed-forward without experts.
        experts, expert: routed experts, and hidden channels of each.
        shared: hidden channels of the block that every token visits.
    """

    stream: Cut | None = None
    heads: Cut | None = None
    hidden: Cut | None = None
    experts: Cut | None = None
    expert: Cut | None = None
    shared: Cut | None = None


UNCUT = BlockCuts()


@lru_cache(maxsize=1024)
def block_cuts(whole: ModelConfig, member: Member) -> tuple[BlockCuts, ...]:
    """Return what a member takes of each of its blocks, in the order of `member.layers`."""
    config, groups = member.config, member.groups

    def cut(of: int, kept: int, groups: int = groups) -> Cut | None:
        return None if of == kept else Cut(of, kept, groups)

    return tuple(
        BlockCuts(
            stream=cut(whole.d_model, config.d_model, 1),
            heads=cut(whole.n_kv_heads, config.n_kv_heads),
            **(
                {
                    "experts": cut(whole.n_experts, config.n_experts),
                    "expert": cut(whole.expert_width, config.expert_width),
                    "shared": cut(whole.shared_width, config.shared_width, 1),
                }
                if whole.has_experts(layer)
                else {"hidden": cut(whole.ffn_width(layer), config.ffn_width(at))}
            ),
        )
        for at, layer in enumerate(member.layers)
    )


class Exit(NamedTuple):
    """A member whose loss is taken on the way of a larger one's pass.

    Attributes:
        member: has the first of that one's blocks, at the same widths.
        labels: weight of its cross-entropy.
    """

    member: Member
    labels: float


class Term(NamedTuple):
    """One member's pass over a micro-batch, and what its loss is.

    The loss is `labels` x cross-entropy with the labels + `distill` x KL(teacher || member), over
    the same tokens (arXiv:1503.02531, at temperature 1), and that of its exits.

    Attributes:
        member: None is the whole model.
        labels: weight of the cross-entropy.
        distill: weight of the divergence from the teacher.
        teacher: whose distribution is followed: a member that stands before it in the same choice
            (None: the whole model), without gradient.
        kept: weight of the divergence from the kept teacher, a second set of weights
            (`Family.teacher_update`).
        skips: blocks that this pass leaves out, of those that the member has (layer dropout).
        exits: members whose losses are taken on the way; each meets norm and head after its last
            block, or where that would have been.
        times: how often each block of the whole model runs, one pass after the other
            (`family/virtual_depth.py`); () = once.
    """

    member: Member | None
    labels: float = 1.0
    distill: float = 0.0
    teacher: Member | None = None
    kept: float = 0.0
    skips: tuple[int, ...] = ()
    exits: tuple[Exit, ...] = ()
    times: tuple[int, ...] = ()

    @property
    def weight(self) -> float:
        """Weights of its loss without its exits; of the reported loss it has this share."""
        return self.labels + self.distill + self.kept

    @property
    def trains(self) -> bool:
        """Whether it has a gradient."""
        return self.weight + sum(out.labels for out in self.exits) > 0

    @property
    def members(self) -> tuple[Member | None, ...]:
        """Who has a loss in it: the member, then its exits."""
        return self.member, *(out.member for out in self.exits)

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the blocks that it runs, of a whole model of `n_layers`."""
        held = range(n_layers) if self.member is None else self.member.layers
        return tuple(layer for layer in held if layer not in self.skips)


Choice = tuple[Term, ...]
"""The passes over one micro-batch; their losses are added up."""


class TeacherUpdate(NamedTuple):
    """What happens to the kept teacher before a step: keep x teacher + (1 - keep) x the weights.

    Attributes:
        at: its number; an update is made once, and the first of all is a copy.
        keep: 0 copies.
    """

    at: int
    keep: float = 0.0


class StepChoices(NamedTuple):
    """Who trains in one step, on one rank.

    Attributes:
        mine: for each micro-batch of this rank.
        names: of all who train anywhere in the step, in one order on all ranks.
        shares: who trains on each equal share of the whole step, the same on all ranks.
        teacher: what happens to the kept teacher before the step; None: nothing.
    """

    mine: tuple[Choice, ...]
    names: tuple[str | None, ...]
    shares: tuple[Choice, ...] = ()
    teacher: TeacherUpdate | None = None


def names_in(choice: Choice) -> tuple[str | None, ...]:
    """Return who trains in a choice, each once, in order."""
    return tuple(dict.fromkeys(name_of(member) for term in choice for member in term.members))


def name_of(member: Member | None) -> str | None:
    """Return a member's name; None for the whole model."""
    return None if member is None else member.name


def trained_by(choice: Choice) -> tuple[str | None, ...]:
    """Return the names of those whose pass over a micro-batch has a gradient: a teacher that is
    only followed does not train.
    """
    trained = [
        member
        for term in choice
        for member, weight in zip(
            term.members, (term.weight, *(out.labels for out in term.exits)), strict=True
        )
        if weight > 0
    ]
    return tuple(name_of(member) for member in trained)
