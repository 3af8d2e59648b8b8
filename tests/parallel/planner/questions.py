"""Small questions at random: models, clusters and batches whose every layout can be tried."""

from __future__ import annotations

from hypothesis import strategies as st

from motet.models.config import ModelConfig
from motet.parallel.cluster.description import Cluster, Group, Link, device
from motet.parallel.cost.terms import Training
from motet.parallel.planner.question import PlanQuestion
from motet.parallel.planner.space import Limits

LENGTH = 512


@st.composite
def questions(draw: st.DrawFn, others: tuple[tuple[int, int], ...] = ()) -> PlanQuestion:
    """`others`: (dense layers that come first, experts in every so many layers) besides."""
    heads = draw(st.sampled_from((2, 4)))
    experts = draw(st.sampled_from((0, 0, 4)))
    mixture = {}
    if experts:
        dense, every = draw(st.sampled_from(((0, 1), (1, 1), *others)))
        mixture = {"n_experts": experts, "d_expert": 1024, "n_dense_layers": dense}
        mixture["moe_every"] = every
    model = ModelConfig(
        vocabulary_size=draw(st.sampled_from((1024, 32_768))),
        d_model=draw(st.sampled_from((256, 1024, 4096))),
        n_layers=draw(st.integers(2, 4 if experts else 6)),
        n_heads=heads,
        n_kv_heads=2,
        d_ffn=draw(st.sampled_from((512, 4096))),
        tied_embeddings=draw(st.booleans()) and draw(st.booleans()),
        **mixture,
    )
    kinds = ("h100", "t4", "a100-40")
    groups = []
    for number in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(kinds))
        memory = draw(st.sampled_from((4.0, 6.0, 12.0, 40.0)))
        inside = Link(draw(st.sampled_from((10.0, 300.0))), 3.0, "nvlink")
        outside = Link(draw(st.sampled_from((1.0, 25.0))), 5.0, "infiniband")
        nodes, size = draw(
            st.sampled_from(((1, 2), (2, 1), (1, 4), (2, 2)) if number == 0 else ((1, 2), (2, 1)))
        )
        groups.append(
            Group(f"g{number}", device(kind, memory_gib=memory), nodes, size, inside, outside)
        )
    slow = Link(draw(st.sampled_from((0.1, 1.0, 10.0))), 100.0, "ethernet")
    training = Training(draw(st.sampled_from((4, 8))), LENGTH)
    links = {("g0", "g1"): slow}
    limits = Limits(micro_sequences=8, virtual_stages=3, replica_shapes=1_000)
    return PlanQuestion(model, Cluster(tuple(groups), links), training, top=1, limits=limits)
