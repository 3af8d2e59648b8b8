"""A family of which stages are nested, from run.yaml to the report: a nested model grows into a
nested one, which is pruned, taught, and grows into another; killed on the way, on two ranks, and
planned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.experiments.analysis.members import effects
from motet.experiments.scoring.store import probe_path, read_probe
from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.models.decoder import Decoder
from motet.models.family.base import members_of
from tests.system.runs import losses, motet, motet_here, replaced, rows, who_trained, write_yaml
from tests.system.test_progressive import KILLS

pytestmark = pytest.mark.xdist_group("nested_stage")  # its runs are made once

FAMILY = """family:
  kind: progressive
  options:
    divergence: 4
    stages:
    - name: small
      model: {n_layers: 1, d_ffn: 64}
      steps: 5
      nested: {members: {thin: {d_ffn: 0.5}}, sampler: sandwich, draws: 2, groups: GROUPS,
               order_at_step: 1, order_sequences: 6, mask_update: true}
    - name: large
      model: {n_layers: 2, d_ffn: 64}
      steps: 5
      operator: identity
      nested: {before: [thin], members: {half: {d_ffn: 0.5}}, sampler: sandwich, draws: 2,
               groups: GROUPS, loss: distill, distill_from_step: 2}
    - {name: lean, model: {n_layers: 2}, steps: 3, operator: prune, distill: {}}
    - operator: stack
      nested: {members: {short: {n_layers: 2, d_ffn: 0.5}}, sampler: sandwich, draws: 2,
               groups: GROUPS, order_at_step: 1, order_sequences: 6, normalize: users}
training:"""
STARTS = {"small": 0, "large": 5, "lean": 10, "whole": 13}
SLICES = {"thin": "small", "thin.large": "large", "half": "large", "short": "whole"}
ENDS = {"small": 5, "large": 10, "lean": 13, "whole": 16}
STEPS, SEQUENCES = 16, 4
TRAINED: dict[str, tuple[str | None, ...]] = {
    "small": ("small", "thin"),
    "large": ("large", "half", "thin.large"),
    "lean": ("lean",),
    "whole": (None, "short"),
}
DIES = '''
import os
import signal
from pathlib import Path

from motet.launcher.rank import growing
from motet.launcher.rank.hooks import Hook

DIED = Path({folder!r})


def die_once(number):
    if not (DIED / str(number)).exists():
        (DIED / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def states(growth, old, real=growing.grown_states):
    for number, one in enumerate(real(growth, old)):
        if number == 5:
            die_once("grows")
        yield one


growing.grown_states = states


class Dies(Hook):
    """Once after channels were put in order and saved, and once while the model grows."""

    def after_step(self, context):
        if context.step == 4:
            die_once("ordered")
'''


def write(folder: Path, corpus: Path, groups: int = 1) -> Path:
    (folder / "died").mkdir()
    (folder / "dies.py").write_text(DIES.format(folder=str(folder / "died")))
    layers = ("n_layers: 2, n_heads: 2", "n_layers: 4, n_heads: 2")
    changed = (
        ("training:", FAMILY.replace("GROUPS", str(groups))),
        layers,
        ("d_ffn: 64, head_dim", "d_ffn: 32, head_dim"),
        ("sequences: 8", "sequences: 4"),
        ("24", "16"),
        ("warmup_steps: 4", "warmup_steps: 1"),
        ("every_steps: 6", "every_steps: 3, async: false"),
        ("micro_sequences: 2", "micro_sequences: 1"),
    )

    def edit(text: str) -> str:
        text = replaced(text, changed)
        kept = ("canaries", "facts", "name: aa")
        return "\n".join(line for line in text.splitlines() if not any(k in line for k in kept))

    return write_yaml(folder, corpus, "r", edit)


def trained(folder: Path, corpus: Path, *asked: str, groups: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    done = motet("train", str(write(folder, corpus, groups)), *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/r"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """The same run on one rank; killed in a nested stage and between two; on two with FSDP2."""
    killed = ["training.hooks=[dies.py:Dies]", "training.max_restarts=2"]
    return {
        kind: trained(tmp_path_factory.mktemp(kind), corpus, *asked)
        for kind, asked in (
            ("one", ["layout.processes=1"]),
            ("killed", ["layout.processes=1", *killed]),
            ("fsdp", []),
        )
    }


def model(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return read_model(RunDir(run), ENDS[stage])[1]


def near(run: Path, other: Path) -> None:
    """Two runs trained alike, to the end of every stage."""
    assert losses(run) == pytest.approx(losses(other), abs=1e-4)
    for stage in ENDS:
        for name, value in model(other, stage).items():
            torch.testing.assert_close(model(run, stage)[name], value, atol=1e-4, rtol=0)


def same(run: Path, other: Path) -> None:
    """Two runs trained alike, to the last bit."""
    assert losses(run) == losses(other)
    for stage in ENDS:
        for name, value in model(other, stage).items():
            assert torch.equal(model(run, stage)[name], value), (stage, name)


def test_kills_in_and_between_nested_stages_change_no_bit_and_two_ranks_train_as_one(
    runs: dict[str, Path],
) -> None:
    died = runs["killed"].parents[1] / "died"
    assert {path.name for path in died.iterdir()} == {"ordered", "grows"}
    same(runs["killed"], runs["one"])
    near(runs["fsdp"], runs["one"])


def test_slices_train_in_their_stages_and_the_audit_draws_them_again(
    runs: dict[str, Path],
) -> None:
    for kind in ("one", "fsdp"):  # the other one trained some steps twice
        found = who_trained(runs[kind])
        assert sorted(found) == list(range(SEQUENCES * STEPS))
        for slot, names in found.items():
            (stage,) = (s for s in ENDS if STARTS[s] <= slot // SEQUENCES < ENDS[s])
            assert sorted(map(str, names)) == sorted(map(str, TRAINED[stage])), slot
    for run in runs.values():
        done = motet_here("experiments", "audit", str(run), "--replay")
        assert done.returncode == 0, done.stdout
        steps = {row["step"]: row for row in rows(run, "step")}
        assert set(steps[2]["losses"]) == {"small", "thin"}
        assert set(steps[7]["losses"]) == {"large", "half", "thin.large"}
        assert steps[12]["member"] == "lean"
        assert set(steps[16]["losses"]) == {"whole", "short"}


def test_channels_are_ordered_in_the_stages_that_ask_and_a_grown_slice_is_what_it_was(
    runs: dict[str, Path],
) -> None:
    for run in runs.values():
        events = list(rows(run, "event"))
        ordered = {row["step"]: row["sequences"] for row in events if row["event"] == "ordered"}
        assert ordered == {1: 8, 14: 8}
        facts = {step: read_checkpoint(RunDir(run), step).get("order") for step in (5, 10, 16)}
        assert [step for step, order in facts.items() if order] == [5, 16]
        grown = {row["step"]: row for row in events if row["event"] == "grown"}
        (joined,) = grown[5]["slices"].items()
        assert joined[0] == "thin.large"
        assert (joined[1]["source"], joined[1]["exact"]) == ("thin", True)
        assert joined[1]["largest"] <= 1e-5
        assert joined[1]["loss_before"] != pytest.approx(grown[5]["loss_before"])


def test_every_member_is_measured_exported_and_reported(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run = runs["killed"]
    for stage, step in ENDS.items():
        for name in (*ENDS, *SLICES):
            there = SLICES.get(name, name) == stage
            scores = read_probe(
                probe_path(RunDir(run).probes, step), None if name == "whole" else name
            )
            assert bool(scores[1]) == there, (step, name)
    output = tmp_path / "hf"
    done = motet_here("export", str(run), "--all", "--output", str(output))
    assert done.returncode == 0, done.stderr
    members = {one.name: one for one in members_of(json.loads((run / "manifest.json").read_text()))}
    tokens = torch.arange(40)[None]
    for name in (*ENDS, *SLICES):
        stage = SLICES.get(name, name)
        config, state = read_model(RunDir(run), ENDS[stage])
        decoder = Decoder(config)
        decoder.load_state_dict(state)
        inside = members[name] if name in SLICES else None
        exported = transformers.AutoModelForCausalLM.from_pretrained(output / name)
        with torch.no_grad():
            expected = decoder(tokens, member=inside)
            torch.testing.assert_close(exported(tokens).logits, expected, atol=1e-5, rtol=0)
        card = (output / name / "README.md").read_text()
        assert "small (" in card
        assert ("part of the parent" in card) == (name in SLICES)
        read = SEQUENCES * 320 * (ENDS[stage] - STARTS[stage])
        assert f"| tokens it trained on | {read:,} |" in card
        assert f"| tokens of its lineage | {SEQUENCES * 320 * ENDS[stage]:,} |" in card
    report(run)


def report(run: Path) -> None:
    """What report.json says: losses, effects, the lineage, its cost, and neighbours."""
    in_the_run = [pair for row in rows(run, "event") for pair in row.get("pairs", ())]
    done = motet_here("family", "divergence", str(run), "--sequences", "4", "--json")
    assert done.returncode == 0, done.stderr
    afterwards = json.loads(done.stdout)["pairs"]
    pairs = [(row["before"], row["after"]) for row in afterwards]
    grew = list(zip([*ENDS][:-1], [*ENDS][1:], strict=True))
    inside = [("thin", "small"), ("thin.large", "half"), ("half", "large"), ("short", "whole")]
    assert sorted(pairs) == sorted([*grew, *inside, ("thin", "thin.large")])
    kl = {(row["before"], row["after"]): row["kl"] for row in in_the_run}
    assert kl == {
        (a, b): pytest.approx(r["kl"]) for (a, b), r in zip(pairs, afterwards, strict=True)
    }
    assert motet_here("report", str(run)).returncode == 0
    found = json.loads((run / "report.json").read_text())
    effects_of_members(found)
    family = found["family"]
    assert {row["member"] for row in family["members"]} == {*ENDS, *SLICES}
    assert all(row["loss"] is not None for row in family["members"])
    each = {row["member"]: row["flops_per_token"] for row in family["members"]}
    total = 0.0
    for row in family["lineage"]:
        stage = row["member"]
        assert row["tokens"] == SEQUENCES * 320 * (ENDS[stage] - STARTS[stage])
        own = {one["member"]: one["flops"] for one in row.get("members", ())}
        names = {str(name or "whole") for name in TRAINED[stage]}
        assert set(own) == (names if len(names) > 1 else set())
        if own:
            assert own == pytest.approx({name: row["tokens"] * each[name] for name in own})
        # A model that is taught has its teacher's pass forward beside it.
        taught = each["large"] / 3 if stage == "lean" else 0.0
        total += sum(own.values()) or row["tokens"] * (each[stage] + taught)
        assert row["lineage_flops"] == pytest.approx(total)
    assert family["cost"]["flops"] == pytest.approx(total)
    compared = [(row["before"], row["after"]) for row in family["neighbours"]]
    assert set(compared) == set(pairs)


def effects_of_members(found: dict[str, Any]) -> None:
    """Every member, slices of each nested stage among them, has the effect of both controls, at
    its own end.
    """
    for entry in found["answers"]["controls"].values():
        shown = {member or "whole": outcome for member, outcome in effects(entry)}
        assert set(shown) == {*ENDS, *SLICES}
        assert None not in {outcome["effect"] for outcome in shown.values()}
        # Each was measured as its own stage ended: none has the figures of another.
        assert len({outcome["effect"] for outcome in shown.values()}) == len(shown)


def test_its_price_is_told_before_it_trains(tmp_path: Path, corpus: Path) -> None:
    yaml = write(tmp_path, corpus)
    done = motet_here("family", "show", str(yaml), "--json")
    assert done.returncode == 0, done.stderr
    shown = {row["name"]: row for row in json.loads(done.stdout)["stages"]}
    passes = {
        name: {one["member"]: one["passes"] for one in row.get("members", ())}
        for name, row in shown.items()
    }
    assert passes == {
        "small": {"thin": 1.0, "small": 1.0},
        "large": {"thin.large": 1.0, "half": 1.0, "large": pytest.approx(1.0)},
        "lean": {},
        "whole": {"short": 1.0, "whole": 1.0},
    }
    done = motet_here("plan", str(yaml), "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)["family"]
    assert planned["time_s"] == pytest.approx(sum(row["time_s"] for row in planned["stages"]))
    small, large = planned["stages"][:2]
    assert large["time_s"] > small["time_s"]
    assert [one["member"] for one in large["members"]] == ["thin.large", "half", "large"]
    for asked, why in (
        ("layout.pp=2", "order_at_step"),
        ("layout.engine=accelerate", "layout.engine=accelerate"),
        (
            "family.options.stages.1.nested.members={thin: {layers: [0], d_ffn: 0.25}}",
            "'thin' is the name of a",
        ),
    ):
        refused = motet_here("train", str(yaml), asked, "--dry-run")
        assert refused.returncode == 2
        assert why in refused.stderr
        assert "Traceback" not in refused.stderr


WIDER = ["model.n_kv_heads=2", "model.d_model=64", "model.n_heads=4"]


@pytest.mark.long
def test_killed_at_every_point_between_nested_stages_it_ends_with_the_same_bits(
    runs: dict[str, Path], tmp_path: Path, corpus: Path
) -> None:
    folder, tensors = tmp_path / "dies", (0, 5, 12)
    folder.mkdir()
    yaml = write(folder, corpus)
    text = KILLS.format(folder=str(folder / "died"), tensors=tensors)
    (folder / "dies.py").write_text(text)
    points = 4 + len(tensors)
    asked = ["training.hooks=[dies.py:Dies]", f"training.max_restarts={points}"]
    done = motet("train", str(yaml), "layout.processes=1", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "died").iterdir())) == points
    same(folder / "runs/r", runs["one"])


@pytest.mark.long
def test_tensor_parallel_ranks_and_ranks_of_other_layouts_train_nested_stages_as_one(
    tmp_path: Path, corpus: Path
) -> None:
    one = trained(tmp_path / "one", corpus, "layout.processes=1", *WIDER, groups=2)
    near(trained(tmp_path / "tp", corpus, "layout.tp=2", *WIDER, groups=2), one)
    stages = "family.options.stages"
    asked = [f"{stages}.0.layout={{processes: 1}}", f"{stages}.1.layout={{dp_replicate: 2}}"]
    near(
        trained(
            tmp_path / "other", corpus, "layout.tp=2", "layout.dp_shard=1", *asked, *WIDER, groups=2
        ),
        one,
    )


@pytest.mark.long
def test_a_pipeline_trains_nested_stages_as_one(tmp_path: Path, corpus: Path) -> None:
    """Each member takes as many layers of one stage as of the other."""
    nested: dict[str, Any] = {"sampler": "sandwich", "draws": 2, "mask_update": True}
    first = nested | {"members": {"thin": {"d_ffn": 0.5}}}
    small = {"name": "small", "model": {"n_layers": 2}, "steps": 8, "nested": first}
    # Layers 0 and 2 of 4 are those of the model before: one of each stage.
    joined = nested | {"before": "all", "members": {"half": {"d_ffn": 0.5}}}
    joined |= {"loss": "distill", "distill_from_step": 2}
    last = {"operator": "interpolate", "nested": joined}
    asked = f"family.options.stages={json.dumps([small, last])}"
    one = trained(tmp_path / "one", corpus, "layout.processes=1", asked)
    piped = trained(tmp_path / "pipeline", corpus, "layout.pp=2", asked)
    assert losses(piped) == pytest.approx(losses(one), abs=1e-4)
    for step in (8, STEPS):
        plain = read_model(RunDir(one), step)[1]
        for name, value in read_model(RunDir(piped), step)[1].items():
            torch.testing.assert_close(value, plain[name], atol=1e-4, rtol=0)
    for run in (one, piped):
        (grown,) = (row for row in rows(run, "event") if row["event"] == "grown")
        assert {name: row["exact"] for name, row in grown["slices"].items()} == {
            "thin.whole": True,
            "small.whole": True,
        }
        assert motet_here("experiments", "audit", str(run), "--replay").returncode == 0


@pytest.mark.long
def test_members_of_a_stage_that_grew_are_compiled_before_they_train(
    runs: dict[str, Path], tmp_path: Path, corpus: Path
) -> None:
    asked = ["layout.processes=1", "training.compile=true"]
    run = trained(tmp_path / "compiled", corpus, *asked)
    compiled = {
        row["step"]: row["members"] for row in rows(run, "event") if row["event"] == "compiled"
    }
    assert compiled == {0: 1, 5: 2, 13: 1}
    assert losses(run) == pytest.approx(losses(runs["one"]), abs=1e-4)
