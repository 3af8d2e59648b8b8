"""report.json -> one self-contained HTML page: no script, no request, everything that came from
data escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.launcher.output import page as pages
from motet.launcher.report import by_member, plots, words
from motet.launcher.report import family as families
from motet.launcher.report.copies import copies
from motet.launcher.report.forest import forest
from motet.launcher.report.training import validation_rows

HERE = Path(__file__).parent
CLOSED_AFTER_PANELS = 2
MOST_DRAWN = 24
"""Of more experiments, only so many have curves: those with the smallest p, and the controls."""
BREAK = re.compile(r"\n\s+")
DOSE_NAMES = {
    "exposures": "exposures per unit",
    "documents": "documents in all",
    "tokens": "tokens in all",
    "share": "share of the tokens of its window",
}
Entry = dict[str, Any]


def render(report: Mapping[str, Any]) -> str:
    """The page of a report; equal reports give equal bytes.

    Missing parts are said to be missing.
    """
    from markupsafe import Markup

    return pages.render("report.html", HERE, {"w": words}, **context(report, Markup))


def context(report: Mapping[str, Any], markup: Any) -> dict[str, Any]:
    """Everything the template shows.

    `markup` marks drawings, which are the only unescaped parts.
    """
    answers = report.get("answers") or {}
    doses = dose_names(report.get("definition") or {})
    entries: list[Entry] = list(answers.get("experiments") or [])
    questions = [e for e in entries if e.get("role", "question") == "question"]
    controls = control_entries(answers, entries)
    record = report.get("training") or {}
    names = [e["name"] for e in entries]
    names += [n for n in record.get("exposure_steps") or {} if n not in names]
    loss = plots.training(record, names, "loss")
    drawn = names_drawn(questions)
    few = len(drawn) == len(questions)
    views = Views(report.get("run") or {}, record, doses, markup, few)
    return {
        "report": report,
        "run": report.get("run") or {},
        "cost": report.get("cost") or {},
        "compliance": report.get("compliance") or {},
        "doses": [
            row
            for row in (report.get("compliance") or {}).get("per_experiment") or []
            if any(arm["consumed"] for arm in row.get("doses") or [])
        ],
        "answers": answers,
        "questions": [views.of(e, f"q{i}", e["name"] in drawn) for i, e in enumerate(questions)],
        "undrawn": len(questions) - len(drawn),
        "controls": [views.of(e, f"c{i}") for i, e in enumerate(controls)],
        "control_sentences": control_sentences(answers),
        "alarms": alarms(report),
        "copies": copies(report),
        "validation": (validation := validation_rows(record)),
        "validation_members": any(row["member"] for row in validation),
        "loss_plot": markup(loss) if loss else None,
        "spent": spent(record.get("seconds") or {}),
        "definition_text": pretty(report.get("definition")),
        "skipped_steps": record.get("skipped_steps") or [],
        "family": families.view(report.get("family") or {}, markup),
        "benchmarks": report.get("benchmarks") or [],
    }


def names_drawn(questions: Sequence[Entry]) -> set[str]:
    """The questions whose curves the page draws: all, or those with the smallest p of very many."""
    ranked = sorted(questions, key=lambda e: ((e.get("primary") or {}).get("p") or 1.0, e["name"]))
    return {entry["name"] for entry in ranked[:MOST_DRAWN]}


def dose_names(definition: Mapping[str, Any]) -> dict[str, str]:
    """What the doses of each experiment's arms count, in words, from the frozen definition."""
    specs = [entry.get("spec") or {} for entry in definition.get("experiments") or []]
    return {
        spec.get("name", ""): DOSE_NAMES.get(spec.get("dose_in", ""), "exposures per unit")
        for spec in specs
    }


def control_entries(answers: Mapping[str, Any], entries: Sequence[Entry]) -> list[Entry]:
    """The placebo and the positive control, wherever the answers hold them, each once."""
    held = answers.get("controls") or {}
    named = [held[k] for k in ("placebo", "positive") if held.get(k) and held[k].get("primary")]
    seen = {entry["name"] for entry in named}
    return named + [
        e for e in entries if e.get("role", "question") != "question" and e["name"] not in seen
    ]


def control_sentences(answers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One plain sentence per control, also when it is absent."""
    held = answers.get("controls") or {}
    absent = {
        "placebo": "This run has no A/A placebo, so nothing here shows that it finds no effect "
        "where there is none.",
        "positive": "This run has no positive control, so nothing here shows that it would find "
        "an effect that is there.",
    }
    titles = {"placebo": "A/A placebo", "positive": "Positive control"}
    out = []
    for kind, title in titles.items():
        control = held.get(kind)
        ok = bool(control.get("ok")) if control else None
        sentence = (control.get("sentence") or "") if control else absent[kind]
        rows = (control or {}).get("by_member") or []
        out.append({"title": title, "ok": ok, "sentence": sentence, "by_member": rows})
    return out


def alarms(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before reading any answer."""
    controls = control_sentences(report.get("answers") or {})
    out = [f"{c['title']} failed: {c['sentence']}" for c in controls if c["ok"] is False]
    out += [
        f"{c['title']} failed at {words.member(row['member'])}, so no figure of this member is "
        f"valid: {row['sentence']}"
        for c in controls
        for row in c["by_member"]
        if row["ok"] is False and row["sentence"] != c["sentence"]
    ]
    out += [
        f"{unanswered['name']} has no answer, and counts as p = 1 in the correction of the others: "
        f"{unanswered['why']}"
        for unanswered in (report.get("answers") or {}).get("unanswered") or []
    ]
    compliance = report.get("compliance") or {}
    bad = {k: compliance.get(k) or 0 for k in ("missing", "duplicated")}
    if any(bad.values()):
        told = " and ".join(f"{n:,} {kind}" for kind, n in bad.items() if n)
        out.append(
            f"Exposures did not all happen as planned: {told} of {compliance.get('planned', 0):,}."
        )
    others = compliance.get("told_by_others") or []
    out += [
        words.told_by_other(row) for row in others if not row["declared"] and row["held_out_units"]
    ]
    if not (report.get("run") or {}).get("finished"):
        out.append("This run has not finished: every figure here is provisional.")
    return out


@dataclass(frozen=True)
class Views:
    """What the drawings of all experiments need of the report: the `run` and `training` parts, what
    doses count by experiment, and the mark of a drawing. `all_panels`: secondary outcomes are drawn
    over time as well.
    """

    run: Mapping[str, Any]
    record: Mapping[str, Any]
    dose_in: Mapping[str, str]
    markup: Any
    all_panels: bool = True

    def of(self, entry: Entry, key: str, curves: bool = True) -> dict[str, Any]:
        """One experiment with its drawings.

        `key` is its anchor and the prefix of ids in its drawings; `curves`: more than the interval
        is drawn.
        """
        figures = self.figures(entry, key) if curves else []
        kind = (entry.get("verdict") or {}).get("kind") or "not_found"
        kind = kind if kind in words.VERDICT_LABELS else "not_found"
        primary = entry.get("primary") or {}
        members = by_member.rows(entry, self.run)
        picture = by_member.picture(members, f"{key}-members")
        moved = words.most_moved(primary) if primary.get("test") == "omnibus" else None
        drawn = primary if moved is None else {**primary, **moved}
        levels = ((entry.get("curves") or {}).get("dose_response") or {}).get("range")
        return {
            "entry": {**entry, "dose_in": self.dose_in.get(entry["name"])},
            "key": key,
            "kind": kind,
            "primary": primary,
            "sentence": words.sentence(entry.get("verdict") or {}),
            "arms": arm_rows(entry, primary),
            "forest": self.markup(forest(drawn, kind, levels)),
            "figures": figures[:CLOSED_AFTER_PANELS],
            "more_figures": figures[CLOSED_AFTER_PANELS:],
            "members": members,
            "member_figure": self.markup(picture) if picture else None,
            "further": by_member.further(entry),
            "slope": by_member.slope(entry),
        }

    def figures(self, entry: Entry, key: str) -> list[tuple[str, Any]]:
        """(caption, drawing) of every curve; the one since exposure first."""
        curves = entry.get("curves") or {}
        doses = {arm["name"]: arm.get("dose") for arm in entry.get("arms") or []}
        window = sorted(set((self.record.get("exposure_steps") or {}).get(entry["name"], [])))
        window = window[:: max(1, len(window) // 150)]
        panels = primary_first(curves.get("over_time") or [], entry.get("primary") or {})
        panels = panels if self.all_panels else panels[:1]
        dose_in = self.dose_in.get(entry["name"], "exposures per unit")
        drawn = [plots.dose_response(entry, f"{key}-dose", dose_in)]
        drawn += [plots.over_time(p, doses, f"{key}-t{i}", window) for i, p in enumerate(panels)]
        drawn.append(plots.since_exposure(entry, f"{key}-since"))
        told = captions(entry, panels)
        figures = [(c, self.markup(d)) for c, d in zip(told, drawn, strict=True) if d]
        if curves.get("since_exposure") and figures:
            figures.insert(0, figures.pop())
        return figures


def captions(entry: Mapping[str, Any], panels: Sequence[Entry]) -> list[str]:
    """What stands above the curves: the dose-response, `panels` over time, since the exposure; each
    with its units and what its bars or bands are.
    """
    curves = entry.get("curves") or {}
    dose = curves.get("dose_response") or {}
    names = [f"Dose-response: {dose.get('label') or 'outcome'}"]
    names += [f"{p.get('label', 'Outcome')} over training" for p in panels]
    names.append((curves.get("since_exposure") or {}).get("label") or "Since the exposure")
    within = f"{words.percent(plots.OUTCOME_CONFIDENCE)} interval"
    units = [arm.get("n_units") for arm in entry.get("arms") or []]
    counted = words.units_in_arms(dose.get("n") or units)
    counted += ", " if counted else ""
    marks = ["bars", *["bands"] * (len(names) - 1)]
    return [
        f"{name[:1].upper()}{name[1:]} ({counted}{mark}: {within})"
        for name, mark in zip(names, marks, strict=True)
    ]


def primary_first(panels: Sequence[Entry], primary: Mapping[str, Any]) -> list[Entry]:
    """The curves over time, that of the primary outcome first."""
    return sorted(
        panels, key=lambda p: p.get("outcome") not in (primary.get("name"), primary.get("label"))
    )


def arm_rows(entry: Entry, primary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arms with the outcome of each, joined by name."""
    measured = {row.get("arm"): row for row in primary.get("per_arm") or []}
    return [{**arm, "outcome": measured.get(arm["name"]) or {}} for arm in entry.get("arms") or []]


def spent(seconds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the time went: name, seconds and share of each phase, largest first."""
    labels = {
        "train": "training",
        "probe": "probes",
        "checkpoint": "checkpoints",
        "data": "reading data",
    }
    known = [(labels.get(k, k), words.finite(v) or 0.0, k) for k, v in seconds.items()]
    total = sum(s for _, s, _ in known)
    if not total:
        return []
    ranked = sorted(known, key=lambda item: -item[1])
    return [{"name": n, "seconds": s, "share": s / total, "key": k} for n, s, k in ranked]


def pretty(value: Any) -> str:
    """Indented JSON with sorted keys and short lists on one line; "" for nothing."""
    if not value:
        return ""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    # a raw line break is never inside a JSON string, so this folds only lists of plain values
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda m: f"[{re.sub(BREAK, ' ', m[1])}]", text)
