"""The page of a plan, for one rank, a few, and many: words for people, pictures that can be
read.
"""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from motet.launcher.config import run_yaml
from motet.launcher.planning import charts, page_head
from motet.launcher.planning import page as plan_page
from motet.launcher.planning import table as plan_table
from motet.models.config import preset
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cost.terms import Training
from motet.parallel.cost.timeline import timeline
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.question import PlanAnswer, PlanQuestion

SVG = "{http://www.w3.org/2000/svg}"


def planned(pp: int) -> tuple[PlanQuestion, PlanAnswer]:
    question = PlanQuestion(
        preset("1b", 32_768, n_layers=max(16, pp)),
        homogeneous("h100", 8),
        Training(64, 2048),
        fixed={"pp": pp},
        top=2,
    )
    return question, plan(question)


@pytest.mark.parametrize("pp", [1, 4, 64])
def test_the_page_has_headings_for_people_and_a_row_for_every_rank(pp: int) -> None:
    question, answer = planned(pp)
    rows = [plan_table.row(i, choice, 1e9) for i, choice in enumerate(answer.choices, 1)]
    page = plan_page.page("a <plan>", question, answer, rows, 1e9)
    assert re.search("<th [^>]*>MFU %</th>", page)
    assert "mfu percent" not in page
    assert "a &lt;plan&gt;" in page
    assert "layouts predicted" in page
    pictures = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert len(pictures) == 4  # time and memory by what takes them, then both over time
    heights = {box.get("y") for box in pictures[2].iter(f"{SVG}rect")}
    assert len(heights) == pp
    assert len(list(pictures[3].iter(f"{SVG}polygon"))) == pp


@pytest.mark.parametrize("pp", [1, 4, 64])
def test_names_of_ranks_do_not_overlap_and_passes_are_wide_enough_to_be_seen(pp: int) -> None:
    question, answer = planned(pp)
    works, drawn, number = charts.pipeline_works(question, answer.best)
    assert 0 < drawn <= number
    picture = ET.fromstring(charts.pipeline_svg(works))
    names = [t for t in picture.iter(f"{SVG}text") if (t.text or "").startswith("rank")]
    places = [float(t.get("y", "0")) for t in names]
    assert all(b - a >= 12 for a, b in pairwise(places))
    widths = sorted(float(box.get("width", "0")) for box in picture.iter(f"{SVG}rect"))
    assert widths[len(widths) // 2] >= 1.0


@pytest.mark.parametrize(
    ("schedule", "virtual"), [("1f1b", 1), ("interleaved_1f1b", 2), ("zbv_zero_bubble", 2)]
)
def test_what_a_rank_holds_ends_at_nothing_and_is_never_less(schedule: str, virtual: int) -> None:
    stages = 4 * virtual
    works = timeline(schedule, 4, virtual, 8, [1.0] * stages, [2.0] * stages)
    for rank in range(4):
        held = [count for _, count in charts.held_over_time(works, rank)]
        assert min(held) >= 0
        assert held[-1] == 0
        assert max(held) >= 1


def test_the_head_says_the_model_the_machines_the_currency_and_the_command() -> None:
    question, answer = planned(4)
    shown = page_head.facts(question, answer.best, 1e9)
    assert shown["Model"].startswith("1.2")
    assert shown["Cluster"] == "h100: 8 nodes of 8 h100, infiniband between them"
    assert "does not name it" in shown["Prices"]
    named = replace(question, cluster=replace(question.cluster, currency="EUR"))
    assert page_head.facts(named, answer.best, 1e9)["Prices"].startswith("in EUR; ")
    rows = [plan_table.row(1, answer.best, 1e9)]
    page = plan_page.page("big", question, answer, rows, 1e9, "a <run>.yaml", "c.yaml")
    assert "motet submit &#x27;a &lt;run&gt;.yaml&#x27; layout.processes=8" in page


def test_the_command_of_the_page_gives_the_layout_of_the_page(tmp_path: Path) -> None:
    _, answer = planned(4)
    path = tmp_path / "run.yaml"
    words = shlex.split(page_head.command(answer.best, str(path), None))
    assert words[:3] == ["motet", "submit", str(path)]
    path.write_text(
        "name: r\nmodel: {preset: 1b}\ndata: {sequence_length: 2048, corpora: [{path: .}]}\n"
        "batch: {sequences: 64}\ntraining: {steps: 10}\nexperiments: {controls: false}\n"
    )
    settings, _ = run_yaml.inspect(path, words[3:])
    assert settings is not None
    assert (settings.slurm.nodes, settings.slurm.gpus_per_node) == (8, 8)
    assert settings.layout_for(64) == answer.best.layout
