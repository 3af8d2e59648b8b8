"""A layout in the terminal: the rank grid, the stages and the pipeline's timeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motet.core import format
from motet.core.marks import rich_console
from motet.launcher.config.sections import RunSettings

if TYPE_CHECKING:
    from rich.text import Text

    from motet.models.config import ModelConfig
    from motet.parallel.cost.timeline import TimedPass
    from motet.parallel.layout.layout import Layout

WIDTH, MOST_WIDTH = 100, 160
FILL = {"F": "─", "B": "━", "I": "━", "W": "╍"}
STYLES = {
    "F": "black on cyan",
    "B": "black on green",
    "I": "black on green",
    "W": "black on yellow",
}
LEGEND = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}


def draw(settings: RunSettings, model: ModelConfig, facts: Mapping[str, Any], known: bool) -> None:
    """Print a layout; `known`: the vocabulary is, so that numbers of parameters are exact."""
    console = rich_console(highlight=False)
    width = min(console.width, MOST_WIDTH) if console.is_terminal else WIDTH
    layout = settings.layout_for(facts["world_size"])
    parts: list[Iterable[Text | str]] = [
        _heading(facts, layout),
        grid_lines(facts, width),
        _stage_lines(facts, known),
        _expert_lines(facts),
        _batch_lines(facts),
    ]
    if layout.pp > 1:
        parts.append(timeline_lines(layout, model, settings.data.sequence_length, facts, width))
    console = rich_console(highlight=False, width=max(width, console.width))
    for lines in parts:
        for line in lines:
            title = isinstance(line, str) and line and not line.startswith(" ")
            style = "bold" if title else None
            console.print(line, style=style, soft_wrap=True, markup=False)


def _heading(facts: Mapping[str, Any], layout: Layout) -> list[str]:
    degrees = {name: n for name, n in facts["degrees"].items() if n > 1}
    shown = " x ".join(f"{name} {n}" for name, n in degrees.items() if name not in ("ep", "etp"))
    inside = ", ".join(f"{name} {degrees[name]}" for name in ("ep", "etp") if name in degrees)
    nodes, processes = facts["nodes"], facts["processes_per_node"]
    where = f"{nodes} nodes x {processes} processes" if nodes > 1 else f"{processes} on one node"
    ranks = f"{facts['world_size']:,} rank{'s' if facts['world_size'] > 1 else ''}"
    lines = [f"{facts['name']}: {ranks} ({where})" + (f" = {shown}" if shown else "")]
    if inside:
        lines[0] += f"; experts: {inside}"
    details = [f"engine {layout.engine}", f"recompute {layout.recompute}"]
    if layout.tp > 1:
        switches = ("sequence_parallel", "vocabulary_parallel")
        details += [
            f"{s.replace('_', ' ')} {'on' if getattr(layout, s) else 'off'}" for s in switches
        ]
    return [*lines, ", ".join(details)]


def grid_lines(facts: Mapping[str, Any], width: int) -> list[str]:
    """A row per pipeline rank, a column per data-parallel rank, the processes of a group in a
    cell.
    """
    cells: dict[tuple[int, int, int], list[list[int]]] = {}
    for rank in facts["ranks"]:
        parts = cells.setdefault((rank["pp"], rank["dp_replicate"], rank["dp_shard"]), [])
        if rank["tp"] == 0:
            parts.append([])
        parts[-1].append(rank["process"])
    degrees = facts["degrees"]
    columns = [(r, s) for r in range(degrees["dp_replicate"]) for s in range(degrees["dp_shard"])]
    heads = [_reader_name(degrees, *column) for column in columns]
    rows = [
        [" | ".join(runs(part) for part in cells[(pp, *column)]) for column in columns]
        for pp in range(degrees["pp"])
    ]
    labels = [f"pipeline rank {pp}" for pp in range(degrees["pp"])]
    if degrees["pp"] == 1:
        labels = [""]
    inside = " x ".join(f"{name} {degrees[name]}" for name in ("cp", "tp") if degrees[name] > 1)
    title = "Processes" + (f"; in a cell {inside}" if inside else "")
    lines = ["", title, *_cut_table(heads, labels, rows, width)]
    if facts["crossing"]:
        shown = {False: "inside a node", True: "across nodes"}
        for crosses, text in shown.items():
            names = [name for name, value in facts["crossing"].items() if value is crosses]
            lines += [f"  {text}: {', '.join(names)}"] if names else []
    return lines


def _reader_name(degrees: Mapping[str, int], replica: int, shard: int) -> str:
    names = []
    if degrees["dp_replicate"] > 1:
        names.append(f"replica {replica}")
    if degrees["dp_shard"] > 1:
        names.append(f"shard {shard}")
    return " ".join(names)


def runs(numbers: Sequence[int]) -> str:
    """Numbers with runs of three and more written as "a–b"."""
    out: list[list[int]] = []
    for number in numbers:
        if out and number == out[-1][-1] + 1:
            out[-1].append(number)
        else:
            out.append([number])
    return " ".join(
        f"{run[0]}–{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in out
    )


def span(numbers: Sequence[int]) -> str:
    """The first and the last of consecutive numbers."""
    return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _cut_table(
    heads: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[str]:
    """Aligned columns as far as they fit; the last is always shown, with "…" for those before
    it.
    """
    left = max(map(len, labels)) + 2
    widths = [max(len(head), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
    fit, used = 0, left + widths[-1] + 5
    while fit < len(widths) - 1 and used + widths[fit] + 3 <= width:
        used += widths[fit] + 3
        fit += 1
    kept = [*range(fit), len(widths) - 1]

    def line(label: str, cells: Sequence[str]) -> str:
        shown = [cells[i].ljust(widths[i]) for i in kept]
        if fit < len(widths) - 1:
            shown.insert(-1, "…")
        return f"  {label.ljust(left - 2)}{'  ' if left > 2 else ''}{'   '.join(shown)}".rstrip()

    lines = [line(label, row) for label, row in zip(labels, rows, strict=True)]
    return [line("", heads), *lines] if any(heads) else lines


def _stage_lines(facts: Mapping[str, Any], known: bool) -> list[str]:
    stages = facts["stages"]
    rows = []
    for stage in stages:
        layers = stage["layers"]
        numbers = f" ({span(layers)})" if layers else ""
        held = [f"{len(layers)} layer{'' if len(layers) == 1 else 's'}{numbers}"]
        held = ["embedding", *held] if stage["embedding"] else held
        held = [*held, "head"] if stage["head"] else held
        rows.append(
            [
                str(stage["stage"]),
                str(stage["pipeline_rank"]),
                ", ".join(held),
                format.parameters(stage["parameters"], 2),
                format.parameters(stage["parameters_per_rank"], 2),
                f"{stage['share_of_compute']:.1%}",
            ]
        )
    heads = ["stage", "pipeline rank", "holds", "parameters", "of that per rank", "compute"]
    if len(stages) == 1:
        rows, heads = [row[2:5] for row in rows], heads[2:5]
    note = "" if known else " (no corpus yet: vocabulary taken as 32,768)"
    return ["", f"Weights{note}", *_table(heads, rows)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    return [
        "  "
        + "   ".join(
            cell.ljust(width) if heads[i] == "holds" else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (heads, *rows)
    ]


def _expert_lines(facts: Mapping[str, Any]) -> list[str]:
    experts, degrees = facts["experts"], facts["degrees"]
    if experts is None:
        return []
    ways = f"edp {experts['edp']} x ep {degrees['ep']} x etp {degrees['etp']}"
    where = []
    if degrees["dp_replicate"] > 1:
        where.append("of replica 0")
    if degrees["pp"] > 1:
        where.append("on pipeline rank 0")
    place = f" {' '.join(where)}" if where else ""
    lines = ["", f"Experts{place}: {ways}"]
    width = max(len(span(group["experts"])) for group in experts["groups"])
    for group in experts["groups"]:
        name = span(group["experts"]).ljust(width)
        lines.append(f"  experts {name}   processes {runs(group['processes'])}")
    return lines


def _batch_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = ["", "Batch of one step"]
    for stage in facts["batch"]:
        begin = f"from step {stage['step']:,}: " if len(facts["batch"]) > 1 else ""
        numbers, dp_size = stage["micro_batches"], stage["readers"]
        equal = len(set(numbers)) == 1
        each = f"{numbers[0]:,}" if equal else f"{', '.join(map(str, numbers))} (by replica)"
        each += f" micro-batch{'es' if max(numbers) > 1 else ''} of {stage['micro_sequences']:,}"
        each = f"{dp_size:,} dp ranks x {each}" if dp_size > 1 else each
        lines.append(
            f"  {begin}{stage['sequences']:,} sequences = {stage['tokens']:,} tokens; {each}"
        )
    return lines


def timeline_lines(
    layout: Layout, model: ModelConfig, length: int, facts: Mapping[str, Any], width: int
) -> list[Text | str]:
    """The pipeline in one step: a line per pipeline rank, time from left to right, drawn with as
    many micro-batches as fit.
    """
    from motet.launcher.planning.layout_facts import pipeline_works

    pipeline = facts["pipeline"]
    number = pipeline["micro_batches"]
    labels = [f"  {'rank ' if width > 60 else ''}{rank} " for rank in range(layout.pp)]
    room = width - max(map(len, labels))
    drawn = _drawn(layout, model, length, number, room)
    works = pipeline_works(layout, model, length, drawn)
    title = (
        f"Pipeline: {layout.schedule}, {number} micro-batches, {pipeline['bubble']:.1%} of the "
        "time spent waiting"
    )
    if drawn < number:
        title += f"; drawn with {drawn}"
    lines: list[Text | str] = ["", title]
    end_s = max(work.end_s for work in works)
    for rank, label in enumerate(labels):
        mine = [work for work in works if work.rank == rank]
        lines.append(_bar(label.ljust(max(map(len, labels))), mine, layout.pp, room / end_s))
    lines.append(_legend({work.kind for work in works}))
    held = ", ".join(map(str, pipeline["most_held"]))
    each = ", counted per stage" if layout.virtual_stages > 1 else ""
    lines.append("  times from arithmetic alone; sending between ranks is taken as free")
    lines.append(f"  micro-batches whose activations are held at once, by rank: {held}{each}")
    return lines


def _drawn(layout: Layout, model: ModelConfig, length: int, number: int, room: int) -> int:
    """As many micro-batches as leave room for their numbers, and at least what fills the
    pipeline.
    """
    from motet.launcher.planning.layout_facts import pipeline_works
    from motet.parallel.layout.rules import schedule_takes

    least = min(number, layout.pp)
    for drawn in range(min(number, 64), least, -1):
        if not schedule_takes(layout, drawn):
            continue
        works = pipeline_works(layout, model, length, drawn)
        scale = room / max(work.end_s for work in works)
        shortest = min(work.end_s - work.start_s for work in works if work.kind == "F")
        if shortest * scale >= len(str(drawn - 1)) + 1:
            return drawn
    return least


def _bar(label: str, works: Sequence[TimedPass], pp: int, columns_per_s: float) -> Text:
    from rich.text import Text

    out, at = Text(label), 0
    for work in works:
        first, end = round(work.start_s * columns_per_s), round(work.end_s * columns_per_s)
        out.append(" " * (first - at))
        number = str(work.micro_batch)
        block = FILL[work.kind] * (end - first)
        if len(number) <= end - first:
            block = number + block[len(number) :]
        style = STYLES[work.kind] + (" dim" if work.stage // pp % 2 else "")
        out.append(block, style=style)
        at = end
    return out


def _legend(kinds: set[str]) -> Text:
    from rich.text import Text

    out = Text("  ")
    for kind in FILL:
        if kind in kinds:
            out.append(f"0{FILL[kind] * 2}", style=STYLES[kind])
            out.append(f" {LEGEND[kind]}   ")
    out.append("(numbers: micro-batches)")
    return out
