"""What a row of a table of measured runs is, and how its cells are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motet.models.config import ModelConfig
from motet.parallel.cluster.description import Cluster, homogeneous
from motet.parallel.cost.stages import Training, Traits
from motet.parallel.layout.layout import Layout

Row = dict[str, str]
NAMED = ("h100", "h200", "gb200", "b200", "mi300x", "a100", "v100", "t4", "l40s")
"""Kinds that a column of devices may name."""


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
    """Return a GPT: its two matrices of width 4 D are as large as three of width 8/3 D
    (`Traits.gated=False`).
    """
    hidden = whole(row, "hidden")
    feed = whole(row, "ffn_hidden", 4 * hidden)
    n_heads = heads or whole(row, "heads", hidden // 64)
    return ModelConfig(
        vocabulary, hidden, whole(row, "layers"), n_heads, n_heads, round(feed * 2 / 3),
        head_dim=hidden // n_heads, tied_embeddings=tied,
    )  # fmt: skip


def known(table: Mapping[str, Any], row: Row, key: str) -> Any:
    """Return what a cell's word stands for.

    Raises:
        ValueError: a word that the table does not have.
    """
    word = row.get(key, "")
    if word not in table:
        raise ValueError(f"{key}={word!r} is none of {', '.join(table)}")
    return table[word]


def kind_of(text: str, otherwise: str) -> str:
    """Return the catalogue's kind of the devices that a description such as "H200-141GB, 8/node"
    names.
    """
    words = text.lower()
    for name, kind in (("a100-40", "a100-40"), ("a100_40", "a100-40"), ("500w", "h100-96-500w")):
        if name in words:
            return kind
    named = next((name for name in NAMED if re.search(rf"\b{name}(\b|_)", words)), None)
    if named is None or (named == "a100" and otherwise.startswith("a100")):
        return otherwise
    return {"a100": "a100-80", "v100": "v100-16"}.get(named, named)


def unsound(one: Observation) -> str | None:
    """Return why a row is no layout that could run."""
    layout, model = one.layout, one.model
    if layout.world_size > one.cluster.devices:
        return f"tp, pp, dp and cp need {layout.world_size} devices, it has {one.cluster.devices}"
    if min(layout.dp_shard, layout.edp, layout.micro_sequences, one.training.sequences) < 1:
        return "no rank is left for data parallelism, or no sequence for a micro-batch"
    if layout.pp * layout.virtual_stages > model.n_layers + 2:
        return f"{layout.pp} x {layout.virtual_stages} stages for {model.n_layers} layers"
    if layout.ep > max(1, model.n_experts):
        return f"ep={layout.ep} for {model.n_experts} experts"
    return None


def nodes_of(devices: int, per_node: int) -> int:
    return max(1, -(-devices // per_node))


def a100_cluster(devices: int, per_node: int = 8, kind: str = "a100-80") -> Cluster:
    """DGX A100 or the like: eight cards of 200 Gbit/s per node."""
    return homogeneous(kind, nodes_of(devices, per_node), per_node, 200.0)


def even(layers: int, stages: int) -> tuple[int, ...]:
    """Split as Megatron and DeepSpeed do by default: equal numbers, the first stages one more."""
    return tuple(layers // stages + (i < layers % stages) for i in range(stages))


MEGATRON = Traits(
    shared_host=1.0,
    tensor_host=1.0,
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
