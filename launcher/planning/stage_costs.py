"""What the stages of a family that grows cost, beside runs of each member alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from motet.core import format
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal
from motet.models import counts
from motet.models.family.costs import lineage_totals
from motet.models.family.progressive import ProgressiveFamily
from motet.parallel.cost.family import GrowthStage, progressive_cost
from motet.parallel.planner.question import PlanQuestion, RankedLayout


def stage_facts(family: ProgressiveFamily, settings: RunSettings) -> dict[str, Any]:
    """Return what every stage reads and costs, and what separate runs of the members would.

    `at_equal_cost`: each member alone for the operations that its lineage took up to its end (Yano
    et al., arXiv:2504.00623); `at_equal_tokens`: each alone on the tokens that its lineage read.
    """
    length, rows = settings.data.sequence_length, []
    tokens = flops = 0.0
    for number, (stage, start) in enumerate(zip(family.stages, family.starts, strict=True)):
        stop, each = family.stop_of(number), counts.training_flops_per_token(stage.config, length)
        read = (settings.slots_before(stop) - settings.slots_before(start)) * length
        # Maps learn by passes of the new model, on sequences that are no part of the run.
        learning = family.learning_sequences(number) * length * each
        tokens, flops = tokens + read, flops + read * each + learning
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
                "flops": read * each + learning,
                "lineage_tokens": tokens,
                "lineage_flops": flops,
            }
        )
    return {"stages": rows, **lineage_totals(rows)}


def draw(facts: Mapping[str, Any], known_vocabulary: bool) -> None:
    """Print the stages as a table, and what they save."""
    terminal.print_table([_shown(row) for row in facts["stages"]])
    print(f"\n{told(facts)}")
    if not known_vocabulary:
        print("The vocabulary is not known without a corpus: embeddings are those of 32,768 rows.")


def told(facts: Mapping[str, Any]) -> str:
    """Return what the family costs against separate runs, in words."""
    number = len(facts["stages"])
    flops, alone, longer = (
        format.power_of_ten(facts[key]) for key in ("flops", "at_equal_cost", "at_equal_tokens")
    )
    return (
        f"The family takes {flops} FLOPs. {number} separate runs that cost what each member and "
        f"those before it did take {alone}: {facts['saved_at_equal_cost']:.1%} is saved. Each "
        f"alone on as many tokens takes {longer}: {facts['saved_at_equal_tokens']:.1%} is saved."
    )


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "member": row["name"],
        "made by": row["operator"] or "start",
        "from step": f"{row['start_step']:,}",
        "steps": f"{row['steps']:,}",
        "tokens": format.short(row["tokens"]),
        "parameters": format.short(row["parameters"]),
        "without embeddings": format.short(row["parameters_non_embedding"]),
        "layers": row["layers"],
        "width": row["d_model"],
        "peak lr": f"{row['peak_lr']:.2g}",
        "FLOPs": format.power_of_ten(row["flops"]),
        "with those before": format.power_of_ten(row["lineage_flops"]),
    }


def stage_prices(
    family: ProgressiveFamily,
    settings: RunSettings,
    question: PlanQuestion,
    choice: RankedLayout,
) -> dict[str, Any]:
    """Return time, memory and operations of every stage in one layout, and of separate runs."""
    facts = stage_facts(family, settings)
    stages = [
        GrowthStage(row["name"], stage.config, choice.layout, question.training, row["tokens"])
        for stage, row in zip(family.stages, facts["stages"], strict=True)
    ]
    cost = progressive_cost(stages, choice.cluster, question.traits, question.constants)
    for row in facts["stages"]:
        found = cost.predictions[row["name"]]
        row["step_time_s"] = cost.step_time_s[row["name"]]
        row["time_s"] = row["tokens"] / found.tokens_per_s
        row["memory_gib"], row["fits"] = found.memory_gib, found.fits
    return {
        "layout": 1,
        **facts,
        "time_s": cost.time_s,
        "alone_s": cost.alone_s,
        "memory_gib": cost.memory_gib,
        "fits": cost.fits,
    }


def tell(priced: Mapping[str, Any]) -> None:
    """Print what the stages cost in a layout."""
    print("\nThe stages of the family in layout 1:")
    terminal.print_table(
        [
            {
                "member": row["name"],
                "made by": row["operator"] or "start",
                "tokens": format.short(row["tokens"]),
                "step (s)": f"{row['step_time_s']:.3g}",
                "time": format.clock(row["time_s"]),
                "FLOPs": format.power_of_ten(row["flops"]),
                "memory (GiB)": f"{row['memory_gib']:.1f}",
                "fits": "yes" if row["fits"] else "no",
            }
            for row in priced["stages"]
        ]
    )
    print(
        f"All stages take {format.clock(priced['time_s'])}; separate runs of the members on as "
        f"many tokens each {format.clock(priced['alone_s'])}. {told(priced)}"
    )
