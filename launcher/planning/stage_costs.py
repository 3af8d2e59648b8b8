"""What the stages of a family that grows cost, beside runs of each member alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from motet.core import format
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal
from motet.launcher.planning.stage_proposals import differences, flow
from motet.models import counts
from motet.models.config import ModelConfig
from motet.models.family.base import WHOLE
from motet.models.family.costs import lineage_totals, mean_passes
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.staged import WHERE
from motet.parallel.cost.family import GrowthStage, StepPrices, progressive_cost
from motet.parallel.cost.terms import Prediction
from motet.parallel.planner.question import PlanQuestion, RankedLayout

STEPS_COUNTED = 256
"""Steps of a stage, spread over it, in which passes of slices are counted."""
DRAWS = 4
"""Shares of a step that are counted where the number of micro-batches decides how many there are.
"""


def stage_facts(family: ProgressiveFamily, settings: RunSettings) -> dict[str, Any]:
    """Return what every stage reads and costs, and what separate runs of the members would.

    `at_equal_cost`: each member alone for the operations that its lineage took up to its end (Yano
    et al., arXiv:2504.00623); `at_equal_tokens`: each alone on the tokens that its lineage read.
    Stages that their loss ends are as long as they may be; `earliest` has all of it where each ends
    as early as it may.
    """
    facts = _laid(family, settings, family.planned)
    shortest = family.shortest() if any(map(family.loss_ends, range(len(family.stages)))) else ()
    return facts | ({"earliest": _laid(family, settings, shortest)} if shortest else {})


def _laid(
    family: ProgressiveFamily, settings: RunSettings, starts: Sequence[int]
) -> dict[str, Any]:
    """Return the facts of stages that begin at these steps."""
    length, rows = settings.data.sequence_length, []
    tokens = flops = 0.0
    stops = (*starts[1:], settings.steps)
    for number, (stage, start) in enumerate(zip(family.stages, starts, strict=True)):
        stop, each = stops[number], counts.training_flops_per_token(stage.config, length)
        read = (settings.slots_before(stop) - settings.slots_before(start)) * length
        passes = stage_passes(family, number, start, stop)
        members = _members(_models(family, number), passes, read, length)
        virtual = family.virtual_flops(number, start, stop)
        ran = sum(one["flops"] for one in members) if members else read * (virtual or each)
        # Maps learn by passes of the new model, on sequences that are no part of the run.
        learning = family.learning_sequences(number) * length * each
        spent = ran + read * family.teacher_flops(number) + learning
        tokens, flops = tokens + read, flops + spent
        rows.append(
            {
                "name": stage.label,
                "operator": family.told(number),
                "start_step": start,
                "steps": stop - start,
                "tokens": read,
                "parameters": counts.parameters(stage.config),
                "parameters_non_embedding": counts.parameters_non_embedding(stage.config),
                "layers": stage.config.n_layers,
                "d_model": stage.config.d_model,
                "peak_lr": family.peak_lr(number),
                "flops_per_token": each,
                "flops": spent,
                "lineage_tokens": tokens,
                "lineage_flops": flops,
                **({"width_multipliers": m} if (m := family.multipliers(stage.label)) else {}),
                **({"members": members} if members else {}),
                **({"virtual_flops_per_token": virtual} if virtual else {}),
            }
        )
    return {"stages": rows, **lineage_totals(rows)}


def stage_passes(
    family: ProgressiveFamily, number: int, start: int, stop: int
) -> Mapping[str, float]:
    """Return how often the model of a stage and its slices pass over a token of it, by name; {}
    where no slices train. Counted in steps that are spread over the stage.
    """
    if (nested := family.nests.get(number)) is None:
        return {}
    slices = {member.name: member for member in nested.members()}
    steps = range(0, stop - start, max(1, (stop - start) // STEPS_COUNTED))
    passes = mean_passes(nested, slices, steps, nested.draws or DRAWS).passes
    label = family.stages[number].label
    return {label if name == WHOLE else name: count for name, count in passes.items()}


def _members(
    models: Mapping[str, ModelConfig], passes: Mapping[str, float], tokens: float, length: int
) -> list[dict[str, Any]]:
    """Return what the model and the slices of a stage cost, each its own passes; [] without."""
    if not passes:
        return []
    each = {
        name: counts.training_flops_per_token(config, length) for name, config in models.items()
    }
    return [
        {
            "member": name,
            "parameters": counts.parameters(models[name]),
            "passes": passes.get(name, 0.0),
            "flops_per_token": each[name],
            "flops": tokens * passes.get(name, 0.0) * each[name],
        }
        for name in sorted(models, key=each.__getitem__)
    ]


def _models(family: ProgressiveFamily, number: int) -> dict[str, ModelConfig]:
    """Return the model of a stage and the slices of it, by name."""
    stage, nested = family.stages[number], family.nests.get(number)
    slices = () if nested is None else nested.members()
    return {stage.label: stage.config} | {one.name: one.config for one in slices}


def draw(facts: Mapping[str, Any], known_vocabulary: bool) -> None:
    """Print the stages as a table, and what they save."""
    earliest = facts.get("earliest", facts)["stages"]
    terminal.print_table([_shown(*pair) for pair in zip(facts["stages"], earliest, strict=True)])
    _draw_slices(facts)
    print(f"\n{told(facts)}")
    if not known_vocabulary:
        print("The vocabulary is not known without a corpus: embeddings are those of 32,768 rows.")


def _draw_slices(facts: Mapping[str, Any]) -> None:
    """Print the slices that stages train."""
    for row in facts["stages"]:
        if not row.get("members"):
            continue
        print(f"\nStage {row['name']} trains slices of its model:")
        terminal.print_table(
            [
                {
                    "member": one["member"],
                    "parameters": format.short(one["parameters"]),
                    "passes per token": f"{one['passes']:.2f}",
                    "FLOPs": format.power_of_ten(one["flops"]),
                }
                for one in row["members"]
            ]
        )


def told(facts: Mapping[str, Any]) -> str:
    """Return what the family costs against separate runs, in words."""
    number = sum(len(row.get("members") or [row]) for row in facts["stages"])
    flops, alone, longer = (
        format.power_of_ten(facts[key]) for key in ("flops", "at_equal_cost", "at_equal_tokens")
    )
    return (
        f"The family takes {flops} FLOPs. {number} separate runs that cost what each member and "
        f"those before it did take {alone}: {facts['saved_at_equal_cost']:.1%} is saved. Each "
        f"alone on as many tokens takes {longer}: {facts['saved_at_equal_tokens']:.1%} is saved."
        f"{_told_earliest(facts)}"
    )


def _told_earliest(facts: Mapping[str, Any]) -> str:
    """Return what is said where the loss ends stages."""
    if (other := facts.get("earliest")) is None:
        return ""
    return (
        " So where every stage is as long as it may be; where the loss ends each as early as it "
        f"may, the family takes {format.power_of_ten(other['flops'])} FLOPs, and "
        f"{other['saved_at_equal_cost']:.1%} and {other['saved_at_equal_tokens']:.1%} are saved."
    )


def _range(least: str, most: str) -> str:
    return most if least == most else f"{least} to {most}"


def _shown(row: Mapping[str, Any], early: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "member": row["name"],
        "made by": row["operator"] or "start",
        "from step": _range(f"{early['start_step']:,}", f"{row['start_step']:,}"),
        "steps": _range(*(f"{n:,}" for n in sorted((early["steps"], row["steps"])))),
        "tokens": _range(*map(format.short, sorted((early["tokens"], row["tokens"])))),
        "parameters": format.short(row["parameters"]),
        "without embeddings": format.short(row["parameters_non_embedding"]),
        "layers": row["layers"],
        "width": row["d_model"],
        "peak lr": f"{row['peak_lr']:.2g}",
        **_shown_multipliers(row),
        "FLOPs": format.power_of_ten(row["flops"]),
        "with those before": format.power_of_ten(row["lineage_flops"]),
    }


def _shown_multipliers(row: Mapping[str, Any]) -> dict[str, str]:
    if (rules := row.get("width_multipliers")) is None:
        return {}
    rates = sorted({1.0, *(rate for each in rules["learning_rate"].values() for rate in each)})
    told = _range(f"{rates[0]:.3g}", f"{rates[-1]:.3g}")
    return {"lr x": told, "logits x": f"{rules['output']:.3g}"}


def stage_prices(
    family: ProgressiveFamily,
    settings: RunSettings,
    question: PlanQuestion,
    choice: RankedLayout,
    own: Sequence[RankedLayout],
) -> dict[str, Any]:
    """Return time, memory and operations of every stage in its own layout, and of separate runs.

    Args:
        choice: the run's layout.
        own: of every stage.
    """
    facts = stage_facts(family, settings)
    priced = _priced(family, facts, question, own)
    if early := facts.get("earliest"):
        priced["earliest"] = _priced(family, early, question, own)
    for row, one in zip(priced["stages"], own, strict=True):
        row["layout"] = differences(one, choice)
    return priced


def _priced(
    family: ProgressiveFamily,
    facts: dict[str, Any],
    question: PlanQuestion,
    own: Sequence[RankedLayout],
) -> dict[str, Any]:
    teachers = [family.teacher_of(number) for number in range(len(family.stages))]
    stages = [
        GrowthStage(
            row["name"],
            stage.config,
            one.layout,
            question.training,
            row["tokens"],
            None if teacher is None else family.stages[teacher].config,
        )
        for stage, row, teacher, one in zip(
            family.stages, facts["stages"], teachers, own, strict=True
        )
    ]
    cost = progressive_cost(stages, own[-1].cluster, question.traits, question.constants)
    alone_s = cost.alone_s
    for number, (row, one) in enumerate(zip(facts["stages"], own, strict=True)):
        alone_s += _price(family, number, row, cost.predictions[row["name"]], question, one)
    return {
        "layout": 1,
        **facts,
        "time_s": sum(row["time_s"] for row in facts["stages"]),
        "alone_s": alone_s,
        "memory_gib": max(row["memory_gib"] for row in facts["stages"]),
        "fits": all(row["fits"] for row in facts["stages"]),
    }


def _price(
    family: ProgressiveFamily,
    number: int,
    row: dict[str, Any],
    found: Prediction,
    question: PlanQuestion,
    choice: RankedLayout,
) -> float:
    """Price a stage; return the seconds that its slices take in runs of their own, together."""
    # Layers that run again take as much longer as they take more operations.
    more = row.get("virtual_flops_per_token", row["flops_per_token"]) / row["flops_per_token"]
    row["step_time_s"] = found.step_time_s * more
    row["memory_gib"], row["fits"] = found.memory_gib, found.fits
    alone_s = _price_slices(family, number, row, question, choice) if "members" in row else 0.0
    tokens_a_step = found.tokens_per_s * found.step_time_s
    row["time_s"] = row["tokens"] / tokens_a_step * row["step_time_s"]
    return alone_s * float(row["lineage_tokens"]) / tokens_a_step


def _price_slices(
    family: ProgressiveFamily,
    number: int,
    row: dict[str, Any],
    question: PlanQuestion,
    choice: RankedLayout,
) -> float:
    """Price a step of the stage whose slices train, by their passes; return the seconds of one step
    of each slice in a run of its own, together.
    """
    asked = (choice.cluster, choice.layout, question.training, question.traits)
    stage, nested = family.stages[number], family.nests[number]
    prices = StepPrices(stage.config, _models(family, number), *asked, question.constants)
    taught = nested.loss in ("distill", "poa")
    cost = prices.of({one["member"]: one["passes"] for one in row["members"]}, taught)
    row["step_time_s"] = cost.step_time_s
    row["memory_gib"], row["fits"] = cost.memory_gib, cost.fits
    return sum(once.step_time_s for name, (once, _) in prices.alone.items() if name != stage.label)


def tell(priced: Mapping[str, Any]) -> None:
    """Print what the stages cost, each in its layout."""
    print("\nThe stages of the family in layout 1:")
    earliest = priced.get("earliest", priced)
    pairs = list(zip(priced["stages"], earliest["stages"], strict=True))
    terminal.print_table(
        [
            {
                "member": row["name"],
                "made by": row["operator"] or "start",
                "tokens": _range(*map(format.short, sorted((early["tokens"], row["tokens"])))),
                "step (s)": f"{row['step_time_s']:.3g}",
                "time": _range(*map(format.clock, sorted((early["time_s"], row["time_s"])))),
                "FLOPs": format.power_of_ten(row["flops"]),
                "memory (GiB)": f"{row['memory_gib']:.1f}",
                "fits": "yes" if row["fits"] else "no",
            }
            for row, early in pairs
        ]
    )
    for number, row in enumerate(priced["stages"]):
        if row["layout"]:
            print(
                f"{row['name']} in a layout of its own, which is predicted to be faster; in the "
                f"run.yaml: {WHERE}.stages[{number}].layout: {flow(row['layout'])}"
            )
    time = _range(*map(format.clock, sorted((earliest["time_s"], priced["time_s"]))))
    print(
        f"All stages take {time}; separate runs of the members on as many tokens each "
        f"{format.clock(priced['alone_s'])}. {told(priced)}"
    )
