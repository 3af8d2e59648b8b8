"""Many experiments in one run against each of them alone, and against a run without any.

    python bench/ten_experiments.py                  train what is missing, then print the table
    python bench/ten_experiments.py --summary --json print it from what is kept, train nothing
    python bench/ten_experiments.py --summary --pictures docs/experiments/img    draw what is kept
    python bench/ten_experiments.py --summary --pictures FOLDER --draw RUN       draw another run

The run is `examples/ten_experiments.yaml`. Text: presidents' speeches (`speeches.jsonl` under
$MOTET_SHARED, 2.9 MB) and the documentation strings of Python's standard library, in repeated
epochs. One process, one thread. Arms, each one training of the same length:

    joint            all experiments at once, with their two controls
    clean-SEED       no experiments; the loss of `joint` is compared with that of its own seed, and
                     with how much the seeds differ among themselves
    alone-NAME       one experiment by itself: same units, arms and places, as far as nobody else
                     held them

Two estimates of one effect *agree* when the interval of their difference holds 0. The interval
takes the two standard errors as independent, which they are not quite: both runs have the same
units in the same arms, so the interval is rather too wide than too narrow for what differs by
sharing, and BENCHMARKS.md prints the differences themselves beside it.

An arm that ends is kept in `--results` at once. Arms that were made with other settings do not
count.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from validity import motet

from motet.core.files import write_json
from motet.core.hashing import canonical_json, sha256_hex
from motet.launcher.report import page, plots
from motet.launcher.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "results" / "ten_experiments.json"
RUN = ROOT / "examples" / "ten_experiments.yaml"
SHARED = Path(os.environ.get("MOTET_SHARED", ROOT.parent / "shared"))
STYLE = ROOT / "launcher" / "output" / "style.css"
CLEAN_SEEDS = (1, 2, 3)
Z = 1.96
FIELDS = ("name", "label", "unit", "effect", "low", "high", "p", "n_treated", "n_control")


def settings() -> dict[str, Any]:
    """The run of the example."""
    found = OmegaConf.to_container(OmegaConf.load(RUN))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def arms(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{arm: settings of its run}: the joint one first, then clean ones, then each alone."""
    entries = run["experiments"]["list"]

    def with_experiments(name: str, kept: list[Any], controls: bool) -> dict[str, Any]:
        made = copy.deepcopy(run) | {"name": name}
        made["experiments"] = {"controls": controls, "list": kept}
        return made

    found = {"joint": with_experiments("joint", entries, True)}
    for seed in CLEAN_SEEDS:
        clean = with_experiments(f"clean-{seed}", [], False)
        if seed != run["seed"]:
            # Another initialization; the text that is held out stays, or its loss tells of the text.
            clean |= {"seed": seed, "data": {**clean["data"], "seed": run["seed"]}}
        found[clean["name"]] = clean
    for entry in entries:
        alone = with_experiments(f"alone-{entry['name']}", [entry], False)
        found[alone["name"]] = alone
    return found


def fingerprint(run: dict[str, Any]) -> str:
    """What a kept arm must have been made with."""
    return sha256_hex(canonical_json(run))[:12]


def train(folder: Path, corpus: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Train one arm; its effects, losses and seconds."""
    made = copy.deepcopy(run)
    made["data"]["corpora"] = [{"path": str(corpus)}]
    path = folder / f"{run['name']}.yaml"
    path.write_text(json.dumps(made), encoding="utf-8")
    began = time.monotonic()
    motet("train", str(path))
    seconds = time.monotonic() - began
    where = folder / "runs" / run["name"]
    rows = read_metrics(where / "metrics.jsonl")
    (losses,) = [row["losses"] for row in rows if row["kind"] == "validation"][-1:]
    spent = {
        kind: sum(row["seconds"] for row in rows if row["kind"] == kind)
        for kind in ("probe", "validation")
    }
    steps = [row["seconds"] for row in rows if row["kind"] == "step"]
    spent["train"] = sum(one["train"] + one["data"] for one in steps)
    answers: dict[str, Any] = {}
    if run["experiments"]["list"]:
        report = json.loads(motet("report", str(where), "--json"))
        drawn = run["name"] == "joint"
        entries = report["answers"]["experiments"]
        answers = {entry["name"]: kept(entry, drawn) for entry in entries}
    return {
        "loss": sum(losses.values()) / len(losses),
        "seconds": seconds,
        "spent": spent,
        "answers": answers,
    }


def kept(entry: dict[str, Any], drawn: bool) -> dict[str, Any]:
    """What is kept of an answer; `drawn`: with the curves of its primary outcome."""
    primary, curves = entry["primary"], entry["curves"]
    found = {key: primary.get(key) for key in FIELDS} | {"verdict": entry["verdict"]["kind"]}
    if drawn:
        doses = {arm["name"]: arm["dose"] for arm in entry["arms"]}
        found |= {"doses": doses, "since_exposure": curves.get("since_exposure")}
        panels = page.primary_first(curves["over_time"], primary)
        found["over_time"] = panels[0] if panels else {}
    return found


def answers_of(run: Path) -> dict[str, Any]:
    """What is drawn of a run's answers."""
    report = json.loads(motet("report", str(run), "--json"))
    return {entry["name"]: kept(entry, True) for entry in report["answers"]["experiments"]}


def trained(results: Path, wanted: dict[str, dict[str, Any]], only: list[str]) -> None:
    """Train every arm that is not kept yet, and keep it."""
    known = read(results)
    missing = [
        name
        for name, run in wanted.items()
        if known.get(name, {}).get("settings") != fingerprint(run) and (not only or name in only)
    ]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary), Path(temporary) / "corpus"
        texts = (str(SHARED / "data" / "speeches.jsonl"), "stdlib:")
        motet("data", "prepare", *texts, "--output", str(corpus), "--vocabulary-size", "1024")
        for number, name in enumerate(missing, start=1):
            row = {"settings": fingerprint(wanted[name])} | train(folder, corpus, wanted[name])
            known = read(results) | {name: row}
            write_json(results, known)
            said = f"{number} of {len(missing)} arms: {name}, {row['seconds']:.0f} s"
            print(f"{said}, loss {row['loss']:.4f}", file=sys.stderr, flush=True)


def read(results: Path) -> dict[str, Any]:
    """The arms that are kept."""
    if not results.exists():
        return {}
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found


def standard_error(one: dict[str, Any]) -> float:
    """From the width of a 95 % interval."""
    return float(one["high"] - one["low"]) / (2 * Z)


def pair(name: str, joint: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Two estimates of one effect."""
    difference = joint["effect"] - alone["effect"]
    error = math.hypot(standard_error(joint), standard_error(alone))
    return {
        "experiment": name,
        "unit": joint["unit"],
        "joint": [joint[key] for key in ("effect", "low", "high")],
        "alone": [alone[key] for key in ("effect", "low", "high")],
        "difference": difference,
        "agree": abs(difference) <= Z * error,
        "alone_inside": joint["low"] <= alone["effect"] <= joint["high"],
        "verdicts": [joint["verdict"], alone["verdict"]],
    }


def summary(found: dict[str, Any], wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table from what is kept; what is missing is named."""
    good = {n: r for n, r in found.items() if n in wanted}
    good = {n: r for n, r in good.items() if r["settings"] == fingerprint(wanted[n])}
    missing = [name for name in wanted if name not in good]
    joint = good.get("joint", {})
    pairs = []
    for name, answer in joint.get("answers", {}).items():
        alone = good.get(f"alone-{name}", {}).get("answers", {}).get(name)
        if alone and None not in (answer["effect"], alone["effect"], answer["low"], alone["low"]):
            pairs.append(pair(name, answer, alone))
    clean = {seed: good[f"clean-{seed}"]["loss"] for seed in CLEAN_SEEDS if f"clean-{seed}" in good}
    own = clean.get(wanted["joint"]["seed"])
    spent = joint.get("spent")
    return {
        "experiments": len(wanted["joint"]["experiments"]["list"]),
        "agree": sum(one["agree"] for one in pairs),
        "pairs": len(pairs),
        "probe_time_share": spent["probe"] / spent["train"] if spent else None,
        "loss_joint": joint.get("loss"),
        "loss_clean": own,
        "seed_spread": max(clean.values()) - min(clean.values()) if len(clean) > 1 else None,
        "joint_seconds": joint.get("seconds"),
        "table": pairs,
        "missing": missing,
    }


def pictures(answers: dict[str, Any], folder: Path) -> None:
    """Draw the primary outcome of each experiment of the joint run: since the exposure where that
    is the question, else by arm over training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, answer in answers.items():
        if "over_time" not in answer:
            raise SystemExit(f"{name} was kept without its curves: train the arm `joint` anew")
        svg = plots.since_exposure({"curves": answer}, name)
        svg = svg or plots.over_time(answer["over_time"], answer["doses"], name)
        if svg:
            (folder / f"{name}.svg").write_text(alone(svg), encoding="utf-8")


def agreement(table: list[dict[str, Any]], path: Path) -> None:
    """Draw each effect in the joint run and alone, in standard errors of the joint one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "agreement", "font.size": 9.0}
    figure, axes = pyplot.subplots(figsize=(6.6, 0.34 * len(table) + 0.9))
    for side, shift, colour in (("joint", -0.14, "#0b7a75"), ("alone", 0.14, "#c2571a")):
        for row, one in enumerate(table):
            effect, low, high = one[side]
            unit = (one["joint"][2] - one["joint"][1]) / (2 * Z)
            axes.plot([low / unit, high / unit], [row + shift] * 2, color=colour, linewidth=1.4)
            label = side if row == 0 else None
            axes.plot(effect / unit, row + shift, "o", color=colour, markersize=4, label=label)
    axes.axvline(0, color="#8b8d8e", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(table)), [one["experiment"] for one in table])
    axes.invert_yaxis()
    axes.set_xlabel("effect and 95 % interval, in standard errors of the joint run")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def alone(svg: str) -> str:
    """A drawing of the report's page as a file of its own, with the page's colours, by day and by
    night.
    """
    colours = STYLE.read_text(encoding="utf-8").split("* {", 1)[0]
    style = f"<style>{colours}svg {{ background: var(--paper) }}</style>"
    head, body = svg.split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}>{style}{body}\n"


def said(found: dict[str, Any]) -> str:
    """The summary as lines."""
    lines = [f"{'experiment':<22}{'joint':>28}{'alone':>28}  agree  unit"]
    for one in found["table"]:
        cells = ["{:+.3g} [{:+.3g}, {:+.3g}]".format(*one[side]) for side in ("joint", "alone")]
        lines.append(
            f"{one['experiment']:<22}{cells[0]:>28}{cells[1]:>28}  "
            f"{'yes' if one['agree'] else 'NO':<5}  {one['unit']}"
        )
    lines.append(f"{found['agree']} of {found['pairs']} pairs agree")
    if found["seed_spread"] is not None and found["loss_joint"] and found["loss_clean"]:
        apart = found["loss_joint"] - found["loss_clean"]
        lines.append(
            f"loss {found['loss_joint']:.4f} joint, {found['loss_clean']:.4f} clean ({apart:+.4f}); "
            f"{len(CLEAN_SEEDS)} clean seeds lie within {found['seed_spread']:.4f}"
        )
    if found["probe_time_share"] is not None:
        share, spent = found["probe_time_share"], found["joint_seconds"]
        lines.append(f"probes took {share:.1%} of training time; the joint run {spent:.0f} s")
    if found["missing"]:
        lines.append(f"not trained yet: {', '.join(found['missing'])}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=KEPT)
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--only", nargs="*", default=[], help="names of arms")
    parser.add_argument("--pictures", type=Path, help="folder to draw the joint run into")
    parser.add_argument("--draw", type=Path, help="folder of a run to draw instead")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    wanted = arms(settings())
    if not asked.summary:
        trained(asked.results, wanted, asked.only)
    arms_kept = read(asked.results)
    found = summary(arms_kept, wanted)
    if asked.pictures and not asked.draw:
        asked.pictures.mkdir(parents=True, exist_ok=True)
        agreement(found["table"], asked.pictures / "agreement.svg")
    if asked.pictures:
        pictures(
            answers_of(asked.draw) if asked.draw else arms_kept["joint"]["answers"], asked.pictures
        )
    print(json.dumps(found, indent=1) if asked.json else said(found))


if __name__ == "__main__":
    main()
