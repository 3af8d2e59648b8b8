"""One HTML page of a plan: the table, where the first layout's time and memory go, its pipeline and
its memory over time.

No torch, no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from motet.launcher.output.page import drawing, plain_page, table
from motet.launcher.planning import page_head
from motet.launcher.planning import summary as plan_words
from motet.launcher.planning.charts import (
    MOST_RANKS,
    legend,
    memory_legend,
    memory_svg,
    pipeline_svg,
    pipeline_works,
    shares_html,
)
from motet.launcher.planning.table import COLUMNS, words
from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout


def page(
    name: str,
    question: PlanQuestion,
    answer: PlanAnswer,
    rows: Sequence[Mapping[str, Any]],
    tokens: float,
    run_yaml: str = "run.yaml",
    cluster: str | None = None,
) -> str:
    """Return the page; `rows` as of `plan_table.row`, `tokens` of the whole run; `run_yaml` and
    `cluster` (None: this machine) are files as they were given.
    """
    best = answer.best
    summary = "".join(
        f"<li>{escape(line)}</li>" for line in plan_words.lines(question, answer, tokens)
    )
    head = page_head.facts(question, best, tokens), page_head.command(best, run_yaml, cluster)
    parts = [
        page_head.html(*head),
        table([_headed(row) for row in rows], _cell),
        f"<ul>{summary}</ul>",
        f"<h2>Layout 1: {escape(words(best))}</h2>",
        *_shares(best),
        *_over_time(question, best),
    ]
    return plain_page("Motet plan", f"Plan of {name}", parts)


def _shares(best: RankedLayout) -> list[str]:
    """Where the time of a step and the memory of the fullest device go."""
    prediction = best.prediction
    low, high = prediction.interval_s
    return [
        f"<p>A step takes {prediction.step_time_s:.3g} s ({low:.3g} to {high:.3g}).</p>",
        shares_html(prediction.parts, "s"),
        f"<p>The fullest device holds {prediction.memory_gib:.1f} of "
        f"{prediction.capacity_gib:.1f} GiB.</p>",
        shares_html(prediction.memory_parts, "GiB"),
    ]


def _over_time(question: PlanQuestion, best: RankedLayout) -> list[str]:
    """The pipeline and the memory over a step, as pictures."""
    works, drawn, number = pipeline_works(question, best)
    each = "one pipeline rank" if best.layout.pp == 1 else f"{best.layout.pp} pipeline ranks"
    drawn_of = f"{number}" if drawn == number else f"The first {drawn} of {number}"
    batches = "micro-batch" if number == 1 else "micro-batches"
    more = f", of which {MOST_RANKS} are drawn" if best.layout.pp > MOST_RANKS else ""
    return [
        f"<h2>Its pipeline over time</h2><p>{drawn_of} {batches} on {each}{more}; times are "
        "predicted.</p>",
        legend(works),
        drawing(pipeline_svg(works)),
        "<h2>Its memory over that time</h2><p>The fullest device of each pipeline rank.</p>",
        memory_legend(best),
        drawing(memory_svg(best, works)),
    ]


def _headed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {COLUMNS[name]: value for name, value in row.items()}


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
