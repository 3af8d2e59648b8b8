"""A cluster as rows of tables, as lines of text, as SVG and as a page. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from motet.core.format import bandwidth, latency
from motet.launcher.output.page import drawing, plain_page, table
from motet.parallel.cluster.description import Cluster, Device, Group, Link

MOST_NODES_DRAWN, MOST_DEVICES_DRAWN = 8, 16
BOX_W, BOX_H, MARGIN = 300, 132, 24
FONT = "font-family='system-ui, sans-serif'"


def calibrations(cluster: Cluster) -> list[str]:
    """A sentence on every group whose constants runs decided."""
    return [
        f"{group.name}: constants fitted to {len(found.runs)} "
        f"attempt{'s' if len(found.runs) > 1 else ''} on {found.date or 'an unknown day'}, "
        f"median error {found.median_error:.1%}: "
        f"{', '.join(f'{n} {v:g}' for n, v in found.constants.items())}"
        for group in cluster.groups
        if (found := group.calibration) is not None
    ]


def link_words(link: Link) -> str:
    """A link in a few words."""
    seen = ", measured" if link.measured else ""
    return f"{bandwidth(link.gb_s)}, {latency(link.latency_us)}, {link.kind}{seen}"


def product_rate(device: Device, dtype: str) -> tuple[float, bool] | None:
    """Return (TFLOPS of large products, whether they were measured), None without a rate for the
    data type.
    """
    if dtype in device.measured_tflops:
        return device.measured_tflops[dtype], True
    if dtype in device.peak_tflops:
        return device.peak_tflops[dtype] * device.matmul_efficiency, False
    return None


def group_rows(cluster: Cluster) -> list[dict[str, Any]]:
    """A row for every group."""
    return [
        {
            "group": group.name,
            "nodes": group.nodes,
            "devices": f"{group.devices:,} x {group.device.kind}",
            "GiB each": round(group.device.memory_gib, 1),
            "TFLOPS each": _products(group.device),
            "memory GB/s": round(group.device.memory_gb_s),
            "inside a node": link_words(group.intra_node) if group.devices_per_node > 1 else "–",
            "between nodes, per device": link_words(group.inter_node) if group.nodes > 1 else "–",
            "price/h": group.device.price_per_hour * group.devices or None,
            "kW": group.device.power_w * group.devices / 1e3 or None,
        }
        for group in cluster.groups
    ]


def _products(device: Device) -> str:
    out = []
    for dtype in ("bf16", "fp16", "fp32"):
        if dtype == "fp16" and "bf16" in device.peak_tflops:
            continue
        if found := product_rate(device, dtype):
            out.append(f"{dtype} {found[0]:.3g}{' measured' if found[1] else ''}")
    return ", ".join(out)


def link_rows(cluster: Cluster) -> list[dict[str, Any]]:
    """A row for every link between groups; its rate is what all devices have together."""
    return [
        {
            "between": f"{one} – {other}",
            "rate, all devices together": bandwidth(link.gb_s),
            "Gbit/s": round(link.gb_s * 8, 3),
            "latency": latency(link.latency_us),
            "kind": link.kind,
            "measured": link.measured,
        }
        for (one, other), link in cluster.links.items()
    ]


def lines(cluster: Cluster, width: int = 72) -> list[str]:
    """Boxes of groups from top to bottom, with the links between neighbours; other links are named
    below.
    """
    out: list[str] = []
    names = [group.name for group in cluster.groups]
    for number, group in enumerate(cluster.groups):
        if number:
            link = cluster.link(number - 1, number)
            out += ["      ║", f"      ║  {link_words(link)}", "      ║"]
        out += _box(group, width)
    out += [
        f"  {one} – {other}: {link_words(link)}"
        for (one, other), link in cluster.links.items()
        if abs(names.index(one) - names.index(other)) > 1
    ]
    return out


def _box(group: Group, width: int) -> list[str]:
    title = f" {group.name} "
    cell = "▪" * min(group.devices_per_node, MOST_DEVICES_DRAWN)
    cell += "…" if group.devices_per_node > MOST_DEVICES_DRAWN else ""
    shown = " ".join([f"[{cell}]"] * min(group.nodes, MOST_NODES_DRAWN))
    shown += " …" if group.nodes > MOST_NODES_DRAWN else ""
    nodes = f"{group.nodes:,} node{'s' if group.nodes > 1 else ''}"
    inner = [f"{nodes} x {group.devices_per_node} {group.device.kind}", shown]
    if group.devices_per_node > 1:
        inner.append(f"inside a node: {link_words(group.intra_node)}")
    if group.nodes > 1:
        inner.append(f"between nodes: {link_words(group.inter_node)} per device")
    width = max(width, *(len(line) + 4 for line in inner), len(title) + 4)
    top = f"╭─{title}".ljust(width - 1, "─") + "╮"
    return [top, *(f"│ {line.ljust(width - 4)} │" for line in inner), "╰" + "─" * (width - 2) + "╯"]


def svg(cluster: Cluster) -> str:
    """A picture: a box for every group on a circle, a line for every link, thicker where it is
    faster.
    """
    places, size_w, size_h = _places(len(cluster.groups))
    names = {group.name: place for group, place in zip(cluster.groups, places, strict=True)}
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {size_w:.0f} {size_h:.0f}' "
        f"width='{size_w:.0f}' {FONT}>"
    ]
    for (one, other), link in cluster.links.items():
        (x1, y1), (x2, y2) = names[one], names[other]
        thick = min(9.0, max(1.5, 3 + 1.5 * math.log10(max(link.gb_s, 1e-4))))
        dash = "" if link.measured else " stroke-dasharray='6 4'"
        parts.append(
            f"<line x1='{x1:.0f}' y1='{y1:.0f}' x2='{x2:.0f}' y2='{y2:.0f}' stroke='#c2703d' "
            f"stroke-width='{thick:.1f}'{dash}/>"
        )
    parts += [_svg_box(g, place) for g, place in zip(cluster.groups, places, strict=True)]
    for (one, other), link in cluster.links.items():
        (x1, y1), (x2, y2) = names[one], names[other]
        parts.append(_label((x1 + x2) / 2, (y1 + y2) / 2, link_words(link)))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _places(number: int) -> tuple[list[tuple[float, float]], float, float]:
    """Return the middles of boxes, and the size of the picture."""
    if number == 1:
        return [(MARGIN + BOX_W / 2, MARGIN + BOX_H / 2)], BOX_W + 2 * MARGIN, BOX_H + 2 * MARGIN
    if number == 2:
        gap = 290.0
        y = MARGIN + BOX_H / 2
        middles = [(MARGIN + BOX_W / 2, y), (MARGIN + 1.5 * BOX_W + gap, y)]
        return middles, 2 * BOX_W + gap + 2 * MARGIN, BOX_H + 2 * MARGIN
    radius = max(330.0, number * (BOX_W + 60) / (2 * math.pi))
    middle_x, middle_y = radius + BOX_W / 2 + MARGIN, 0.75 * radius + BOX_H / 2 + MARGIN
    middles = [
        (
            middle_x + radius * math.sin(2 * math.pi * i / number),
            middle_y - 0.75 * radius * math.cos(2 * math.pi * i / number),
        )
        for i in range(number)
    ]
    return middles, 2 * middle_x, 2 * middle_y


def _svg_box(group: Group, middle: tuple[float, float]) -> str:
    x, y = middle[0] - BOX_W / 2, middle[1] - BOX_H / 2
    texts = [f"{group.nodes:,} x {group.devices_per_node} {group.device.kind}"]
    if group.devices_per_node > 1:
        texts.append(f"inside: {link_words(group.intra_node)}")
    if group.nodes > 1:
        texts.append(f"between: {link_words(group.inter_node)}")
    out = [
        f"<rect x='{x:.0f}' y='{y:.0f}' width='{BOX_W}' height='{BOX_H}' rx='8' fill='#f4f7fb' "
        "stroke='#34577c'/>",
        f"<text x='{x + 12:.0f}' y='{y + 24:.0f}' font-size='16' "
        f"font-weight='600'>{escape(group.name)}</text>",
    ]
    out += [
        f"<text x='{x + 12:.0f}' y='{y + 44 + 18 * i:.0f}' font-size='12' "
        f"fill='#333'>{escape(text)}</text>"
        for i, text in enumerate(texts)
    ]
    drawn = min(group.nodes, MOST_NODES_DRAWN)
    each = min(group.devices_per_node, 8)
    for node in range(drawn):
        left, step = x + 12 + node * 34, 28 / each
        bars = "".join(
            f"<rect x='{left + 1 + d * step:.1f}' y='{y + BOX_H - 30:.0f}' "
            f"width='{max(1.0, step - 1):.1f}' "
            "height='16' fill='#34577c'/>"
            for d in range(each)
        )
        out.append(
            f"<rect x='{left - 1:.0f}' y='{y + BOX_H - 33:.0f}' width='31' height='22' fill='#fff' "
            f"stroke='#9ab'/>{bars}"
        )
    return "\n".join(out)


def _label(x: float, y: float, text: str) -> str:
    width = 6.4 * len(text) + 10
    return (
        f"<rect x='{x - width / 2:.0f}' y='{y - 11:.0f}' width='{width:.0f}' height='20' "
        "fill='#fff' opacity='0.9'/>"
        f"<text x='{x:.0f}' y='{y + 4:.0f}' font-size='12' "
        f"text-anchor='middle'>{escape(text)}</text>"
    )


def page(cluster: Cluster, title: str, notes: Sequence[str] = ()) -> str:
    """One HTML file with picture and tables; it loads nothing."""
    tables = [table(rows, _cell) for rows in (group_rows(cluster), link_rows(cluster)) if rows]
    said = "".join(f"<li>{escape(note)}</li>" for note in (*calibrations(cluster), *notes))
    listed = [f"<ul>{said}</ul>"] if said else []
    return plain_page("Motet cluster", title, [drawing(svg(cluster)), *tables, *listed])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.6g}" if isinstance(value, int | float) else str(value)
