"""The way down: keep what activations show to matter, then learn from the larger model (Minitron).

T tokens, N indices that are kept of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from motet.core.errors import Problem
from motet.core.schema import is_whole
from motet.models.architecture import WeightSpec
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.growth.axes import AxisMap, axis_of
from motet.models.growth.growth import Growth, Mapped
from motet.models.growth.operator import (
    DEPTH,
    TIES,
    GrowthOperator,
    OperatorFacts,
    kind_problems,
    layer_of,
    old_name,
)
from motet.models.growth.state import Contribution, Moments, Recipe
from motet.models.loss import LossSums

AxisScores = Mapping[str, Sequence[float]]
"""How much every index of an axis matters, by "stream", "layers", and, behind "blocks.N.", "heads"
(key-value heads), "queries" (query heads), "hidden" and "shared".
"""
SETTINGS = {
    "stream": "d_model",
    "heads": "n_kv_heads",
    "queries": "n_heads",
    "hidden": "d_ffn",
    "shared": "d_shared",
}


@dataclass(frozen=True)
class Prune(GrowthOperator):
    """Keep the most important layers, heads, hidden channels and channels of the stream.

    What is kept stands in the order of its importance, layers in their own order: a smaller prune
    by the same scores takes a prefix of a larger one. A key-value head takes its queries along;
    with fewer queries to each, the most important of its group stay.

    Attributes:
        scores: see `AxisScores`; of every axis that shrinks. Of equals the first stay.
        sequences: on which a run measures them.
    """

    scores: AxisScores = field(default_factory=dict)
    sequences: int = 256

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="prune",
        source="Minitron, arXiv:2407.14679, section 2; NVIDIA/TensorRT-Model-Optimizer",
        exact="never",
        loss_jump_nats=8.0,
        jump_seen="0.08 after half of the hidden channels of a model of 1M parameters went (0.35 "
        "for the first half instead); without bound when much goes",
        symmetry="nothing is copied",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0; keep: what is kept keeps its own",
        changes=(
            *DEPTH,
            *("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ffn", "d_shared"),
            *TIES,
        ),
        shrinks=True,
    )

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if not is_whole(self.sequences) or self.sequences < 1:
            return [Problem("sequences", f"{self.sequences!r} is not a whole number >= 1")]
        if target.n_layers > source.n_layers:
            why = (
                f"{target.n_layers} is more than the {source.n_layers} there are; prune takes less"
            )
            return [Problem("n_layers", why)]
        if found := self._lacking("layers", "n_layers", source.n_layers, target.n_layers):
            return found
        layers = self.layers(source, target)
        if found := kind_problems(source, target, layers, widths=False):
            return found
        for new, old in enumerate(layers):
            sizes, wanted = _sizes(source, old), _sizes(target, new)
            for axis, size in sizes.items():
                where = axis if axis == "stream" else f"blocks.{old}.{axis}"
                # Heads are scored each, and queries kept by their number in a group.
                number = source.n_heads if axis == "queries" else size
                found = self._lacking(where, SETTINGS[axis], size, wanted[axis], number)
                if found:
                    return found
        return []

    def layers(self, source: ModelConfig, target: ModelConfig) -> list[int]:
        """Return the old layers that are kept, in their order."""
        if target.n_layers == source.n_layers:
            return list(range(source.n_layers))
        return sorted(_best(self.scores["layers"], target.n_layers))

    def mapped(self, source: ModelConfig, target: ModelConfig) -> Growth:
        """See `GrowthOperator.mapped`."""
        layers = self.layers(source, target)
        kept = [self.kept(source, target, old, new) for new, old in enumerate(layers)]
        recipe = partial(self._recipe, source, layers, kept)
        return Mapped(source, target, recipe, tuple(layers))

    def kept(
        self, source: ModelConfig, target: ModelConfig, old: int, new: int
    ) -> dict[str, list[int]]:
        """Return which indices of every axis of a block stay, most important first, by the axis
        names of weights: "queries" and "keys" are of channels.
        """
        sizes, wanted = _sizes(source, old), _sizes(target, new)
        found = {
            axis: self._best_of(axis, old, wanted[axis])
            for axis, size in sizes.items()
            if axis not in ("heads", "queries") and wanted[axis] != size
        }
        ratio = sizes["queries"]
        heads, queries = list(range(sizes["heads"])), list(range(ratio))
        if wanted["heads"] != sizes["heads"]:
            heads = self._best_of("heads", old, wanted["heads"])
            found["keys"] = _channels(heads, source.head_width)
        if "keys" not in found and wanted["queries"] == ratio:
            return found
        kept = []
        for head in heads:
            mine = [head * ratio + place for place in queries]
            if wanted["queries"] != ratio:
                scores = self.scores[f"blocks.{old}.queries"]
                best = _best([scores[query] for query in mine], wanted["queries"])
                mine = [mine[place] for place in best]
            kept += mine
        found["queries"] = _channels(kept, source.head_width)
        return found

    def _best_of(self, axis: str, layer: int, wanted: int) -> list[int]:
        return _best(self.scores[axis if axis == "stream" else f"blocks.{layer}.{axis}"], wanted)

    def _lacking(
        self, where: str, setting: str, size: int, wanted: int, number: int | None = None
    ) -> list[Problem]:
        """Say that an axis would grow, or that nothing says which of it matters."""
        if wanted == size:
            return []
        if wanted > size:
            why = f"{wanted} ({where}) is more than the {size} there are; prune takes less"
            return [Problem(setting, why)]
        given, number = len(self.scores.get(where, ())), number or size
        if given == number:
            return []
        why = (
            f"{where} has {given} scores, and {number} are needed to choose {wanted} of {size}; "
            "measure them on some sequences first"
        )
        return [Problem("scores", why)]

    def _recipe(
        self,
        source: ModelConfig,
        layers: list[int],
        kept: list[dict[str, list[int]]],
        weight: WeightSpec,
    ) -> Recipe:
        name = old_name(weight.name, layers, source)
        assert name is not None
        mine = kept[layer_of(weight.name) or 0]
        maps = tuple(
            _picked(mine.get(axis_of(weight, dimension))) for dimension in range(len(weight.shape))
        )
        return Recipe(weight, (Contribution(name, maps),), self.rule)


def _sizes(config: ModelConfig, layer: int) -> dict[str, int]:
    """Return the size of every axis that may shrink; of "queries" those of a key-value head."""
    found = {
        "stream": config.d_model,
        "heads": config.n_kv_heads,
        "queries": config.n_heads // config.n_kv_heads,
    }
    if not config.has_experts(layer):
        found["hidden"] = config.ffn_width(layer)
    elif config.shared_width:
        found["shared"] = config.shared_width
    return found


def _best(scores: Sequence[float], wanted: int) -> list[int]:
    """Return the indices of the highest scores, the highest first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:wanted]


def _channels(heads: Sequence[int], width: int) -> list[int]:
    return [head * width + channel for head in heads for channel in range(width)]


def _picked(indices: Sequence[int] | None) -> AxisMap | None:
    if indices is None:
        return None
    ones_N1 = torch.ones(len(indices), 1)
    index_N1 = torch.tensor(indices)[:, None]
    return AxisMap(index_N1, ones_N1, ones_N1, torch.ones(len(indices), dtype=torch.bool))


@torch.no_grad()
def depth_scores(decoder: Decoder, run: Callable[[], None]) -> dict[str, list[float]]:
    """Return the scores of layers and of query heads: "layers" and "blocks.N.queries".

    A layer matters as much as it turns the stream: 1 - cosine of what goes in and what comes out,
    mean over tokens (block influence, arXiv:2403.03853, equation 1). A query head matters by the
    norm of what it gives to the output projection (Minitron, equation 3).

    Args:
        run: calls the decoder, a whole one in one process, on some sequences.
    """
    width, n_heads = decoder.config.head_width, decoder.config.n_heads
    turned: dict[str, list[Tensor]] = {layer: [] for layer in decoder.blocks}
    norms: dict[str, list[Tensor]] = {layer: [] for layer in decoder.blocks}

    def see_block(layer: str, _: nn.Module, inputs: Any, output: Tensor) -> None:
        cosine_BT = functional.cosine_similarity(inputs[0], output, dim=-1)
        turned[layer].append(1 - cosine_BT.flatten())

    def see_heads(layer: str, _: nn.Module, inputs: Any) -> None:
        mixed_BTHK = inputs[0].unflatten(-1, (n_heads, width))
        norms[layer].append(mixed_BTHK.norm(dim=-1).flatten(0, -2))

    hooks = []
    for layer, block in decoder.blocks.items():
        hooks.append(block.register_forward_hook(partial(see_block, layer)))
        attention: Any = block.attention
        hooks.append(attention.o_proj.register_forward_pre_hook(partial(see_heads, layer)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found = {f"blocks.{layer}.queries": torch.cat(x).mean(0).tolist() for layer, x in norms.items()}
    return {"layers": [float(torch.cat(x).mean()) for x in turned.values()], **found}


def distilled_loss(
    student: Decoder,
    teacher: Decoder,
    tokens_BT: Tensor,
    labels_BT: Tensor,
    weights: tuple[float, float] = (0.0, 1.0),
) -> LossSums:
    """Return a pruned model's losses against the model that it came from; `objective` has the
    gradient.

    Args:
        weights: of the cross-entropy, and of KL(teacher || student); Minitron trains on the
            divergence alone.
    """
    with torch.no_grad():
        follows = teacher(tokens_BT, mode="states")
    return student(tokens_BT, labels_BT, mode="loss", teachers=[follows], weights=weights)
