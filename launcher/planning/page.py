"""One HTML page of a plan: the table, where the first layout's time and memory go, its pipeline and
its memory over time.

No torch, no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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
from motet.launcher.planning.html_table import html_table
from motet.launcher.planning.table import COLUMNS, words
from motet.parallel.planner.question import PlanAnswer, PlanQuestion

STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem;max-width:88rem;color:#222}h2{margin-top:2rem}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:.3rem "
    ".6rem;text-align:right;border-bottom:1px solid #ddd}"
    "th{white-space:nowrap}td{white-space:nowrap}td:nth-child(2),th:nth-child(2),td:nth-child(3),th:nth-child(3)"
    "{text-align:left;white-space:normal;min-width:7rem}td:nth-child(2){min-width:13rem}.wide{overflow-x:auto}"
    "svg{max-width:100%;height:auto}.legend span{margin-right:1.2em;white-space:nowrap}"
    ".legend i{display:inline-block;width:.9em;height:.9em;margin-right:.35em;vertical-align:-.1em}"
)


def page(
    name: str,
    question: PlanQuestion,
    answer: PlanAnswer,
    rows: Sequence[Mapping[str, Any]],
    tokens: float,
) -> str:
    """Return the page; `rows` as of `plan_table.row`, `tokens` of the whole run."""
    best = answer.best
    found = best.prediction
    works, drawn, number = pipeline_works(question, best)
    said = "".join(
        f"<li>{escape(line)}</li>" for line in plan_words.lines(question, answer, tokens)
    )
    low, high = found.interval_s
    each = "one pipeline rank" if best.layout.pp == 1 else f"{best.layout.pp} pipeline ranks"
    drawn_of = f"{number}" if drawn == number else f"The first {drawn} of {number}"
    batches = "micro-batch" if number == 1 else "micro-batches"
    more = f", of which {MOST_RANKS} are drawn" if best.layout.pp > MOST_RANKS else ""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Plan of "
        f"{escape(name)}</title><style>{STYLE}</style>",
        f"<h1>Plan of {escape(name)}</h1>",
        "<div "
        f"class='wide'>{html_table([_headed(row) for row in rows], _cell)}</div><ul>{said}</ul>",
        f"<h2>Layout 1: {escape(words(best))}</h2>",
        f"<p>A step takes {found.step_time_s:.3g} s ({low:.3g} to {high:.3g}).</p>",
        shares_html(found.parts, "s"),
        f"<p>The fullest device holds {found.memory_gib:.1f} of {found.capacity_gib:.1f} GiB.</p>",
        shares_html(found.memory_parts, "GiB"),
        f"<h2>Its pipeline over time</h2><p>{drawn_of} {batches} on {each}{more}; times are "
        "predicted.</p>",
        legend(works),
        pipeline_svg(works),
        "<h2>Its memory over that time</h2><p>The fullest device of each pipeline rank.</p>",
        memory_legend(best),
        memory_svg(best, works),
    ]
    return "\n".join(parts) + "\n</html>\n"


def _headed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {COLUMNS[name]: value for name, value in row.items()}


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
