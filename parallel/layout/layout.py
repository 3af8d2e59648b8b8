"""How one run is split over ranks: a value that needs no torch.

Every rule that it must obey is in `rules.py`.

A layout is a grid of ranks. Outermost first: pipeline stage (pp), replica (dp_replicate), shard
(dp_shard), context (cp), tensor (tp).
The experts of a mixture use another grid over the same ranks of a stage: replica, expert shard
(edp), expert (ep), expert tensor (etp), with dp_shard x cp x tp = edp x ep x etp (parallel folding,
arXiv:2504.14960).
"""

from __future__ import annotations

from dataclasses import dataclass

from motet.core.errors import UserError
from motet.models.architecture import head_product
from motet.models.config import ModelConfig
from motet.models.counts import matmul_parameters

ENGINES = ("native", "deepspeed", "accelerate")
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
RECOMPUTE = ("none", "selective", "full")


class LayoutError(UserError):
    """A layout that cannot be run here; the message says which setting, why not, and what would
    work.
    """


@dataclass(frozen=True)
class Place:
    """Where one rank stands in the grid of a layout."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """One way to split a run over `world_size` ranks.

    Attributes:
        engine: what runs it.
        dp_replicate: data-parallel replicas that each hold a whole (sharded) model and add their
            gradients.
        dp_shard: ranks that divide weights, gradients and optimizer state and read different data
            (FSDP2).
        tp, pp, cp, ep, etp: degrees of tensor, pipeline, context, expert and expert-tensor
            parallelism.
        stage_layers: layers of every pipeline stage in order, pp x virtual_stages entries; () =
            `balanced_stages`.
        virtual_stages: pipeline stages per rank.
        schedule: order of forward and backward passes, one of `SCHEDULES`.
        micro_sequences: sequences of one forward pass on one replica.
        recompute: activations that the backward pass makes again: "none", "selective" (all but
            matrix products), "full".
        sequence_parallel: with tp > 1, split the residual stream along the sequence between
            tensor-parallel regions.
        vocabulary_parallel: with tp > 1, split embedding, head and loss over the vocabulary; logits
            never exist whole.
        shares: micro-batches of the same step that each of the dp_replicate replicas takes, in
            proportion; () = equal.
        placement: which process of the launch stands at each position of the grid; () = in order.
            Processes take their position as their rank (`rank_of_process`), because groups of ranks
            are always in ascending order.
    """

    engine: str = "native"
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    stage_layers: tuple[int, ...] = ()
    virtual_stages: int = 1
    schedule: str = "1f1b"
    micro_sequences: int = 1
    recompute: str = "none"
    sequence_parallel: bool = True
    vocabulary_parallel: bool = True
    shares: tuple[int, ...] = ()
    placement: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp_replicate * self.fsdp * self.tp

    @property
    def fsdp(self) -> int:
        """Ranks that divide weights: data shards and context ranks together."""
        return self.dp_shard * self.cp

    @property
    def edp(self) -> int:
        """Ranks of one replica and stage that divide the same experts' weights."""
        return self.fsdp * self.tp // (self.ep * self.etp)

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.pp * self.virtual_stages

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: groups of ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    def place(self, rank: int) -> Place:
        """Return where a rank stands."""
        position, tp = divmod(rank, self.tp)
        position, cp = divmod(position, self.cp)
        position, dp_shard = divmod(position, self.dp_shard)
        pp, dp_replicate = divmod(position, self.dp_replicate)
        return Place(pp, dp_replicate, dp_shard, cp, tp)

    def rank_of_process(self, process: int) -> int:
        """Return the rank of the process launched with a number: its position in the grid."""
        return self.placement.index(process) if self.placement else process

    def dp_rank(self, rank: int) -> int:
        """Return the data-parallel rank of a rank: those that share it read the same sequences."""
        place = self.place(rank)
        return place.dp_replicate * self.dp_shard + place.dp_shard

    def is_dp_leader(self, rank: int) -> bool:
        """Return whether a rank answers for its data-parallel rank: the ledger and sums count each
        of those once.
        """
        place = self.place(rank)
        return place.pp == place.cp == place.tp == 0

    def dp_sequences(self, sequences: int, dp_rank: int) -> tuple[int, int]:
        """Return (offset, count) of the sequences of one step that a data-parallel rank takes;
        ranks in order hold them in order.
        """
        replica, shard = divmod(dp_rank, self.dp_shard)
        shares = self.shares or (1,) * self.dp_replicate
        unit, rest = divmod(sequences, sum(shares) * self.dp_shard)
        assert rest == 0, "checked by `problems`"
        count = unit * shares[replica]
        return unit * self.dp_shard * sum(shares[:replica]) + shard * count, count

    def layers_of_stages(self, model: ModelConfig) -> list[range]:
        """Return the layers of every stage."""
        counts = self.stage_layers or balanced_stages(
            model.n_layers, self.stages, head_in_layers(model)
        )
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def stages_of(self, pipeline_rank: int) -> list[int]:
        """Return the stages that one pipeline rank holds: every pp-th, or both arms of a V."""
        if self.schedule == "zbv_zero_bubble":
            return [pipeline_rank, self.stages - 1 - pipeline_rank]
        return list(range(pipeline_rank, self.stages, self.pp))


def head_in_layers(model: ModelConfig) -> float:
    """Return how many layers' worth of matrix products the head does; the embedding's lookups do
    none.
    """
    head = head_product(model).multiplies
    return head * model.n_layers / (matmul_parameters(model) - head)


def balanced_stages(n_layers: int, stages: int, head: float) -> tuple[int, ...]:
    """Return layers per stage, so that the longest stage is as short as it can be; of equals, the
    ends get fewer.

    Args:
        n_layers, stages: how many there are.
        head: load of the last stage besides its layers, in layers.
    """
    counts = [0] * stages
    load = [0.0] * (stages - 1) + [head if stages > 1 else 0.0]
    for _ in range(n_layers):
        stage = min(range(stages), key=lambda s: (load[s], abs(2 * s - stages + 1)))
        counts[stage] += 1
        load[stage] += 1.0
    return tuple(counts)
