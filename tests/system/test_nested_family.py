"""A nested family from run.yaml to the report: interrupted, gone on with on other ranks, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.core.errors import UserError
from motet.experiments.corpora.inspection import load_tokenizer
from motet.launcher.commands.export import read_model
from motet.launcher.config import run_yaml
from motet.launcher.measure.draft_rate import unread_text
from motet.launcher.measure.harness import evaluate_inside
from motet.launcher.runs.manifest import open_corpora, open_stream
from motet.launcher.runs.metrics import read_metrics
from motet.launcher.runs.rundir import RunDir
from motet.models.decoder import Decoder
from motet.models.family.base import members_of
from motet.models.family.pick import slice_by_spec
from motet.models.member import Member
from tests.system.runs import motet, motet_here, who_trained, write_yaml

pytestmark = pytest.mark.xdist_group("nested_family")  # its runs are made once

FAMILY = """family:
  kind: nested
  options:
    members: {small: {d_model: 0.5, d_ffn: 0.5, n_layers: 1}, thin: {d_ffn: 0.5}}
    groups: 1
    sampler: sandwich
    loss: distill
    distill_from_step: 6
    draws: 2
    teacher: ema
    ema_momentum: [0.5, 0.9]
    ema_steps: 24
    order_at_step: 4
    order_sequences: 12
    mask_update: true
    normalize: users
training:"""
STOP = (
    "from motet.launcher.rank.hooks import Hook\n\n\nclass StopsAt9(Hook):\n"
    "    def after_step(self, context):\n"
    "        if context.step == 9:\n            context.ask_to_stop('enough')\n"
)
STEPS = 24


def write(folder: Path, corpus: Path) -> Path:
    (folder / "stop.py").write_text(STOP)
    return write_yaml(folder, corpus, "r", lambda text: text.replace("training:", FAMILY, 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """The same run: undisturbed; stopped and resumed; stopped and resumed on one rank of two."""
    found = {}
    for kind, overrides in (("plain", None), ("resumed", ()), ("fewer", ("layout.processes=1",))):
        folder = tmp_path_factory.mktemp(kind)
        yaml, hooks = write(folder, corpus), "[]" if overrides is None else "[stop.py:StopsAt9]"
        steps = f"training.steps={STEPS}"
        done = motet("train", str(yaml), steps, f"training.hooks={hooks}")
        assert done.returncode == 0, done.stderr
        run = folder / "runs/r"
        if overrides is not None:
            assert "stopped" in done.stdout
            done = motet("resume", str(run), "training.hooks=[]", *overrides)
            assert done.returncode == 0, done.stderr
        found[kind] = run
    return found


def test_a_stop_changes_nothing_and_other_ranks_keep_who_trains_on_what(
    runs: dict[str, Path],
) -> None:
    for source in ("model", "teacher"):
        found = {kind: read_model(RunDir(run), STEPS, source)[1] for kind, run in runs.items()}
        for name, value in found["plain"].items():
            assert torch.equal(value, found["resumed"][name]), name
            torch.testing.assert_close(value, found["fewer"][name], atol=1e-4, rtol=0)
    plain = who_trained(runs["plain"])
    assert plain == who_trained(runs["resumed"]) == who_trained(runs["fewer"])
    assert set(plain) == set(range(8 * STEPS))
    assert set(plain.values()) == {(None, "thin", "small")}
    for run in runs.values():
        assert motet("experiments", "audit", str(run)).returncode == 0


def test_channels_are_put_in_order_once_and_checkpoints_say_how(runs: dict[str, Path]) -> None:
    for run in runs.values():
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        told = [row for row in rows if row.get("event") == "ordered"]
        assert [(row["step"], row["sequences"]) for row in told] == [(4, 16)]
        order = json.loads((RunDir(run).checkpoint(STEPS) / "manifest.json").read_text())["order"]
        assert order["step"] == 4
        assert all(
            sorted(places) == list(range(len(places))) for places in order["orders"].values()
        )


def test_steps_cost_what_their_passes_cost(runs: dict[str, Path]) -> None:
    manifest = json.loads((runs["plain"] / "manifest.json").read_text())
    names = {member["name"]: member for member in manifest["members"]}
    assert names["small"]["parameters"] < names["thin"]["parameters"] < manifest["parameters"]
    rows = [json.loads(line) for line in (runs["plain"] / "metrics.jsonl").open()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(set(row["losses"]) == {"whole", "thin", "small"} for row in steps)
    assert all(len(row["draw"]) == 16 for row in steps)


def equal_in_transformers(run: Path, folder: Path, member: Member | None) -> Any:
    """Return the exported model, after its logits were found to be those of the member."""
    transformers = pytest.importorskip("transformers")
    config, state = read_model(RunDir(run), STEPS)
    whole = Decoder(config)
    whole.load_state_dict(state)
    tokens = torch.arange(40)[None]
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = whole(tokens, member=member)
        torch.testing.assert_close(exported(tokens).logits, expected, atol=1e-5, rtol=0)
        assert exported.generate(tokens, max_new_tokens=3, min_new_tokens=3).shape == (1, 43)
    return exported


def test_all_members_are_exported_at_once_as_the_models_that_they_are(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run, output = runs["resumed"], tmp_path / "hf"
    done = motet_here("export", str(run), "--all", "--output", str(output))
    assert done.returncode == 0, done.stderr
    members = members_of(json.loads((run / "manifest.json").read_text()))
    assert sorted(path.name for path in output.iterdir()) == ["small", "thin", "whole"]
    for member in (*members, None):
        folder = output / ("whole" if member is None else member.name)
        assert f"wrote {folder}: " in done.stdout
        exported = equal_in_transformers(run, folder, member)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
        assert exported.generation_config.eos_token_id == 0
        assert exported.generation_config.pad_token_id == 0
        assert exported.config.pad_token_id is None  # else its embedding would not train on
        assert exported.config.max_position_embeddings == 320
        # Sandwich: everyone trains on every token, before the stop and after it.
        card = (folder / "README.md").read_text()
        assert f"| tokens it trained on | {8 * STEPS * 320:,} |" in card
        assert "| seed | 3 |" in card
    again = motet_here("export", str(run), "--all", "--output", str(output))
    assert again.returncode == 2
    assert "holds files already" in again.stderr


@pytest.mark.parametrize(
    ("asked", "kept", "said"),
    [
        (["--params", "3.1k"], "small", "Member small: 3,120 parameters outside"),
        (["--params", "9k"], "untrained", "-2.9% of 9k"),
        (["--spec", "{d_ffn: [32, 64]}"], "mixed", "no step trained as such"),
        (["--spec", "{d_ffn: 32}"], "thin", "Member thin"),
    ],
)
def test_any_slice_is_exported_by_size_or_by_what_it_keeps(
    runs: dict[str, Path], tmp_path: Path, asked: list[str], kept: str, said: str
) -> None:
    run, folder = runs["plain"], tmp_path / "hf"
    done = motet_here("export", str(run), *asked, "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    card = (folder / "README.md").read_text()
    spec = json.loads(card.split("| part of the parent | `")[1].split("`")[0])
    config, _ = read_model(RunDir(run), STEPS)
    equal_in_transformers(run, folder, slice_by_spec(config, "again", spec, 1))
    assert (f"| {8 * STEPS * 320:,} |" in card) == (kept in ("small", "thin"))
    assert ("| 0: no step trained it as such |" in card) == (kept in ("untrained", "mixed"))
    assert ("zeros fill each layer" in card) == (kept == "mixed")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--params", "90m"], "--params: 90m: no slice is near; the nearest have"),
        (["--params", "many"], "--params: 'many' is no size; write 125m, 1.3b or 300k"),
        (["--spec", "{d_ff: 32}"], "--spec.d_ff: is no setting (did you mean 'd_ffn'?)"),
        (["--spec", "{d_ffn: [32]}"], "--spec.d_ffn: has 1 widths for 2 layers"),
        (["--spec", "{d_model: 99}"], "--spec.d_model: 99 is not a number from 1 to the whole"),
        (["--spec", "{d_model: 15}"], "d_model=15 is not a multiple of n_heads=2"),
        (["--spec", "[1"], "--spec: '[1' is not like"),
        (["--member", "big"], "--member big: is no member of this run's family; there are"),
        (["--member", "thin", "--all"], "not allowed with argument"),
        (["--step", "7"], "--step 7 has no checkpoint"),
    ],
)
def test_a_model_that_is_not_there_is_one_error_before_anything_is_read(
    runs: dict[str, Path], tmp_path: Path, asked: list[str], said: str
) -> None:
    done = motet_here("export", str(runs["plain"]), *asked, "--output", str(tmp_path / "hf"))
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "hf").exists()


def test_members_draft_for_larger_ones_at_a_rate_that_is_told(runs: dict[str, Path]) -> None:
    run = runs["plain"]
    asked = ["family", "draft", str(run), "--sequences", "3", "--json"]
    done = motet_here(*asked)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["target"], facts["tokens"]) == ("whole", 3 * 319)
    config, state = read_model(RunDir(run), STEPS)
    whole = Decoder(config)
    whole.load_state_dict(state)
    members = {m.name: m for m in members_of(json.loads((run / "manifest.json").read_text()))}
    settings = run_yaml.load(run / "resolved.yaml")
    texts = list(unread_text(settings, STEPS, 3))
    tokens = torch.from_numpy(np.stack([one.tokens for one in texts]))
    with torch.no_grad():
        p = whole(tokens)[:, :-1].softmax(-1)
        for row in facts["drafts"]:
            q = whole(tokens, member=members[row["member"]])[:, :-1].softmax(-1)
            rate = torch.minimum(p, q).sum(-1).mean().item()
            agrees = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
            assert row["acceptance"] == pytest.approx(rate, abs=1e-5)
            assert row["greedy_agreement"] == pytest.approx(agrees, abs=1e-5)
            assert 0 < row["cost"] < 1
    assert [row["member"] for row in facts["drafts"]] == ["small", "thin"]
    told = motet_here(*asked[:-1], "--target", "thin", "--ahead", "4")
    assert "Drafts for thin at step 24" in told.stdout


def test_drafts_are_measured_on_text_that_the_run_never_read(runs: dict[str, Path]) -> None:
    settings = run_yaml.load(runs["plain"] / "resolved.yaml")
    read = open_stream(settings).base_tokens(np.arange(8 * STEPS, dtype=np.int64))
    seen = {row.tobytes() for row in read.astype(np.int64)}
    found = {one.tokens.tobytes() for one in unread_text(settings, STEPS, 9)}
    assert len(found) == 9
    assert not seen & found
    with pytest.raises(UserError, match=r"read its corpora to the end(.|\n)*--text FILE"):
        next(unread_text(settings, 10**7, 9))


def test_a_smaller_member_assists_generation_in_transformers(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """An exported pair decodes as the target alone does."""
    transformers = pytest.importorskip("transformers")
    done = motet_here("export", str(runs["plain"]), "--all", "--output", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    load = transformers.AutoModelForCausalLM.from_pretrained
    target, draft = load(tmp_path / "hf" / "whole"), load(tmp_path / "hf" / "small")
    tokens, extra = torch.arange(9)[None], {"max_new_tokens": 8, "do_sample": False}
    alone = target.generate(tokens, **extra)
    assert torch.equal(target.generate(tokens, assistant_model=draft, **extra), alone)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--target", "small"], "--target small: no member is smaller"),
        (["--target", "big"], "--target big: is no member of this run's family; there are"),
        (["--target", "thin", "--member", "thin"], "--member thin: is not smaller than thin"),
        (["--sequences", "0"], "--sequences: 0 is not at least 1"),
        (["--text", "none.txt"], "--text: none.txt cannot be read as UTF-8"),
    ],
)
def test_a_draft_that_cannot_be_is_one_error(
    runs: dict[str, Path], asked: list[str], said: str
) -> None:
    done = motet_here("family", "draft", str(runs["plain"]), *asked)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr


HARNESS = """
import json, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(given["--model_args"].split("=")[1].split(",")[0])
layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
output = Path(given["--output_path"])
output.mkdir(parents=True)
found = {given["--tasks"]: {"acc,none": layers / 4, "acc_stderr,none": 0.1, "alias": "x"}}
(output / "results_now.json").write_text(json.dumps({"results": found}))
print("a table of the harness")
"""


def test_every_member_is_evaluated_and_told_in_one_table(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a harness that writes its results where and as lm-evaluation-harness does."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text(HARNESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    run = runs["fewer"]
    asked = ["eval", str(run), "--tasks", "toy", "--members", "all", "--json"]
    done = motet(*asked)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["models"]
    scores = {row["member"]: row["tasks"]["toy"]["acc,none"] for row in found}
    assert scores == {"small": 0.25, "thin": 0.5, "whole": 0.5}
    assert (run / "members" / f"step-{STEPS:08d}@small" / "README.md").exists()
    # What was measured stands in the card of an export that comes later.
    again = motet_here(
        "export",
        str(run),
        "--member",
        "small",
        "--output",
        str(tmp_path / f"step-{STEPS:08d}@small"),
    )
    assert again.returncode == 0, again.stderr
    card = (tmp_path / f"step-{STEPS:08d}@small" / "README.md").read_text()
    assert "| toy | acc,none | 0.2500 |" in card


@pytest.mark.long
def test_scores_inside_are_those_of_the_exported_folder_in_the_harness(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    questions = [
        {
            "question": "the model trains",
            "choices": [" one", " each member", " a file"],
            "answer": n % 3,
        }
        for n in range(9)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/own.jsonl}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    run, output = runs["plain"], tmp_path / "hf"
    assert motet_here("export", str(run), "--all", "--output", str(output)).returncode == 0
    config, state = read_model(RunDir(run), STEPS)
    decoder = Decoder(config)
    decoder.load_state_dict(state)
    corpus = open_corpora(run_yaml.load(run / "resolved.yaml"))[0]
    tokenizer = load_tokenizer(corpus)
    assert tokenizer is not None
    members = {m.name: m for m in members_of(json.loads((run / "manifest.json").read_text()))}
    for folder in sorted(output.iterdir()):
        inside = evaluate_inside(
            decoder, members.get(folder.name), tokenizer, ["own"], 320, None, tmp_path
        )
        outside = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder},dtype=float32",
            tasks=["own"],
            task_manager=TaskManager(include_path=str(tmp_path)),
            bootstrap_iters=0,
            device="cpu",
        )
        both = inside["results"]["own"], outside["results"]["own"]
        assert both[0]["acc,none"] == both[1]["acc,none"]
        for mine, theirs in zip(inside["samples"]["own"], outside["samples"]["own"], strict=True):
            for (one, _), (other, _) in zip(
                (r[0] for r in mine["resps"]), (r[0] for r in theirs["resps"]), strict=True
            ):
                assert float(one) == pytest.approx(float(other), abs=1e-3)


def evaluations(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "evaluation"]


def test_members_take_turns_on_held_out_text_also_when_the_run_was_interrupted(
    runs: dict[str, Path],
) -> None:
    found = {kind: evaluations(run) for kind, run in runs.items()}
    turns = [next(iter(row["losses"])) for row in found["plain"][:-1]]
    assert turns == [("whole", "small", "thin")[n % 3] for n in range(STEPS - 1)]
    last = found["plain"][-1]
    assert set(last["losses"]) == set(last["latency_ms"]) == {"whole", "thin", "small"}
    assert last["unseen"]
    for kind in ("resumed", "fewer"):
        for row, other in zip(found["plain"], found[kind], strict=True):
            assert row["losses"].keys() == other["losses"].keys()
            for name, loss in row["losses"].items():
                assert abs(loss - other["losses"][name]) < 1e-2


def test_the_report_and_family_show_tell_of_every_member(runs: dict[str, Path]) -> None:
    run = runs["plain"]
    assert motet("report", str(run)).returncode == 0
    page = (run / "report.html").read_text()
    family = json.loads((run / "report.json").read_text())["family"]
    tokens = {row["member"]: row["tokens"] for row in family["members"]}
    length = json.loads((run / "manifest.json").read_text())["sequence_length"]
    assert set(tokens.values()) == {8 * STEPS * length}, "all members train on every sequence"
    # All of them on every sequence, as alone, and the teacher that they follow from step 6 on.
    cost = family["cost"]
    assert cost["separate_flops"] < cost["flops"] < 4 / 3 * cost["separate_flops"]
    assert sum(cost["by_member"].values()) == pytest.approx(cost["flops"])
    assert 'id="family"' in page
    assert "small" in page
    assert "thin" in page
    shown = motet("family", "show", str(run.parent.parent / "r.yaml"), "--json")
    facts = json.loads(shown.stdout)
    assert [member["name"] for member in facts["members"]] == ["small", "thin", "whole"]
    shares = [member["share_of_passes"] for member in facts["members"]]
    np.testing.assert_allclose(shares, 1 / 3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["family.options.draws=3"],
            "3 shares of a step of 8 sequences are no whole micro-batches",
        ),
        (["layout.tp=2", "model.n_kv_heads=2"], "layout.tp=2 cuts a group of member 'small'"),
        (["layout.pp=2"], "layout.pp=2"),
        (
            ["layout.engine=accelerate", "family.options.mask_update=true"],
            "layout.engine=accelerate: family.options.mask_update updates parts of weights",
        ),
        (["family.options.members=[9b]"], "9b: no slice of"),
        (["family.options.distill_from_step=999"], "distill_from_step=999: the run has"),
    ],
)
def test_a_family_that_cannot_train_is_refused_before_anything_starts(
    tmp_path: Path, corpus: Path, overrides: list[str], said: str
) -> None:
    yaml = write(tmp_path, corpus)
    for command in (["train", str(yaml)], ["family", "show", str(yaml)]):
        done = motet(*command, *overrides)
        assert done.returncode == 2, done.stdout + done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()
