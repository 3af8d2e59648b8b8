"""`motet plan`: what is printed, written and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.launcher.cli import main
from motet.launcher.commands import train
from motet.launcher.commands.plan.told import roomy
from motet.launcher.config import run_yaml
from motet.launcher.config.batch import groups_of
from motet.launcher.jobs.schedulers import world_size
from motet.launcher.launch.command import NodePlace
from motet.launcher.runs.described_model import model_of
from motet.launcher.runs.families import draws_of, new_family, new_members
from motet.launcher.runs.stage_layouts import checked_layouts, family_of
from motet.models.config import preset
from motet.parallel.layout import rules

RUN = """
name: planned
model: {preset: 1b, vocabulary_size: 32768}
data: {sequence_length: 2048, corpora: [{path: nowhere}]}
batch: {sequences: 64}
training: {tokens: 100000000}
"""
MODEL = preset("1b", 32768)
CLUSTER = """
groups:
  - {name: hall, device: h100, nodes: 1, devices_per_node: 4}
  - {name: attic, device: a100-40, nodes: 1, devices_per_node: 4}
links:
  - {between: [hall, attic], gbit_s: 100, latency_us: 50, kind: ethernet}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    run, cluster = tmp_path / "run.yaml", tmp_path / "cluster.yaml"
    run.write_text(RUN)
    cluster.write_text(CLUSTER)
    return str(run), str(cluster)


def test_the_layout_that_is_written_is_one_that_a_run_takes(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    written, page = tmp_path / "layout.yaml", tmp_path / "plan.html"
    words = ["plan", run, "--cluster", cluster, "--json", "--write", str(written)]
    assert main([*words, "--html", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    best = told["layouts"][0]
    assert best["interval_s"][0] < best["step_time_s"] < best["interval_s"][1]
    assert sum(best["parts_s"].values()) == pytest.approx(best["step_time_s"], rel=1e-6)
    assert best["memory_gib"] <= best["capacity_gib"]
    assert "<svg" in page.read_text()
    text = RUN + written.read_text()
    settings = run_yaml.load(
        None, text=text, base=tmp_path, world=lambda s: s.layout_for(8).world_size
    )
    layout = settings.layout_for(settings.layout.processes)
    assert layout.tp == best["settings"]["tp"]
    assert layout.micro_sequences == best["settings"]["micro_sequences"]


def test_why_tells_the_phases_and_a_table_tells_the_rest(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    assert main(["plan", run, "--cluster", cluster, "--why", "tp=4,pp=2"]) == 0
    assert "longer than the fastest" in capsys.readouterr().out
    assert main(["plan", run, "--cluster", cluster, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "MFU %" in out
    assert "one-minute run" in out


UNEQUAL = """
groups:
  - {name: hall, device: t4, nodes: 1, devices_per_node: 4}
  - {name: attic, device: t4, nodes: 2, devices_per_node: 2, nics: {count: 2, gbit_s: 100}}
links:
  - {between: [hall, attic], gbit_s: 100, latency_us: 50, kind: ethernet}
"""


def test_a_layout_on_unequal_nodes_is_written_so_that_train_and_submit_start_all_its_ranks(
    files: tuple[str, str], tmp_path: Path
) -> None:
    run, cluster = files
    Path(cluster).write_text(UNEQUAL)
    written = tmp_path / "layout.yaml"
    words = ["layout.pp=4", "layout.engine=native", "--write", str(written)]
    assert main(["plan", run, "--cluster", cluster, *words]) == 0
    text = written.read_text()
    assert "# Nodes, in this order: 1 of hall with 4 processes each, 2 of attic with 2" in text
    whole = tmp_path / "whole.yaml"
    whole.write_text(RUN + text)
    job = run_yaml.load(whole, world=world_size)
    assert world_size(job) == 8
    assert [(g.nodes, g.processes) for g in groups_of(job.slurm, job.layout)] == [(1, 4), (2, 2)]
    for processes in (4, 2):  # as the first and as another machine starts it
        by_hand = run_yaml.load(
            whole,
            [f"layout.processes={processes}"],
            world=lambda s: train.ranks_on(s, NodePlace(3, 0, "n1:29400")),
        )
        assert by_hand.layout_for(8).world_size == 8
    with pytest.raises(UserError, match="layout"):
        run_yaml.load(whole, world=lambda s: train.ranks_on(s, NodePlace(5, 0, "n1:29400")))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("tp=4,pp=2", "longer than the fastest"),
        ("tp=8", "a node has 4 devices"),
        ("tp=3", "3 does not divide"),
        ("dp_shard=64", "needs at least 64 devices, and there are 8"),
        ("cp=8", "stay inside one group of the cluster, and the largest has 4 devices"),
        ("micro_sequences=64", "searched up to 16"),
        ("zero_stage=3,engine=native", "of DeepSpeed only"),
        ("engine=deepspeed,tp=2", "layout.engine=deepspeed can do"),
        ("pp=1,schedule=interleaved_1f1b", "is for pipelines"),
        ("schedule=gpipe", "only where 1f1b cannot run"),
    ],
)
def test_every_layout_that_is_not_the_first_has_a_reason(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], asked: str, told: str
) -> None:
    run, cluster = files
    assert main(["plan", run, "--cluster", cluster, "--why", asked]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{asked}: ")
    assert told in out


def test_experts_are_divided_among_ranks_that_nobody_has_to_name(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    experts = ["model.n_experts=8", "model.experts_per_token=2", "model.d_expert=1024"]
    words = ["plan", run, "--cluster", cluster, "layout.engine=native", *experts]
    for asked in ("ep=2", "ep=4,tp=2", "ep=4,dp_shard=2"):
        assert main([*words, "--why", asked]) == 0
        assert "the fastest" in capsys.readouterr().out
    assert main([*words, "--why", "ep=3"]) == 0
    assert "3 does not divide model.n_experts=8" in capsys.readouterr().out


def test_what_the_first_has_is_called_the_fastest(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    words = ["plan", run, "--cluster", cluster, "layout.engine=native", "--json"]
    assert main(words) == 0
    best = json.loads(capsys.readouterr().out)["layouts"][0]["settings"]
    asked = ",".join(f"{name}={best[name]}" for name in ("tp", "pp", "cp", "micro_sequences"))
    assert main([*words, "--why", asked]) == 0
    assert "this is the fastest" in json.loads(capsys.readouterr().out)["reasons"]


def test_all_settings_are_told_with_their_best_layouts(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    words = ["plan", run, "--cluster", cluster, "layout.engine=native", "layout.cp=1"]
    assert main([*words, "--why", "all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    names = {row["setting"] for row in rows}
    assert names == {"tp", "pp", "micro_sequences", "recompute"}  # cp and engine are fixed
    best = min(row["time_s"] for row in rows if row["time_s"] is not None)
    for name in names:
        mine = [row for row in rows if row["setting"] == name]
        assert [row["why"] for row in mine].count("the first has it") == 1
        assert min(row["time_s"] for row in mine if row["time_s"]) == best
        assert all(row["why"] or row["time_s"] < 1.1 * best for row in mine)


def test_a_budget_gives_the_shortest_time_or_the_largest_model(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    words = ["plan", run, "--cluster", cluster, "layout.engine=native", "--budget"]
    assert main([*words, "3gpu-hours", "--fastest"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The shortest time: planned (1.2 B parameters) on 1e+08 tokens")
    assert "The budget does not bind." in out
    assert main([*words, "3gpu-hours", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device_hours"] <= 3
    assert "device-hours" in told["binds"]
    assert told["trust"]
    assert main([*words, "3gpu-hours"]) == 0
    assert f"Doubt: {told['trust'][0]}." in capsys.readouterr().out
    assert main([*words, "0.001gpu-hours", "--fastest"]) == 2
    error = capsys.readouterr().err
    assert "does not train this run's model to the end: the cheapest that was found takes" in error


def test_the_line_below_the_table_says_what_its_numbers_count(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    assert main(["plan", run, "--cluster", cluster, "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "layouts predicted. Left out before that, as sets of layouts (" in out
    assert "too slow by a lower bound of their time" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--why", "tpp=4"], "did you mean 'tp'?"),
        (["--why", "tp=4,tp=2"], "tp is given twice"),
        (["--why", "recompute=fulll"], "none, selective, full"),
        (["--why", "tp=0"], "not a whole number above 0"),
        (["--fastest"], "give --budget, --budget-price or --days"),
        (["--budget", "1.2.3gpu-hours"], "10000gpu-hours"),
        (["--output", "x.yaml"], "--write FILE is for layout.yaml"),
        (["--probe", "-1"], "is not the number of a layout"),
        (["--top", "0"], "--top: 0 is not at least 1"),
        (["--seconds", "0"], "--seconds: 0 is not a number above 0, such as 10"),
        (["--seconds", "nan"], "--seconds: nan is not a number above 0"),
        (["--pick", "2"], "--write FILE"),
        (["--budget", "much"], "10000gpu-hours"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml"),
        (
            [
                "model.preset=7b",
                "layout.engine=native",
                "layout.cp=1",
                "layout.pp=1",
                "layout.tp=1",
                "layout.dp_shard=1",
            ],
            "What would fit",
        ),
    ],
)
def test_nonsense_gets_one_message_and_exit_code_2(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    run, cluster = files
    here = [] if "--cluster" in words else ["--cluster", cluster]
    assert main(["plan", run, *here, *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("motet:") == 1


def test_planning_loads_no_torch(files: tuple[str, str]) -> None:
    run, cluster = files
    code = (
        "import sys; from motet.launcher.cli import main; "
        f"main(['plan', {run!r}, '--cluster', {cluster!r}, '--top', '1']); sys.exit('torch' in "
        "sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode
        == 0
    )


FAMILY = """
family:
  kind: nested
  options: {members: {half: {d_ffn: 0.5}, short: {d_ffn: 0.5, n_layers: 8}}, draws: 2, groups: 2}
"""
UNDIVIDED = ["layout.pp=1", "layout.cp=1", "layout.micro_sequences=8"]


def test_a_family_is_priced_by_who_its_sampler_draws_beside_runs_of_each_member_alone(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(RUN + FAMILY)
    cluster = tmp_path / "small.yaml"
    cluster.write_text(CLUSTER.split("  - {name: attic")[0])
    asked = ["plan", str(path), "--cluster", str(cluster), *UNDIVIDED]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    family = found["family"]
    assert all(layout["settings"]["tp"] <= 2 for layout in found["layouts"])  # of 2 groups
    rows = {row["sampler"]: row for row in family["samplers"]}
    assert [name for name, row in rows.items() if row["chosen"]] == ["uniform"]
    assert "every phase but the last needs until_step" in rows["shrinking"]["refused"]
    alone = {row["member"]: row for row in family["members_alone"]}
    assert list(alone) == ["short", "half", "whole"]
    assert rows["joint"]["passes"] == {"whole": 1.0, "half": 1.0, "short": 1.0}
    total = sum(row["flops_per_step"] for row in alone.values())
    assert rows["joint"]["flops_per_step"] == pytest.approx(total)
    assert rows["sandwich"]["passes"].keys() == alone.keys()
    # One member at a time: every token is passed over once.
    for name in ("uniform", "matformer", "balanced"):
        assert sum(rows[name]["passes"].values()) == pytest.approx(1)
        assert rows[name]["step_time_s"] < alone["whole"]["step_time_s"]
        assert rows[name]["memory_gib"] == found["layouts"][0]["memory_gib"]
    assert rows["joint"]["step_time_s"] < family["all_alone"]["step_time_s"]
    assert main([*asked, "family.options.sampler=sandwich"]) == 0
    told = capsys.readouterr().out
    assert "sandwich *" in told
    assert "Alone, a step of each takes short" in told


def test_the_stages_of_a_family_are_priced_beside_separate_runs(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, cluster = tmp_path / "family.yaml", tmp_path / "small.yaml"
    stages = "[{name: half, depth: 0.5}, {operator: stack}]"
    path.write_text(
        f"{RUN}\nfamily: {{kind: progressive, options: {{preset: yano2025, stages: {stages}}}}}\n"
    )
    cluster.write_text(CLUSTER.split("  - {name: attic")[0])
    asked = ["plan", str(path), "--cluster", str(cluster), *UNDIVIDED]
    assert main([*asked, "--json"]) == 0
    family = json.loads(capsys.readouterr().out)["family"]
    half, whole = family["stages"]
    assert half["flops_per_token"] < whole["flops_per_token"]
    assert half["step_time_s"] < whole["step_time_s"]
    assert half["memory_gib"] < whole["memory_gib"] == family["memory_gib"]
    assert family["time_s"] == pytest.approx(half["time_s"] + whole["time_s"])
    assert whole["lineage_flops"] == family["flops"] < family["at_equal_cost"]
    # The first costs what it would alone: one part in all of it.
    share = half["lineage_flops"] / family["flops"]
    assert family["saved_at_equal_cost"] == pytest.approx(1 - 1 / (1 + share))
    assert main(asked) == 0
    assert "All stages take" in capsys.readouterr().out
    assert main(["family", "show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["flops"] == pytest.approx(family["flops"])


GROWS = """
name: planned
model: {preset: 1b, vocabulary_size: 32768, n_layers: 48, d_model: 4096, n_heads: 32, n_kv_heads: 8, head_dim: 128, d_ffn: 14336}
data: {sequence_length: 4096, corpora: [{path: nowhere}]}
batch: {sequences: 64}
training: {steps: 10000}
family:
  kind: progressive
  options:
    stages:
    - {name: quarter, depth: 0.25, steps: 3000}
    - {name: half, depth: 0.5, steps: 3000, operator: stack}
    - {operator: stack}
"""


def test_a_stage_is_proposed_a_layout_of_its_own_that_a_run_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, cluster, written = (tmp_path / name for name in ("run.yaml", "cluster.yaml", "out.yaml"))
    path.write_text(GROWS)
    cluster.write_text("groups: [{name: hall, device: h100, nodes: 1, devices_per_node: 8}]")
    divided = ["layout.pp=1", "layout.cp=1", "layout.tp=1"]
    asked = ["plan", str(path), "--cluster", str(cluster), *divided]
    assert main([*asked, "--json", "--write", str(written)]) == 0
    found = json.loads(capsys.readouterr().out)
    run, stages = found["layouts"][0], found["family"]["stages"]
    assert stages[0]["layout"]
    assert not stages[-1]["layout"]
    whole = stages[-1]["step_time_s"] / stages[-1]["flops_per_token"]
    # The run's layout computes its blocks again, for want of memory that a small model leaves.
    assert stages[0]["step_time_s"] / stages[0]["flops_per_token"] < 0.95 * whole
    for number, stage in enumerate(stages):
        assert stage["memory_gib"] < 0.9 * run["capacity_gib"]
        said = f"stages[{number}], {stage['name']}: layout:"
        assert (said in written.read_text()) == bool(stage["layout"])
    together = tmp_path / "together.yaml"
    together.write_text(GROWS + written.read_text())
    own = [
        f"family.options.stages.{number}.layout={json.dumps(stage['layout'])}"
        for number, stage in enumerate(stages)
        if stage["layout"]
    ]
    settings = run_yaml.load(together, own)
    model = model_of(settings)[0]
    made = checked_layouts(
        settings,
        new_members(settings, model),
        model,
        8,
        family=family_of(settings, model, None, {}),
        alone=False,
    )
    small = made.layouts[0]
    assert small.micro_sequences == stages[0]["layout"].get(
        "micro_sequences", small.micro_sequences
    )
    assert made.runs_here(0)
    assert main(asked) == 0
    assert "quarter in a layout of its own" in capsys.readouterr().out


SHARED = "family: {kind: nested, options: {members: {half: {d_ffn: 0.5}}, draws: %d%s}}\n"
SLICED = """family:
  kind: progressive
  options:
    stages:
    - {name: small, depth: 0.5, steps: 200}
    - {operator: stack, nested: {members: {half: {d_ffn: 0.5}}, draws: 4}}
"""


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        (SHARED % (64, ""), {64}),
        (SHARED % (16, ", by_replica: true"), {64}),
        (SLICED, {64}),
        ("", {64, 24}),
    ],
    ids=["a sequence each", "replicas apart", "a nested stage", "a ramp"],
)
def test_ranked_layouts_are_those_that_the_shares_of_every_step_fit(
    files: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    batch: set[int],
) -> None:
    path, cluster = tmp_path / "shared.yaml", tmp_path / "small.yaml"
    ramp = ", ramp: [{step: 9, sequences: 24}]" if 24 in batch else ""
    path.write_text(RUN.replace("{sequences: 64}", f"{{sequences: 64{ramp}}}") + family)
    cluster.write_text(CLUSTER.split("  - {name: attic")[0])
    assert main(["plan", str(path), "--cluster", str(cluster), "--json", *UNDIVIDED[:2]]) == 0
    ranked = json.loads(capsys.readouterr().out)["layouts"]
    assert ranked
    for one in ranked:
        asked = [f"layout.{key}={value}" for key, value in one["settings"].items()]
        settings = run_yaml.load(path, asked, world=lambda s: s.layout_for(4).world_size)
        layout = settings.layout_for(settings.layout.processes)
        assert rules.problems(layout, MODEL, 2048, sorted(batch), layout.world_size) == []
        if family:
            draws_of(new_family(settings, MODEL), settings, layout)


def test_shares_that_no_layout_fits_are_one_error(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(RUN + SHARED % (6, ""))
    assert main(["plan", str(path), "--cluster", files[1]]) == 2
    told = capsys.readouterr().err
    assert "family.kind: 6 shares of a step of 64 sequences are not equal" in told
    assert "shares that would fit: 1, 2, 4, or another batch" in told
    path.write_text(RUN + SHARED % (32, ""))
    assert main(["plan", str(path), "--cluster", files[1], "layout.micro_sequences=4"]) == 2
    told = capsys.readouterr().err
    assert "4 sequences do not divide 2: so many has each share of a step of the family" in told


def test_a_family_that_cannot_be_is_refused_by_a_plan(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(RUN + FAMILY)
    words = ["plan", str(path), "--cluster", files[1]]
    assert main([*words, "family.options.members=[90b]"]) == 2
    assert "90b: no slice of" in capsys.readouterr().err
    cut = [*UNDIVIDED, "layout.tp=2", "family.options.groups=1"]
    assert main([*words, *cut]) == 2
    why = "no layout can train the family: layout.tp=2 cuts a group of member 'short'"
    assert why in capsys.readouterr().err


def test_what_is_written_leaves_room_in_memory_unless_picked() -> None:
    def fills(*shares: float) -> list[Any]:
        return [
            SimpleNamespace(prediction=SimpleNamespace(memory_gib=80.0 * share, capacity_gib=80.0))
            for share in shares
        ]

    assert roomy(fills(0.5, 0.4)) == 1
    assert roomy(fills(0.99, 0.95, 0.9, 0.1)) == 3
    assert roomy(fills(0.99, 0.95)) == 1
