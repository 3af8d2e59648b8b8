"""One HTML page of a plan: the table, the first layout's pipeline over time, and the memory of its ranks over time. No torch, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from motet.launcher.html_table import html_table
from motet.parallel.layout_rules import micro_batches
from motet.parallel.plan_terms import Answer, Choice, Question
from motet.parallel.simulate import BACKWARD, FORWARD, WEIGHT, Work, timeline

WIDTH, ROW, GAP = 960, 22, 6
MOST_RANKS, MOST_MICRO_BATCHES = 32, 64
FILL = {"F": "#7fc8d8", "B": "#7dbf8e", "I": "#7dbf8e", "W": "#e0c068"}
STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{padding:.2em .6em;text-align:right;border-bottom:1px solid #ddd}td:nth-child(2),th:nth-child(2){text-align:left}"
)


def page(name: str, question: Question, answer: Answer, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page."""
    best = answer.best
    works, drawn, number = pipeline_works(question, best)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Plan of {escape(name)}</title><style>{STYLE}</style>",
        f"<h1>Plan of {escape(name)}</h1>",
        html_table(rows, _cell),
        f"<h2>One step of layout 1</h2><p>{drawn} of {number} micro-batches on {best.layout.pp} pipeline ranks; "
        "forward blue, backward green, weights yellow. Times are predicted.</p>",
        pipeline_svg(works),
        "<h2>Memory over that time</h2><p>GiB of the fullest device of every pipeline rank; the line is its capacity.</p>",
        memory_svg(best, works),
    ]
    return "\n".join(parts) + "\n"


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def pipeline_works(question: Question, choice: Choice) -> tuple[list[Work], int, int]:
    """Return the passes of a step, the micro-batches that are drawn, and those that there are; times from the prediction."""
    layout = choice.layout
    number = max(micro_batches(layout, question.training.sequences))
    drawn = number if number <= MOST_MICRO_BATCHES else max(4 * layout.pp, layout.pp)
    drawn = min(number, drawn // layout.pp * layout.pp or drawn)
    busy = choice.prediction.stage_time_s
    layers = [len(one) for one in layout.layers_of_stages(question.model)]
    forward, backward = [0.0] * layout.stages, [0.0] * layout.stages
    ratio = (
        3.0 if layout.recompute == "full" else 2.0
    )  # backward passes take this many forward passes
    for rank in range(layout.pp):
        mine = layout.stages_of(rank) if layout.pp > 1 else list(range(layout.stages))
        total = sum(layers[stage] for stage in mine)
        for stage in mine:
            share = layers[stage] / total if total else 1 / len(mine)
            whole = busy[rank] / number * share
            forward[stage], backward[stage] = whole / (1 + ratio), whole * ratio / (1 + ratio)
    works = timeline(layout.schedule, layout.pp, layout.virtual_stages, drawn, forward, backward)
    return works, drawn, number


def pipeline_svg(works: Sequence[Work]) -> str:
    """Return a picture: a row per pipeline rank, time from left to right."""
    end_s = max(work.end_s for work in works) or 1.0
    ranks = min(MOST_RANKS, 1 + max(work.rank for work in works))
    boxes = [
        f'<rect x="{50 + work.start_s / end_s * WIDTH:.1f}" y="{work.rank * (ROW + GAP)}" '
        f'width="{max(0.3, (work.end_s - work.start_s) / end_s * WIDTH):.2f}" height="{ROW}" fill="{FILL[work.kind]}" '
        f'stroke="#fff" stroke-width=".3"><title>micro-batch {work.micro_batch}, stage {work.stage}, {work.kind}, '
        f"{work.start_s:.4g} to {work.end_s:.4g} s</title></rect>"
        for work in works
        if work.rank < ranks
    ]
    return _svg(ranks, boxes)


def held_over_time(works: Sequence[Work], rank: int) -> list[tuple[float, int]]:
    """Return (seconds, passes whose activations a rank holds from then on)."""
    changes = [
        (work.start_s, 1) if work.kind == FORWARD else (work.end_s, -1)
        for work in works
        if work.rank == rank and work.kind in (FORWARD, BACKWARD, WEIGHT)
    ]
    held, out = 0, []
    for when_s, change in sorted(changes):
        held += change
        out.append((when_s, held))
    return out


def memory_svg(choice: Choice, works: Sequence[Work]) -> str:
    """Return a picture: memory of every pipeline rank over a step, from its peak and from how many passes it holds at each time."""
    found = choice.prediction
    end_s = max(work.end_s for work in works) or 1.0
    ranks = min(MOST_RANKS, choice.layout.pp)
    shapes = []
    # Activations of the fullest rank are known; another rank's peak differs by its own.
    most = found.memory_parts.get("activations", 0.0)
    held_by = [held_over_time(works, rank) for rank in range(ranks)]
    tops = [max(held for _, held in steps) for steps in held_by]
    for rank, (steps, top) in enumerate(zip(held_by, tops, strict=True)):
        peak = found.stage_memory_gib[rank]
        moving = min(most, peak) * top / max(1, *tops)
        bottom = (rank + 1) * (ROW + GAP) - GAP
        points, level = [f"50,{bottom}"], bottom - ROW * (peak - moving) / found.capacity_gib
        points.append(f"50,{level:.1f}")
        for when_s, held in steps:
            x = 50 + when_s / end_s * WIDTH
            points.append(f"{x:.1f},{level:.1f}")
            gib = peak - moving + moving * held / top
            level = bottom - ROW * gib / found.capacity_gib
            points.append(f"{x:.1f},{level:.1f}")
        points += [f"{50 + WIDTH},{level:.1f}", f"{50 + WIDTH},{bottom}"]
        shapes.append(
            f'<polygon points="{" ".join(points)}" fill="#b9a7d8"><title>rank {rank}: peak {peak:.1f} of '
            f"{found.capacity_gib:.1f} GiB</title></polygon>"
            f'<line x1="50" x2="{50 + WIDTH}" y1="{bottom - ROW}" y2="{bottom - ROW}" stroke="#a33" stroke-width=".5"/>'
        )
    return _svg(ranks, shapes)


def _svg(ranks: int, shapes: Sequence[str]) -> str:
    names = [
        f'<text x="0" y="{rank * (ROW + GAP) + 15}" font-size="11">rank {rank}</text>'
        for rank in range(ranks)
    ]
    size = f'width="{WIDTH + 60}" height="{ranks * (ROW + GAP)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join([*names, *shapes])}</svg>'
