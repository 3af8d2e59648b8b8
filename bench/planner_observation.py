"""What a row of a table of measured runs is, and how its cells are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from motet.models.config import ModelConfig
from motet.parallel.cluster import Cluster, homogeneous
from motet.parallel.cost import Training, Traits
from motet.parallel.layout import Layout

Row = dict[str, str]


@dataclass(frozen=True)
class Observation:
    """One measured run.

    Attributes:
        source: which kind of table; `group` is its model and set, for reports.
        step_time_s: None where it did not run, or was not measured.
        out_of_memory: None where the table does not say.
        mfu_flops: model operations of a step, as the source counts them for its MFU.
    """

    source: str
    group: tuple[str, str]
    model: ModelConfig
    cluster: Cluster
    layout: Layout
    training: Training
    traits: Traits
    step_time_s: float | None
    out_of_memory: bool | None
    peak_gib: float | None
    mfu_flops: float
    peak_flops: float
    label: str


def number(row: Row, key: str, otherwise: float = 1.0) -> float:
    try:
        value = float(row.get(key) or otherwise)
    except ValueError:
        return otherwise
    return value if math.isfinite(value) else otherwise


def whole(row: Row, key: str, otherwise: int = 1) -> int:
    return int(number(row, key, otherwise))


def measured_s(row: Row) -> float | None:
    value = number(row, "step_time_s", -1.0)
    return value if value > 0 and row.get("status", "ok") == "ok" else None


def true(row: Row, key: str) -> bool:
    return row.get(key, "").strip().lower() in ("true", "1", "yes")


def gpt(row: Row, vocabulary: int, tied: bool = True, heads: int | None = None) -> ModelConfig:
    """Return a GPT: its two matrices of width 4 D are as large as three of width 8/3 D (`Traits.gated=False`)."""
    hidden = whole(row, "hidden")
    feed = whole(row, "ffn_hidden", 4 * hidden)
    n_heads = heads or whole(row, "heads", hidden // 64)
    return ModelConfig(
        vocabulary, hidden, whole(row, "layers"), n_heads, n_heads, round(feed * 2 / 3),
        head_dim=hidden // n_heads, tied_embeddings=tied,
    )  # fmt: skip


def nodes_of(devices: int, per_node: int) -> int:
    return max(1, -(-devices // per_node))


def a100_cluster(devices: int, per_node: int = 8, kind: str = "a100-80") -> Cluster:
    """DGX A100 or the like: eight cards of 200 Gbit/s per node."""
    return homogeneous(kind, nodes_of(devices, per_node), per_node, 200.0)


def even(layers: int, stages: int) -> tuple[int, ...]:
    """Split as Megatron and DeepSpeed do by default: equal numbers, the first stages one more."""
    return tuple(layers // stages + (i < layers % stages) for i in range(stages))


MEGATRON = Traits(
    gated=False,
    rotary=False,
    dropout=True,
    attention="fused",
    logits_rows=None,
    weight_bytes=2.0,
    gradient_bytes=4.0,
    reduce_bytes=4.0,
    data_overlap=0.0,
    sends_parts=True,
    selective="attention",
)
