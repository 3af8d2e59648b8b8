"""How a layout must fit the sizes of its model: stages, tensor parallelism, experts.

Pure; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from motet.models.config import ModelConfig
from motet.models.rope_scaling import longest
from motet.parallel.layout.layout import Layout, balanced_stages, head_in_layers
from motet.parallel.layout.nearest import BrokenRule, nearest, nearest_text


def model_problems(layout: Layout, model: ModelConfig, sequence_length: int) -> list[BrokenRule]:
    """Return every (setting, message) of a layout that does not fit a model."""
    return [
        *_attention_problems(layout, model, sequence_length),
        *_tensor_problems(layout, model),
        *_stage_problems(layout, model),
        *_expert_problems(layout, model),
    ]


def beyond_ring(model: ModelConfig, sequence_length: int) -> list[str]:
    """Return the parts of a model's attention that context parallelism cannot compute, in words."""
    whys = []
    if 0 < model.window < sequence_length:
        whys.append(f"a window of {model.window:,} tokens (model.window)")
    if model.attention_softcap:
        whys.append(f"a cap of its scores (model.attention_softcap={model.attention_softcap:g})")
    return whys


def _attention_problems(
    layout: Layout, model: ModelConfig, sequence_length: int
) -> list[BrokenRule]:
    """Ring attention knows causal attention alone; some rotary positions know no longer text."""
    broken = []
    if layout.cp > 1 and (whys := beyond_ring(model, sequence_length)):
        why = (
            f"{layout.cp} needs attention without {' and '.join(whys)}, which the ring between "
            "context-parallel ranks does not compute; nearest: 1 (dp_shard or tp spread memory too)"
        )
        broken.append(("layout.cp", why))
    most = longest(model.rope_scaling)
    if most is not None and sequence_length > most:
        why = (
            f"{sequence_length:,} is more than the {most:,} tokens of the model's dynamic rotary "
            "positions, whose frequencies would change with the length of each sequence; at most "
            f"{most:,}"
        )
        broken.append(("data.sequence_length", why))
    return broken


def _stage_problems(layout: Layout, model: ModelConfig) -> list[BrokenRule]:
    """Every stage holds a layer; the first and the last may hold just the embedding and the head,
    if written so.
    """
    broken = []
    if model.tied_embeddings and layout.pp > 1:
        why = (
            f"true keeps embedding and head in one matrix, but layout.pp={layout.pp} holds them on "
            "different ranks; set false, or pp=1"
        )
        broken.append(("model.tied_embeddings", why))
    n_layers, stages, written = model.n_layers, layout.stages, layout.stage_layers
    if stages > n_layers + (2 if written else 0):
        virtual = layout.virtual_stages
        near = nearest(
            layout.pp, lambda pp: pp * virtual <= n_layers and (pp > 1 or virtual == 1), 1, n_layers
        )
        why = (
            f"pp {layout.pp} x virtual_stages {virtual} = {stages} stages, but the model has "
            f"{n_layers} layers; "
            f"{nearest_text(near, 'lower layout.virtual_stages as well')}"
        )
        broken.append(("layout.pp", why))
    whys = _written_stage_problems(written, n_layers, stages) if written else []
    if whys:
        balanced = list(balanced_stages(n_layers, stages, head_in_layers(model)))
        fit = f"; {balanced} fits" if stages <= n_layers else ""
        broken.append(("layout.stage_layers", f"{list(written)} {' and '.join(whys)}{fit}"))
    return broken


def _written_stage_problems(written: Sequence[int], n_layers: int, stages: int) -> list[str]:
    whys = []
    if len(written) != stages:
        whys.append(f"has {len(written)} numbers for {stages} stages (pp x virtual_stages)")
    if sum(written) != n_layers:
        whys.append(f"sums to {sum(written)}, and the model has {n_layers} layers")
    if any(count < 0 for count in written):
        whys.append("has a number below 0")
    empty = [str(i) for i, count in enumerate(written[1:-1], 1) if count == 0]
    if empty:
        whys.append(f"leaves stage {', '.join(empty)} without a layer")
    return whys


def _tensor_problems(layout: Layout, model: ModelConfig) -> list[BrokenRule]:
    if layout.tp == 1:
        return []
    sizes = {"n_heads": model.n_heads, "n_kv_heads": model.n_kv_heads}
    if any(not model.has_experts(layer) for layer in range(model.n_layers)):
        sizes["d_ffn"] = model.d_ffn
    if layout.vocabulary_parallel and model.vocabulary_size:
        sizes["vocabulary_size"] = model.vocabulary_size
    wrong = [f"model.{name}={size:,}" for name, size in sizes.items() if size % layout.tp]
    if not wrong:
        return []
    common = math.gcd(*sizes.values())
    near = nearest_text(nearest(layout.tp, lambda tp: common % tp == 0, 1, common))
    return [("layout.tp", f"{layout.tp} does not divide {' and '.join(wrong)}; {near}")]


def _expert_problems(layout: Layout, model: ModelConfig) -> list[BrokenRule]:
    if model.n_experts == 0:
        return [
            (
                f"layout.{name}",
                f"{getattr(layout, name)} needs experts (model.n_experts); nearest: 1",
            )
            for name in ("ep", "etp")
            if getattr(layout, name) > 1
        ]
    broken = []
    if layout.tp > 1 and not layout.sequence_parallel:
        why = (
            f"false with layout.tp={layout.tp}: experts take each token from one rank only; set "
            "true"
        )
        broken.append(("layout.sequence_parallel", why))
    inside = layout.fsdp * layout.tp
    ep, etp = layout.ep, layout.etp

    def fits(ep: int, etp: int) -> bool:
        whole = model.n_experts % ep == 0 and model.expert_width % etp == 0
        return whole and inside % (ep * etp) == 0 and model.d_model % (inside // (ep * etp)) == 0

    whys = _expert_reasons(layout, model)
    if whys["ep"]:
        near = nearest(ep, lambda n: fits(n, etp), 1, inside)
        told = nearest_text(near, f"no ep fits with etp={etp}")
        broken.append(("layout.ep", f"{ep} {' and '.join(whys['ep'])}; {told}"))
    if whys["etp"]:
        near = nearest(etp, lambda n: fits(ep, n), 1, inside)
        told = nearest_text(near, f"no etp fits with ep={ep}")
        broken.append(("layout.etp", f"{etp} {' and '.join(whys['etp'])}; {told}"))
    return broken


def _expert_reasons(layout: Layout, model: ModelConfig) -> dict[str, list[str]]:
    """Return why ep and etp do not fit the experts and the ranks of a stage."""
    whys: dict[str, list[str]] = {"ep": [], "etp": []}
    if model.n_experts % layout.ep:
        whys["ep"].append(f"does not divide model.n_experts={model.n_experts}")
    if model.expert_width % layout.etp:
        why = f"does not divide the {model.expert_width:,} hidden channels of one expert"
        whys["etp"].append(why)
    inside = layout.fsdp * layout.tp
    if inside % (layout.ep * layout.etp):
        blamed = "ep" if layout.ep > 1 else "etp"
        other = f"etp {layout.etp}" if blamed == "ep" else f"ep {layout.ep}"
        ranks = f"dp_shard {layout.dp_shard} x cp {layout.cp} x tp {layout.tp} = {inside} ranks"
        whys[blamed].append(f"with {other} does not divide {ranks}")
    elif model.d_model % layout.edp:
        why = (
            f"leaves {layout.edp} ranks for each expert, which do not divide "
            f"model.d_model={model.d_model:,}"
        )
        whys["ep"].append(why)
    return whys
