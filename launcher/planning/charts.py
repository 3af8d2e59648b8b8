"""Pictures of a plan as SVG: phases of a step, the pipeline over time, memory over time.

Pure; no torch.

Rows are as high as their number allows: one rank gets a tall picture, 64 ranks get thin rows with
every eighth named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from motet.parallel.cost.timeline import BACKWARD, FORWARD, WEIGHT, TimedPass, timeline
from motet.parallel.layout.rules import micro_batches
from motet.parallel.planner.question import PlanQuestion, RankedLayout

LEFT, WIDTH, RIGHT, AXIS = 70, 900, 130, 26
"""Pixels: names of ranks, the picture itself, what stands on its right, the axis below."""
MOST_RANKS, MOST_PASSES = 128, 320
FILL = {"F": "#7fc8d8", "B": "#7dbf8e", "I": "#7dbf8e", "W": "#e0c068"}
MEANING = {"F": "forward", "B": "backward", "I": "backward (inputs)", "W": "backward (weights)"}
PALETTE: tuple[str, ...] = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#72b7b2",
    "#eeca3b",
    "#b279a2",
    "#9d755d",
)
PALETTE += ("#ff9da6", "#bab0ac", "#2f4b7c", "#86bcb6", "#d4a6c8", "#8c6d31")
NEAR_CAPACITY = 0.4
"""Where the fullest rank holds less than this share of its device, pictures leave the rest out."""
LEAST_SHARE = 0.002
"""Phases below this share of the whole are not drawn."""


def pipeline_works(
    question: PlanQuestion, choice: RankedLayout
) -> tuple[list[TimedPass], int, int]:
    """Return the passes of a step, the micro-batches that are drawn, and those that there are;
    times from the prediction.
    """
    layout = choice.layout
    number = max(micro_batches(layout, question.training.sequences))
    most = max(2 * layout.pp, MOST_PASSES // (2 * layout.virtual_stages) // layout.pp * layout.pp)
    most = min(most, 16) if layout.pp == 1 else most
    drawn = min(number, most)
    busy = choice.prediction.stage_time_s
    layers = [len(one) for one in layout.layers_of_stages(question.model)]
    forward, backward = [0.0] * layout.stages, [0.0] * layout.stages
    ratio = 3.0 if layout.recompute == "full" else 2.0  # a backward pass takes this many forward
    for rank in range(layout.pp):
        mine = layout.stages_of(rank) if layout.pp > 1 else list(range(layout.stages))
        total = sum(layers[stage] for stage in mine)
        for stage in mine:
            share = layers[stage] / total if total else 1 / len(mine)
            whole = busy[rank] / number * share
            forward[stage], backward[stage] = whole / (1 + ratio), whole * ratio / (1 + ratio)
    works = timeline(layout.schedule, layout.pp, layout.virtual_stages, drawn, forward, backward)
    return works, drawn, number


def row_height(ranks: int, tallest: int) -> int:
    """Return the pixels of a rank's row."""
    return max(6, min(tallest, 480 // max(1, ranks)))


def pipeline_svg(works: Sequence[TimedPass]) -> str:
    """Return a picture: a row per pipeline rank, time from left to right."""
    end_s = max(work.end_s for work in works) or 1.0
    ranks = min(MOST_RANKS, 1 + max(work.rank for work in works))
    height = row_height(ranks, 34)
    gap = 4 if height > 12 else 1
    edge = 'stroke="#fff" stroke-width=".6"'
    boxes = []
    for work in works:
        if work.rank >= ranks:
            continue
        x, y = LEFT + work.start_s / end_s * WIDTH, work.rank * (height + gap)
        wide = max(0.4, (work.end_s - work.start_s) / end_s * WIDTH)
        said = (
            f"{MEANING[work.kind]}, micro-batch {work.micro_batch}, stage {work.stage}: "
            f"{work.start_s:.4g} to {work.end_s:.4g} s"
        )
        place = f'x="{x:.1f}" y="{y}" width="{wide:.2f}" height="{height}"'
        look = f'fill="{FILL[work.kind]}" {edge if wide > 3 else ""}'
        boxes.append(f"<rect {place} {look}><title>{said}</title></rect>")
        if wide > 16 and height > 14:
            middle = f'x="{x + wide / 2:.1f}" y="{y + height / 2 + 4:.0f}"'
            style = 'font-size="11" text-anchor="middle" fill="#234"'
            boxes.append(f"<text {middle} {style}>{work.micro_batch}</text>")
    bottom = ranks * (height + gap)
    shapes = [*_names(ranks, height, gap), *boxes, *_axis(end_s, bottom)]
    return _svg(bottom + AXIS, shapes)


def legend(works: Sequence[TimedPass]) -> str:
    """Return what the colours of the passes mean, as HTML."""
    kinds = [kind for kind in FILL if any(work.kind == kind for work in works)]
    return _legend([(FILL[kind], MEANING[kind]) for kind in kinds])


def held_over_time(works: Sequence[TimedPass], rank: int) -> list[tuple[float, int]]:
    """Return (seconds, passes whose activations a rank holds from then on)."""
    last: dict[tuple[int, int], float] = {}
    starts: list[float] = []
    for work in works:
        if work.rank != rank:
            continue
        key = work.micro_batch, work.stage
        if work.kind == FORWARD:
            starts.append(work.start_s)
        elif work.kind in (BACKWARD, WEIGHT):
            last[key] = max(last.get(key, 0.0), work.end_s)
    changes = [(when_s, 1) for when_s in starts] + [(when_s, -1) for when_s in last.values()]
    held, out = 0, []
    for when_s, change in sorted(changes):
        held += change
        out.append((when_s, held))
    return out


def memory_svg(choice: RankedLayout, works: Sequence[TimedPass]) -> str:
    """Return a picture: memory of every pipeline rank over a step, from its peak and from how many
    passes it holds at each time.
    """
    prediction = choice.prediction
    end_s = max(work.end_s for work in works) or 1.0
    ranks = min(MOST_RANKS, choice.layout.pp)
    height = row_height(ranks, 140)
    gap = 8 if height > 20 else 2
    top_gib = memory_top_gib(choice)
    held_by = [held_over_time(works, rank) for rank in range(ranks)]
    most = max(1, *(held for steps in held_by for _, held in steps))
    shapes = []
    for rank, steps in enumerate(held_by):
        bottom = (rank + 1) * (height + gap) - gap
        frame = f'x="{LEFT}" y="{bottom - height}" width="{WIDTH}" height="{height}"'
        shapes.append(f'<rect {frame} fill="#f6f6f8"/>')
        shapes += _memory_of_rank(choice, rank, steps, most, end_s, bottom, height / top_gib)
        if top_gib >= prediction.capacity_gib:
            y = bottom - height / top_gib * prediction.capacity_gib
            line = f'x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"'
            shapes.append(f'<line {line} stroke="#a33" stroke-dasharray="5 3"/>')
    said = [f"peak {prediction.stage_memory_gib[rank]:.1f} GiB" for rank in range(ranks)]
    bottom = ranks * (height + gap)
    shapes += [*_names(ranks, height, gap, said), *_axis(end_s, bottom)]
    return _svg(bottom + AXIS, shapes)


def _memory_of_rank(
    choice: RankedLayout,
    rank: int,
    steps: Sequence[tuple[float, int]],
    most: int,
    end_s: float,
    bottom: int,
    pixels_per_gib: float,
) -> list[str]:
    """Draw what a rank holds: what stays below, activations as steps above it.

    `most` is the highest number of passes that any rank holds.
    """
    prediction = choice.prediction
    peak, top = prediction.stage_memory_gib[rank], max((held for _, held in steps), default=0)
    # Activations of the fullest rank are known; those of another rank are in proportion to the
    # passes that it holds.
    moving = min(prediction.memory_parts.get("activations", 0.0), peak) * top / most
    flat = level = bottom - pixels_per_gib * (peak - moving)
    points = [f"{LEFT},{bottom}", f"{LEFT},{level:.1f}"]
    for when_s, held in steps:
        x = LEFT + when_s / end_s * WIDTH
        after = bottom - pixels_per_gib * (peak - moving + moving * held / max(1, top))
        points += [f"{x:.1f},{level:.1f}", f"{x:.1f},{after:.1f}"]
        level = after
    points += [f"{LEFT + WIDTH},{level:.1f}", f"{LEFT + WIDTH},{bottom}"]
    said = f"rank {rank}: peak {peak:.1f} of {prediction.capacity_gib:.1f} GiB"
    stays = f'x="{LEFT}" y="{flat:.1f}" width="{WIDTH}" height="{bottom - flat:.1f}"'
    return [
        f'<polygon points="{" ".join(points)}" fill="#b9a7d8"><title>{said}</title></polygon>',
        f'<rect {stays} fill="#7d68ab"/>',
    ]


def memory_top_gib(choice: RankedLayout) -> float:
    """Return the GiB at the top of a rank's row: what the device has where that much is used, else
    the highest peak.
    """
    found = choice.prediction
    peak = max(found.stage_memory_gib)
    tall = row_height(min(MOST_RANKS, choice.layout.pp), 140) > 20
    near = peak > NEAR_CAPACITY * found.capacity_gib
    return max(peak, found.capacity_gib) if tall and near else peak


def memory_legend(choice: RankedLayout) -> str:
    """Return what the colours of memory mean, as HTML."""
    capacity_gib, top_gib = choice.prediction.capacity_gib, memory_top_gib(choice)
    pairs = [("#7d68ab", "weights, gradients, optimizer, buffers"), ("#b9a7d8", "activations")]
    if top_gib >= capacity_gib:
        pairs.append(("#a33", f"capacity, {capacity_gib:.1f} GiB"))
    else:
        pairs.append(
            ("#f6f6f8", f"a row is {top_gib:.1f} GiB high; the capacity is {capacity_gib:.1f} GiB")
        )
    return _legend(pairs)


def shares_html(parts: Mapping[str, float], unit: str) -> str:
    """Return one bar of what a whole is made of, largest first, and its numbers below."""
    total = sum(parts.values()) or 1.0
    shown = sorted(
        ((name, value) for name, value in parts.items() if value > LEAST_SHARE * total),
        key=lambda item: -item[1],
    )
    x, boxes, named = 0.0, [], []
    for (name, value), color in zip(shown, PALETTE * 2, strict=False):
        wide = value / total * (LEFT + WIDTH)
        words = name.replace("_", " ")
        boxes.append(
            f'<rect x="{x:.1f}" y="0" width="{wide:.1f}" height="26" fill="{color}">'
            f"<title>{escape(words)}: {value:.4g} {unit}</title></rect>"
        )
        x += wide
        named.append((color, f"{words} {value:.3g} {unit} ({value / total:.0%})"))
    # stretched as wide as there is room, never cut off
    bar = _svg(28, boxes, LEFT + WIDTH).replace("<svg ", '<svg preserveAspectRatio="none" ', 1)
    return f"{bar}{_legend(named)}"


def _legend(pairs: Sequence[tuple[str, str]]) -> str:
    items = [
        f'<span><i style="background:{color}"></i>{escape(words)}</span>' for color, words in pairs
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def _names(ranks: int, height: int, gap: int, said: Sequence[str] = ()) -> list[str]:
    """Name every rank, or as many as there is room for; `said` stands on the right."""
    every = max(1, math.ceil((14 if height > 12 else 28) / (height + gap)))
    every = 1 << (every - 1).bit_length()
    out = []
    for rank in range(0, ranks, every):
        y = rank * (height + gap) + height / 2 + 4
        out.append(f'<text x="0" y="{y:.0f}" font-size="12">rank {rank}</text>')
        if said:
            place = f'x="{LEFT + WIDTH + 8}" y="{y:.0f}"'
            out.append(f'<text {place} font-size="12">{escape(said[rank])}</text>')
    return out


def _axis(end_s: float, bottom: int) -> list[str]:
    """Draw seconds at round distances."""
    step_s = 10 ** math.floor(math.log10(end_s / 4))
    step_s *= next(f for f in (1, 2, 5, 10) if end_s / (step_s * f) <= 9)
    out = [
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{bottom}" y2="{bottom}" stroke="#999"/>',
    ]
    for i in range(int(end_s / step_s) + 1):
        x = LEFT + i * step_s / end_s * WIDTH
        said = f"{i * step_s:.4g}{'' if i else ' s'}"
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#999"/>'
            f'<text x="{x:.1f}" y="{bottom + 18}" font-size="12" text-anchor="middle">{said}</text>'
        )
    return out


def _svg(height: int, shapes: Sequence[str], width: int = LEFT + WIDTH + RIGHT) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(shapes)}</svg>'
