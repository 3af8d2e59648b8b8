"""Figures of the report as inline SVG, drawn by matplotlib, the same bytes for the same numbers.

Colours are written as sentinels and become CSS variables, so that one drawing serves light and dark
pages.
Text stays text: it is escaped, searchable, and set in the font of the page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from motet.launcher.report.bounds import inside, keep_within, possible
from motet.launcher.report.words import dose as dose_text
from motet.launcher.report.words import finite, percent, printable, scaled, shown_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# sentinel colour -> CSS variable of style.css
INK, SOFT, GRID, CONTROL = "#010101", "#020202", "#030303", "#040404"
ORDERED = ("#050501", "#050502", "#050503", "#050504", "#050505")
DISTINCT = ("#060601", "#060602", "#060603", "#060604", "#060605", "#060606")
VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    GRID: "--line",
    CONTROL: "--control",
    **{colour: f"--ordered-{i + 1}" for i, colour in enumerate(ORDERED)},
    **{colour: f"--distinct-{i + 1}" for i, colour in enumerate(DISTINCT)},
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
MARKERS = "osD^vP"
SMALL = (5.0, 2.9)
OUTCOME_CONFIDENCE = 0.95
"""Of the intervals of means in all curves; `experiments.analysis.answers.CONFIDENCE`."""
LONGEST_Y = 34
LEGEND_CHARACTERS = 70
WIDE = (10.2, 3.6)


@contextmanager
def figure(key: str, inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the page's style; `key` makes the ids of its parts unique and repeatable."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as MplFigure

    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": key}
    with mpl.rc_context(style):
        yield MplFigure(figsize=inches, layout="constrained")


def to_svg(fig: Figure, key: str, label: str) -> str:
    """The figure as an `<svg>` element: no header, no metadata, no address, ids prefixed with
    `key`.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font draws the text
        fig.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"\bfont: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", body)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{key}-", body)
    body = body.replace("xlink:href", "href")
    return (
        f'<svg class="plot" viewBox="{box[1] if box else ""}" role="img" '
        f'aria-label="{escape(printable(label))}">{body.strip()}'
    )


def escape(text: str) -> str:
    """Text for an attribute or an element."""
    from markupsafe import escape as markup_escape

    return str(markup_escape(text))


def clip(text: str, most: int = 34) -> str:
    """Text short enough for a legend; control characters become spaces."""
    clean = printable(text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def colours(arms: Sequence[tuple[str, float | None]]) -> list[str]:
    """One colour per arm: grey for dose 0, a ramp when doses differ, distinct hues when they do
    not.
    """
    positive = [dose for _, dose in arms if dose]
    ordered = len(set(positive)) == len(positive) <= len(ORDERED)
    rank = {dose: i for i, dose in enumerate(sorted(set(positive)))}
    spread = max(1, len(positive) - 1)
    out, used = [], 0
    for _, dose in arms:
        if dose == 0:
            out.append(CONTROL)
        elif ordered and dose is not None:
            place = round(rank[dose] * (len(ORDERED) - 1) / spread) if len(positive) > 1 else 3
            out.append(ORDERED[place])
        else:
            out.append(DISTINCT[used % len(DISTINCT)])
            used += 1
    return out


def dose_positions(doses: Sequence[float]) -> list[float]:
    """Places on the axis: logarithmic for positive doses, zero one doubling below the smallest."""
    positive = [d for d in doses if d > 0]
    if not positive:
        return [0.0 for _ in doses]
    smallest = min(positive)
    return [0.0 if d <= 0 else 1.0 + math.log2(d / smallest) for d in doses]


def dose_ticks(arms: Sequence[str], doses: Sequence[float]) -> tuple[list[str], list[float]]:
    """Tick texts and places: doses on a logarithmic axis, or arms side by side when they share
    doses.
    """
    if len(set(doses)) == len(doses):
        return [dose_text(d) for d in doses], dose_positions(doses)
    known = list(arms) if len(arms) == len(doses) else [f"arm {i + 1}" for i in range(len(doses))]
    texts = [f"{clip(name, 14)}\n{dose_text(d)}" for name, d in zip(known, doses, strict=True)]
    return texts, [float(i) for i in range(len(doses))]


def dose_response(
    entry: Mapping[str, Any], key: str, dose_in: str = "exposures per unit"
) -> str | None:
    """Mean outcome and interval at each dose; None without data."""
    curve = (entry.get("curves") or {}).get("dose_response")
    if not curve or not curve.get("x"):
        return None
    unit = str(curve.get("unit", ""))
    doses = [finite(x) or 0.0 for x in curve["x"]]
    names, xs = dose_ticks(curve.get("arms") or [], doses)
    mean, low, high = (values(curve.get(name), unit, len(xs)) for name in ("mean", "low", "high"))
    ends = possible(curve, unit, mean)
    low, high = inside(low, ends), inside(high, ends)
    with figure(key, SMALL) as fig:
        axes = fig.subplots()
        shades = colours([("", d) for d in doses])
        if len(set(doses)) == len(doses):
            axes.plot(xs, mean, color=SOFT, linewidth=1.0, zorder=2)
        for x, m, lo, hi, shade in zip(xs, mean, low, high, shades, strict=True):
            axes.plot([x, x], [lo, hi], color=shade, linewidth=2.2, solid_capstyle="butt", zorder=3)
            axes.plot([x], [m], "o", color=shade, markersize=6.5, zorder=4)
        known = (mean[0] if doses[0] == 0 else None, scaled(curve.get("chance"), unit))
        explain(fig, axes, *known)
        axes.set_xticks(xs, names)
        axes.set_xlim(min(xs) - 0.5, max(xs) + 0.5)
        axes.grid(visible=False, axis="x")
        name_axes(axes, f"dose: {dose_in} (0 = never shown)", str(curve.get("label", "")), unit)
        keep_within(axes, ends)
        points = "; ".join(
            f"dose {dose_text(d)}: {m:.3g}" for d, m in zip(doses, mean, strict=True)
        )
        points += "" if known[1] is None else f"; chance: {known[1]:.3g}"
        label = f"{curve.get('label', 'outcome')} by dose, in {shown_unit(unit)}. {points}."
        return to_svg(fig, key, label)


def explain(fig: Figure, axes: Axes, never_shown: float | None, chance: float | None) -> None:
    """Draw the levels that a dose is compared with (None: not known), say what every mark means."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=ORDERED[3], marker="o", linestyle="", markersize=6.5, label="mean"),
        Line2D(
            [], [], color=ORDERED[3], linewidth=2.2, label=f"{percent(OUTCOME_CONFIDENCE)} interval"
        ),
    ]
    levels = ((never_shown, CONTROL, (0, (4, 3)), "dose 0"), (chance, SOFT, (0, (1, 2)), "chance"))
    for level, shade, dashes, name in levels:
        if level is not None and math.isfinite(level):
            line = axes.axhline(level, color=shade, linewidth=1.1, linestyle=dashes, zorder=1)
            line.set_label(name)
            marks.append(line)
    fig.legend(handles=marks, loc="outside upper left", ncols=len(marks), handlelength=1.6,
               columnspacing=1.2)  # fmt: skip


def over_time(
    panel: Mapping[str, Any], arms: Mapping[str, float | None], key: str, window: Sequence[int] = ()
) -> str | None:
    """The outcome of each arm against training steps; `window` marks when exposures fell."""
    series = [s for s in panel.get("series") or [] if s.get("steps")]
    if not series:
        return None
    unit = str(panel.get("unit", ""))
    shades = colours([(s["arm"], arms.get(s["arm"])) for s in series])
    ends = possible(panel, unit, [x for s in series for x in values(s["mean"], unit)])
    with figure(key, SMALL) as fig:
        axes = fig.subplots()
        if len(window):
            axes.plot(window, [0.0] * len(window), "|", color=SOFT, markersize=5, alpha=0.35,
                      transform=axes.get_xaxis_transform(), clip_on=False, zorder=1)  # fmt: skip
        for i, (one, shade) in enumerate(zip(series, shades, strict=True)):
            steps = [float(s) for s in one["steps"]]
            mean, low, high = (
                values(one.get(n), unit, len(steps)) for n in ("mean", "low", "high")
            )
            low, high = inside(low, ends), inside(high, ends)
            axes.fill_between(steps, low, high, color=shade, alpha=0.14, linewidth=0)
            mark = MARKERS[i % len(MARKERS)] if len(steps) <= 24 else ""
            axes.plot(steps, mean, color=shade, marker=mark, markersize=3.5, label=clip(one["arm"]))
        name_axes(axes, "training step", str(panel.get("label", "")), unit)
        keep_within(axes, ends)
        columns = legend_columns([one["arm"] for one in series])
        fig.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
        finals = "; ".join(
            f"{s['arm']}: {m:.3g}" for s in series if (m := last(s["mean"], unit)) is not None
        )
        label = f"{panel.get('label', 'outcome')} over training steps per arm. Last, {finals}."
        return to_svg(fig, key, label)


def since_exposure(entry: Mapping[str, Any], key: str) -> str | None:
    """The outcome against steps since the exposure, on a logarithmic axis."""
    curve = (entry.get("curves") or {}).get("since_exposure")
    if not curve or not curve.get("x"):
        return None
    unit = str(curve.get("unit", ""))
    xs = [float(x) for x in curve["x"]]
    mean, low, high = (values(curve.get(n), unit, len(xs)) for n in ("mean", "low", "high"))
    ends = possible(curve, unit, mean, gain=True)
    low, high = inside(low, ends), inside(high, ends)
    with figure(key, SMALL) as fig:
        axes = fig.subplots()
        axes.fill_between(xs, low, high, color=ORDERED[3], alpha=0.16, linewidth=0)
        axes.plot(xs, mean, color=ORDERED[3], marker="o" if len(xs) <= 40 else "", markersize=3.5)
        axes.axhline(0.0, color=CONTROL, linewidth=0.9, linestyle=(0, (4, 3)))
        if min(xs) > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=1.0)
        axes.minorticks_off()
        plain_ticks(axes, xs)
        name_axes(axes, "steps since exposure (log scale)", str(curve.get("label", "")), unit)
        keep_within(axes, ends)
        points = "; ".join(f"{x:g} steps: {m:.3g}" for x, m in zip(xs, mean, strict=True))
        return to_svg(
            fig, key, f"{curve.get('label', 'outcome')} by steps since exposure. {points}."
        )


def training(record: Mapping[str, Any], names: Sequence[str], key: str) -> str | None:
    """Loss over steps, and below it one row of ticks per experiment where its exposures fell."""
    steps, loss = record.get("steps") or [], record.get("loss") or []
    if not steps:
        return None
    ys = [math.nan if finite(y) is None else float(y) for y in loss]
    rows = [n for n in names if (record.get("exposure_steps") or {}).get(n)]
    validated = record.get("validation") or {}
    height = 2.5 + 0.2 * len(rows) + (0.3 if validated else 0.0)
    with figure(key, (WIDE[0], height)) as fig:
        if rows:
            top, rug = fig.subplots(2, 1, sharex=True, height_ratios=[2.4, 0.2 * len(rows) + 0.1])
        else:
            top, rug = fig.subplots(), None
        top.plot(steps, ys, color=SOFT, linewidth=0.8, alpha=0.55)
        top.plot(steps, smooth(ys), color=ORDERED[3], linewidth=1.8, label="training")
        for number, (name, curve) in enumerate(validated.items()):
            points = [math.nan if y is None else y for y in curve["loss"]]
            mark, shade = MARKERS[number % len(MARKERS)], DISTINCT[number % len(DISTINCT)]
            label = clip(f"validation: {name}")
            top.plot(curve["steps"], points, color=shade, marker=mark, markersize=4, label=label)
        if validated:
            fig.legend(loc="outside upper left", ncols=min(4, 1 + len(validated)))
        bad = list(record.get("skipped_steps") or [])
        if bad:
            top.plot(bad, [1.0] * len(bad), "v", color=DISTINCT[1], markersize=6,
                     transform=top.get_xaxis_transform(), clip_on=False)  # fmt: skip
        y_name = "loss" if validated else "training loss"
        name_axes(top, "" if rows else "training step", y_name, "nats/token")
        keep_within(top, (0.0, math.inf))
        if rug is not None:
            draw_rug(rug, rows, record["exposure_steps"], (min(steps), max(steps)))
        first, final = next((y for y in ys if y == y), math.nan), smooth(ys)[-1]
        label = (
            f"Training loss from {first:.3g} to {final:.3g} nats per token over {max(steps)} steps."
        )
        lasts = [f"{name} {c['loss'][-1]:.3g}" for name, c in validated.items() if c["loss"][-1]]
        label += f" Validation at the end: {', '.join(lasts)}." if lasts else ""
        return to_svg(fig, key, label)


def draw_rug(
    axes: Axes,
    rows: Sequence[str],
    exposure_steps: Mapping[str, Sequence[int]],
    span: tuple[int, int],
) -> None:
    """One row of ticks per experiment; steps are binned, darker where more exposures fell."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bins = 400
    width = max(1.0, (span[1] - span[0] + 1) / bins)
    for i, name in enumerate(rows):
        counts: dict[int, int] = {}
        for step in exposure_steps[name]:
            place = int((step - span[0]) / width)
            counts[place] = counts.get(place, 0) + 1
        most = max(counts.values())
        for level in (1, 2, 3):
            places = sorted(b for b, c in counts.items() if math.ceil(3 * c / most) == level)
            points = [(span[0] + (b + 0.5) * width, i + s) for b in places for s in (-0.32, 0.32)]
            if points:
                codes = [Path.MOVETO, Path.LINETO] * len(places)
                patch = PathPatch(Path(points, codes), edgecolor=DISTINCT[i % len(DISTINCT)],
                                  linewidth=1.1, alpha=0.3 + 0.23 * level, fill=False)  # fmt: skip
                axes.add_patch(patch)
    axes.set_yticks(range(len(rows)), [clip(name, 28) for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("training step")


def values(numbers: Sequence[Any] | None, unit: str, length: int | None = None) -> list[float]:
    """Numbers in the printed unit, NaN where missing, `length` long (None: as many as given)."""
    out = [math.nan if (x := scaled(n, unit)) is None else x for n in numbers or []]
    return out if length is None else (out + [math.nan] * length)[:length]


def last(numbers: Sequence[Any], unit: str) -> float | None:
    """The last number that is not missing."""
    return next((x for n in reversed(numbers) if (x := scaled(n, unit)) is not None), None)


def smooth(ys: Sequence[float]) -> list[float]:
    """Centred moving mean over about 1/40 of the curve, NaN left out."""
    half = len(ys) // 80
    out = []
    for i in range(len(ys)):
        near = [y for y in ys[max(0, i - half) : i + half + 1] if y == y]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def name_axes(axes: Axes, x: str, y: str, unit: str, difference: bool = False) -> None:
    """Axis titles; the vertical one carries its unit, and only that when the name is long."""
    shown = shown_unit(unit, difference)
    named = f"{y} ({shown})" if shown and shown not in y else y
    axes.set_xlabel(x)
    axes.set_ylabel(clip(named if len(named) <= LONGEST_Y or not shown else shown, LONGEST_Y))


def legend_columns(names: Sequence[str]) -> int:
    """As many columns as fit beside each other above a small figure."""
    longest = max((len(clip(name)) for name in names), default=1)
    return max(1, min(len(names), LEGEND_CHARACTERS // (longest + 6)))


def plain_ticks(axes: Axes, xs: Sequence[float]) -> None:
    """At most seven of the measured places as ticks, as plain numbers."""
    chosen: list[float] = []
    for x in sorted(set(xs)):
        if not chosen or x >= 1.9 * chosen[-1]:
            chosen.append(x)
    keep = chosen[:: max(1, math.ceil(len(chosen) / 7))]
    axes.set_xticks(keep, [f"{x:,.0f}" for x in keep])
