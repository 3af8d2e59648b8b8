"""Published schedules of growth, by the name that `family.options.preset` gives. Torch-free.

A preset fills in what `stages` leaves out: sizes and operators when the options are read, lengths
and learning rates once the length of the run is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from motet.core.errors import UserError, suggest
from motet.core.schema import MappingReader, is_sequence
from motet.models.config import ModelConfig
from motet.models.counts import parameters, parameters_non_embedding, training_flops_per_token
from motet.models.family.growing_stages import GrowingStage
from motet.models.family.stage_lengths import LENGTHS, RunShape, StageLength, amount

GSTACK_FACTOR = 4
MINITRON_SHARE = 0.03
"""Tokens of the pruned model over those of the model that it came from."""
CYCLE_FACTOR, CYCLE_ALPHA, CYCLE_SHARES = 2, 0.25, (0.05, 0.5)
LR_EXPONENT = 1 / 3
"""Of sizes, in the peak learning rate of `yano2025`: muP's rate of hidden matrices falls with the
width, and the number of parameters grows as its cube where depth grows along."""


class PresetRun(NamedTuple):
    """What a preset is fitted to: stages as they were read, the run, and the family's options."""

    stages: list[GrowingStage]
    run: RunShape
    options: Mapping[str, Any]


class Preset(NamedTuple):
    """One published schedule.

    Attributes:
        takes: options beside `stages` that it reads.
        written: gives the stages as run.yaml would have them.
        fitted: gives them lengths and learning rates.
    """

    takes: tuple[str, ...]
    written: Callable[[MappingReader, ModelConfig], list[Any]]
    fitted: Callable[[PresetRun], list[GrowingStage]]


def preset_options(read: MappingReader, whole: ModelConfig) -> list[Any]:
    """Return the stages as run.yaml would have them, with what a preset fills in."""
    name = read.values.get("preset")
    if name is not None and (not isinstance(name, str) or name not in PRESETS):
        hint = suggest(str(name), PRESETS)
        read.problem("preset", f"{name!r} is not one of {', '.join(PRESETS)}{hint}")
        return []
    for key in ("factor", "tokens", "alpha", "larger"):
        if key in read.values and (name is None or key not in PRESETS[name].takes):
            whose = [other for other, one in PRESETS.items() if key in one.takes]
            read.problem(key, f"belongs to preset {' or '.join(whose)}; leave it out")
    return _listed(read) if name is None else PRESETS[name].written(read, whole)


def _listed(read: MappingReader) -> list[Any]:
    """Return `stages` as they stand."""
    asked = read.values.get("stages")
    if not is_sequence(asked) or not asked:
        said = "is not set" if asked is None else f"{asked!r:.60} is no list of stages"
        what = "write [{name: small, depth: 0.5, tokens: 2m}, {operator: stack}], or take a preset"
        read.problem("stages", f"{said}; {what}")
        return []
    return list(asked)


def _refuse_stages(read: MappingReader) -> None:
    if "stages" in read.values:
        preset = read.values["preset"]
        read.problem("stages", f"preset {preset} makes them itself; leave them out, or the preset")


def _written_yano(read: MappingReader, whole: ModelConfig) -> list[Any]:
    """Return the stages with the operators of the preset: bert2BERT's advanced knowledge
    initialization for widths, interpolation for depth, as AquilaMoE has both.
    """
    found: list[Any] = []
    for number, stage in enumerate(_listed(read)):
        if not isinstance(stage, Mapping):
            found.append(stage)  # told when it is read
            continue
        for key in LENGTHS:
            if key in stage:
                why = "preset yano2025 says how long each stage is; leave it out, or the preset"
                read.problem(f"stages[{number}].{key}", why)
        stage, before = dict(stage), found[-1] if found else None
        sized = {"parameters", "model"} & {*stage, *(before or ())}
        if isinstance(before, Mapping) and "operator" not in stage and not sized:
            wider, deeper = (before.get(key, 1) != stage.get(key, 1) for key in ("width", "depth"))
            names = ["bert2bert-aki"] * wider + ["interpolate"] * deeper
            stage |= {"operator": "+".join(names)} if names else {}
        found.append({k: v for k, v in stage.items() if k not in LENGTHS})
    return found


def _fitted_yano(asked: PresetRun) -> list[GrowingStage]:
    """Return stages after each of which its model has cost what it would alone (arXiv:2504.00623):
    D_i tokens alone, as many for each parameter, cost C_i = D_i f_i FLOPs, and stage i reads
    (C_i - C_{i-1}) / f_i tokens.

    Raises:
        UserError: sizes that do not rise.
    """
    stages, run = asked.stages, asked.run
    sizes = [parameters_non_embedding(stage.config) for stage in stages]
    if sizes != sorted(set(sizes)):
        told = ", ".join(f"{size:,}" for size in sizes)
        raise UserError(
            f"family.options.stages: preset yano2025 needs sizes that rise; they have {told} "
            "parameters outside embedding and head"
        )
    flops = [training_flops_per_token(stage.config, run.sequence_length) for stage in stages]
    costs = [size * each for size, each in zip(sizes, flops, strict=True)]
    shares = [
        (cost - before) / each
        for cost, before, each in zip(costs, [0.0, *costs[:-1]], flops, strict=True)
    ]
    total = run.tokens(0, run.steps)
    peak, ruled = run.peak_lr(sizes[-1]), "width_multipliers" in asked.options
    return [
        replace(
            stage,
            length=stage.length or StageLength("tokens", total * share / sum(shares)),
            lr=stage.lr or (None if ruled else peak * (sizes[-1] / size) ** LR_EXPONENT),
        )
        for stage, share, size in zip(stages, shares, sizes, strict=True)
    ]


def _written_gstack(read: MappingReader, whole: ModelConfig) -> list[Any]:
    """Return a base of a `factor`th of the layers, then the whole stack of it."""
    _refuse_stages(read)
    factor = read.whole("factor", GSTACK_FACTOR, 2)
    if whole.n_layers % factor:
        fits = [n for n in range(2, whole.n_layers + 1) if whole.n_layers % n == 0]
        told = ", ".join(map(str, fits)) or "none: one layer cannot be stacked"
        read.problem(
            "factor", f"{factor} does not divide {whole.n_layers} layers; there are {told}"
        )
        return []
    base: dict[str, Any] = {"name": "base", "depth": f"1/{factor}"}
    return [base | _tokens(read), {"operator": "stack"}]


def _tokens(read: MappingReader) -> dict[str, Any]:
    asked = read.values.get("tokens")
    if asked is not None and amount(asked) is None:
        read.refuse("tokens", asked, "a number such as 2m or 1.5b")
        asked = None
    return {} if asked is None else {"tokens": asked}


def gstack_tokens(n_parameters: float, flops: float) -> float:
    """Return the tokens that a base trains on before it is stacked (arXiv:2405.15319, equation of
    the guideline): log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74.

    Args:
        n_parameters: of the model that it grows into.
        flops: 6 N D of that model on all tokens.
    """
    return float(10 ** (0.88 * math.log10(n_parameters) + 163.27 / math.log10(flops) - 5.74))


def _fitted_gstack(asked: PresetRun) -> list[GrowingStage]:
    """Return the base with the guideline's length.

    Raises:
        UserError: that is no less than the run.
    """
    base, whole = asked.stages
    if base.length is not None:
        return asked.stages
    size, total = parameters(whole.config), asked.run.tokens(0, asked.run.steps)
    tokens = gstack_tokens(size, 6.0 * size * total)
    if tokens >= total:
        raise UserError(
            f"family.options.preset: gstack's guideline gives the base {tokens:.3g} tokens, and "
            f"the run has {total:,}: it was fitted to runs of billions; set family.options.tokens"
        )
    return [replace(base, length=StageLength("tokens", tokens)), whole]


def _written_upcycle(read: MappingReader, whole: ModelConfig) -> list[Any]:
    """Return a dense model, then a mixture whose experts are copies of its feed-forward."""
    _refuse_stages(read)
    if not whole.n_experts:
        read.problem("preset", "upcycle makes a dense model a mixture; set model.n_experts")
        return []
    if not (length := _tokens(read)):
        read.problem("tokens", "is not set: how long the dense model trains")
    dense = {"name": "dense", "model": {"n_experts": 0, "d_ffn": whole.expert_width}}
    return [dense | length, {"operator": "upcycling"}]


def _written_vcycle(read: MappingReader, whole: ModelConfig) -> list[Any]:
    """Return a little of the large model, a small one made of it, and the large one, blended with
    what the small one became.
    """
    _refuse_stages(read)
    factor = read.whole("factor", CYCLE_FACTOR, 2)
    alpha = read.number("alpha", CYCLE_ALPHA, 0.0, 1.0)
    share = f"1/{factor}"
    return [
        {"name": "first", "depth": 1},
        {"name": "small", "depth": share, "width": share, "operator": "coalesce"},
        {"operator": "decoalesce", "blend": alpha},
    ]


def _fitted_vcycle(asked: PresetRun) -> list[GrowingStage]:
    """Return the stages with the published shares of the run's steps (arXiv:2404.07999: 5,000 and
    50,000 steps of 100,000).
    """
    lengths = [max(1, round(share * asked.run.steps)) for share in CYCLE_SHARES]
    first, small, whole = asked.stages
    warmup = min(asked.run.warmup_steps, lengths[0] // 2)
    return [
        replace(first, length=StageLength("steps", lengths[0]), warmup_steps=warmup),
        replace(small, length=StageLength("steps", lengths[1])),
        whole,
    ]


def _written_minitron(read: MappingReader, whole: ModelConfig) -> list[Any]:
    """Return a larger model, then what is left of it, which follows it alone."""
    _refuse_stages(read)
    if not read.mapping("larger"):
        why = "is not set: sizes of the model that is pruned, such as {d_ffn: 4096}"
        read.problem("larger", why)
        return []
    large = {"name": "large", "model": dict(read.mapping("larger"))}
    return [large | _tokens(read), {"operator": "prune", "distill": {}}]


def _fitted_minitron(asked: PresetRun) -> list[GrowingStage]:
    """Return the larger model with all but the published share of the tokens (arXiv:2407.14679: the
    pruned model reads less than 3 % of what the larger did).
    """
    large, small = asked.stages
    tokens = asked.run.tokens(0, asked.run.steps) / (1 + MINITRON_SHARE)
    return [replace(large, length=large.length or StageLength("tokens", tokens)), small]


def _written_apollo(read: MappingReader, whole: ModelConfig) -> list[Any]:
    """Return the stages with the sharing of layers, and interpolation between them."""
    found = list(_listed(read))
    for number, stage in enumerate(found):
        if isinstance(stage, Mapping):
            last = number == len(found) - 1
            filled = {} if last else {"virtual_depth": "lvps"}
            filled |= {"operator": "interpolate"} if number else {}
            found[number] = filled | dict(stage)
    return found


PRESETS: Mapping[str, Preset] = {
    "yano2025": Preset((), _written_yano, _fitted_yano),
    "gstack": Preset(("factor", "tokens"), _written_gstack, _fitted_gstack),
    "upcycle": Preset(("tokens",), _written_upcycle, lambda asked: asked.stages),
    "minitron": Preset(("larger", "tokens"), _written_minitron, _fitted_minitron),
    "vcycle": Preset(("factor", "alpha"), _written_vcycle, _fitted_vcycle),
    "apollo": Preset((), _written_apollo, lambda asked: asked.stages),
}
