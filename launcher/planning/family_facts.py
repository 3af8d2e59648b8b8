"""The members of a family before it trains: sizes, costs, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from motet.core import format
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal
from motet.models import counts
from motet.models.config import ModelConfig
from motet.models.family.base import WHOLE, Family, Member, Term, choices
from motet.models.family.costs import choice_flops
from motet.models.family.space import size_of
from motet.models.member import names_in

STEPS_COUNTED = 256
"""Steps, spread over the run, of which the draws are counted."""
GIB = 1 << 30
BAR = 24


def family_facts(
    family: Family, members: Sequence[Member], settings: RunSettings, draws: int
) -> dict[str, Any]:
    """Return what `motet family show` tells.

    `share_of_passes` and `flops_per_token` of the family are counted in `STEPS_COUNTED` of its
    steps, not assumed.
    """
    whole, length = family.whole, settings.data.sequence_length
    passes, flops = _drawn(family, members, settings, draws)
    rows = [_row(None, whole, whole, length)]
    rows += [_row(member, member.config, whole, length) for member in members]
    rows.sort(key=lambda row: (row["parameters"], row["name"]))
    for row in rows:
        row["share_of_passes"] = passes.get(row["name"], 0.0)
    each = [row["flops_per_token"] for row in rows]
    return {
        "kind": settings.family.kind,
        "members": rows,
        "draws": draws,
        "by_replica": family.by_replica,
        "teacher_gib": 4 * counts.parameters(whole) / GIB if family.has_teacher else 0.0,
        "flops_per_token": flops,
        "flops_per_token_of_all_alone": sum(each),
        "flops_per_token_of_the_whole": max(each),
    }


def _drawn(
    family: Family, members: Sequence[Member], settings: RunSettings, draws: int
) -> tuple[dict[str, float], float]:
    """Return each member's share of the passes, and the operations of a token of a mean step."""
    by_name = {member.name: member for member in members}
    whole, length = family.whole, settings.data.sequence_length
    passes: dict[str, float] = {}
    flops, steps = 0.0, sampled_steps(settings)
    for step in steps:
        for choice in choices(family, by_name, step, draws) or [(Term(None),)] * draws:
            flops += choice_flops(choice, whole, length) / draws
            for name in (name or WHOLE for term in choice for name in names_in((term,))):
                passes[name] = passes.get(name, 0.0) + 1.0
    total = sum(passes.values())
    return {name: number / total for name, number in passes.items()}, flops / len(steps)


def sampled_steps(settings: RunSettings) -> range:
    """Return about `STEPS_COUNTED` steps, spread over the run."""
    return range(0, settings.steps, max(1, settings.steps // STEPS_COUNTED))


def _row(
    member: Member | None, config: ModelConfig, whole: ModelConfig, length: int
) -> dict[str, Any]:
    parameters = counts.parameters(config)
    return {
        "name": WHOLE if member is None else member.name,
        "parameters": parameters,
        "parameters_non_embedding": counts.parameters_non_embedding(config),
        "flops_per_token": counts.training_flops_per_token(config, length),
        "weights_gib": 2 * parameters / GIB,
        "shares_of_the_whole": parameters / counts.parameters(whole),
        "layers": list(range(whole.n_layers) if member is None else member.layers),
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "d_ffn": list(config.layer_ffn) if config.layer_ffn else config.d_ffn,
        **({"n_experts": config.n_experts} if whole.n_experts else {}),
        "groups": 1 if member is None else member.groups,
    }


def draw(facts: Mapping[str, Any], known_vocabulary: bool) -> None:
    """Print the members as a table, and what of the whole model each is."""
    members = facts["members"]
    terminal.print_table([_shown(row) for row in members])
    print()
    most = max(row["parameters"] for row in members)
    width = max(len(row["name"]) for row in members)
    for row in members:
        bar = "█" * max(1, round(BAR * row["parameters"] / most))
        print(f"{row['name']:<{width}}  {bar:<{BAR}}  {_layers(row, members)}")
    for row in members:
        if (asked := _asked(row["name"])) is not None:
            has = row["parameters_non_embedding"]
            print(
                f"{row['name']} was asked for: {has:,} without embeddings, {has / asked - 1:+.1%}"
            )
    per_token = facts["flops_per_token"]
    alone, whole = facts["flops_per_token_of_all_alone"], facts["flops_per_token_of_the_whole"]
    shares = f"{facts['draws']} share{'s' if facts['draws'] > 1 else ''}"
    print(
        f"\nA step is drawn in {shares}; a token of it costs {format.short(per_token)} FLOPs on "
        f"average: {per_token / whole:.2f} x the whole model's, {per_token / alone:.2f} x all "
        "members trained alone on as many tokens each.\n"
        "Weights and optimizer are those of the whole model, whoever trains: no member holds a "
        "copy."
    )
    if facts["teacher_gib"]:
        print(
            f"The teacher is a second set of the whole model's weights: {facts['teacher_gib']:.3g} "
            "GiB in fp32, divided over ranks as the model is."
        )
    if not known_vocabulary:
        print("The vocabulary is not known without a corpus: embeddings are those of 32,768 rows.")


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    widths = row["d_ffn"]
    hidden = f"{min(widths):,} to {max(widths):,}" if isinstance(widths, list) else f"{widths:,}"
    return {
        "member": row["name"],
        "parameters": format.parameters(row["parameters"]),
        "without embeddings": format.parameters(row["parameters_non_embedding"]),
        "FLOPs/token": format.short(row["flops_per_token"]),
        "weights (bf16)": f"{row['weights_gib']:.3g} GiB",
        "layers": len(row["layers"]),
        "width": row["d_model"],
        "heads": f"{row['n_heads']}/{row['n_kv_heads']}",
        "hidden": hidden,
        **({"experts": row["n_experts"]} if "n_experts" in row else {}),
        "of the whole": format.percent(row["shares_of_the_whole"]),
        "of the passes": format.percent(row["share_of_passes"]),
    }


def _asked(name: str) -> int | None:
    """Return the size that a member is named for, if it is."""
    try:
        return size_of(name)
    except ValueError:
        return None


def _layers(row: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> str:
    """Return a mark for each layer of the whole model: kept or left out."""
    depth = max(len(other["layers"]) for other in members)
    return "".join("■" if layer in row["layers"] else "·" for layer in range(depth))
