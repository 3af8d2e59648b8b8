"""The answers for a terminal: the same rows as the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from motet.launcher.report import by_member, words
from motet.launcher.report.page import alarms, control_sentences
from motet.launcher.report.training import validation_rows

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

STYLES = {
    "found": "bold green",
    "not_found": "dim",
    "negligible": "blue",
    "invalid": "bold red",
    "interim": "yellow",
    "saturated": "yellow",
    "exploratory": "yellow",
}


def terminal_summary(report: Mapping[str, Any]) -> Group:
    """A renderable with the notice of a changed definition, the answers, and the controls.

    Nothing in it is markup, and control characters in texts become spaces.
    """
    from rich.console import Group
    from rich.text import Text

    answers = report.get("answers") or {}
    entries = [
        e for e in answers.get("experiments") or [] if e.get("role", "question") == "question"
    ]
    parts: list[Text | Table] = []
    if report.get("first_line"):
        parts.append(Text(words.printable(report["first_line"]), style="bold white on red"))
    run, cost = report.get("run") or {}, report.get("cost") or {}
    parts.append(
        Text(
            words.printable(
                words.summary(run, cost, len(entries), bool(report.get("experiments_unread")))
            )
        )
    )
    if validated := validation_line(report.get("training") or {}):
        parts.append(Text(words.printable(validated)))
    parts += [Text(f"! {words.printable(text)}", style="bold red") for text in alarms(report)]
    parts += [Text(words.printable(whole_run_line(one))) for one in answers.get("whole_run") or []]
    if entries:
        parts += [Text(""), table(entries)]
        for entry in entries:
            parts += [*sentence_lines(entry), *negative_lines(entry)]
        parts += member_parts(entries, run)
        parts += shared_parts(entries)
        parts += [Text(""), Text(words.tally(entries), style="bold")]
        parts += [control_line(control) for control in control_sentences(answers)]
    return Group(*parts)


def whole_run_line(one: Mapping[str, Any]) -> str:
    """What a run measured under its arm of a global treatment, and why that is no effect."""
    level = words.level(one["mean"], one["unit"])
    return (
        f"{one['name']} (global treatment, arm {one['arm']}): {one['label']} {level}. "
        f"{one['sentence']}"
    )


def validation_line(record: Mapping[str, Any]) -> str:
    """The last validation losses in one line; "" where nothing was validated."""
    rows = validation_rows(record)
    shown = [
        f"{row['name']}{'@' + row['member'] if row['member'] else ''} {words.number(row['loss'])}"
        for row in rows
    ]
    at = f"after step {rows[0]['step']:,}" if rows else ""
    return f"Validation loss {at}, nats/token: {', '.join(shown)}." if rows else ""


def table(entries: list[Mapping[str, Any]]) -> Table:
    """One row an experiment; p is corrected, "detectable" the smallest effect that the design
    finds.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("question", max_width=20, overflow="fold")
    out.add_column("effect", overflow="fold")
    for name in ("p", "units", "detectable"):
        out.add_column(name, justify="right")
    out.add_column("answer", no_wrap=True)
    for entry in entries:
        primary, kind = entry.get("primary") or {}, verdict_kind(entry)
        unit = str(primary.get("unit") or "")
        out.add_row(
            Text(words.printable(entry.get("name"))),
            Text("\n".join(words.printable(part) for part in words.estimate(primary) if part)),
            Text(words.p_value(primary.get("p_corrected"))),
            Text(words.count(primary.get("n"))),
            Text(words.printable(words.size(primary.get("smallest_detectable"), unit))),
            Text(words.VERDICT_LABELS.get(kind, kind), style=STYLES.get(kind, "")),
        )
    return out


def member_parts(entries: list[Mapping[str, Any]], run: Mapping[str, Any]) -> list[Text | Table]:
    """The effect by member, one row an experiment and member; empty for a run of one member."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [(entry, row) for entry in entries for row in member_rows(entry, run)]
    if not rows:
        return []
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("question", "member"):
        out.add_column(name, max_width=24, overflow="fold")
    out.add_column("parameters", justify="right")
    out.add_column("effect", overflow="fold")
    out.add_column("p", justify="right")
    for entry, row in rows:
        name = words.printable(entry.get("name"))
        shown = " ".join(part for part in words.estimate(row["outcome"]) if part)
        out.add_row(
            Text(name),
            Text(words.printable(row["label"]) + (" *" if row["judged"] else "")),
            Text(words.big(row["parameters"])),
            Text(words.printable(shown)),
            Text(words.p_value(row["outcome"].get("p_corrected"))),
        )
    return [Text("\nEffect by member (*: the one that the answer is for)"), out]


def member_rows(entry: Mapping[str, Any], run: Mapping[str, Any]) -> list[by_member.Row]:
    """The rows of one experiment: its members, then the slope over their sizes."""
    rows = by_member.rows(entry, run)
    if slope := by_member.slope(entry):
        kind = words.VERDICT_LABELS[slope["kind"]].lower()
        told = {"label": f"slope ({kind})", "parameters": None, "judged": False}
        rows.append({**told, "outcome": slope["outcome"]})
    return rows


def shared_parts(entries: list[Mapping[str, Any]]) -> list[Text | Table]:
    """The four cells and the interaction of experiments that share units on purpose."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shared = [(e, o) for e in entries for o in e.get("secondary") or [] if o.get("cells")]
    if not shared:
        return []
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("question", "shares with", *words.CELLS, "interaction"):
        out.add_column(name, max_width=20, overflow="fold")
    for entry, outcome in shared:
        unit = str(outcome.get("unit") or "")
        cells = [f"{words.level(r['mean'], unit)} ({r['n']})" for r in outcome["cells"]["rows"]]
        found = [part for part in words.estimate(outcome) if part]
        found.append(f"p {words.p_value(outcome.get('p_corrected'))}")
        texts = [entry.get("name"), outcome["cells"]["with"], *cells, "\n".join(found)]
        out.add_row(*(Text("\n".join(map(words.printable, str(t).split("\n")))) for t in texts))
    return [Text("\nUnits that two experiments share: mean (units) by who showed them"), out]


def verdict_kind(entry: Mapping[str, Any]) -> str:
    """`found`, `not_found`, `negligible`, `invalid`, `interim` or `exploratory`."""
    return str((entry.get("verdict") or {}).get("kind"))


def sentence_lines(entry: Mapping[str, Any]) -> list[Text]:
    """The verdict of one experiment as a sentence, and its exploratory figures."""
    from rich.text import Text

    others = [words.printable(other["sentence"]) for other in entry.get("exploratory") or []]
    return [_sentence_line(entry), *(Text(f"  {text}", style="yellow") for text in others)]


def _sentence_line(entry: Mapping[str, Any]) -> Text:
    from rich.text import Text

    line = Text(words.printable(f"{entry.get('name')}: "), style="bold")
    sentence = words.sentence(entry.get("verdict") or {})
    return line.append(words.printable(sentence), style="not bold")


def negative_lines(entry: Mapping[str, Any]) -> list[Text]:
    """The negative control of one experiment, below its sentence; a report of before there were any
    has none.
    """
    control = entry.get("negative_control")
    return [control_line({"title": "Negative control", **control})] if control else []


def control_line(control: Mapping[str, Any]) -> Text:
    """One control: a sign and its sentence."""
    from rich.text import Text

    sign, style = {True: ("✓", "green"), False: ("✕", "bold red")}.get(control["ok"], ("○", "dim"))
    line = Text(f"{sign} ", style=style)
    return line.append(
        words.printable(f"{control['title']}: {control['sentence']}"), style="default"
    )
