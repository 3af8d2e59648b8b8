from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.core.yaml_text import dump
from motet.launcher.config import run_yaml
from motet.launcher.config.field import setting
from motet.launcher.config.sections import CorpusSettings, RunSettings

GOOD = """\
name: first
data: {sequence_length: 64, corpora: [{path: corpora/x}]}
training: {steps: 1000}
"""


def load(text: str = GOOD, *overrides: str, base: Path = Path("/base")) -> RunSettings:
    return run_yaml.load("run.yaml", overrides, text=text, base=base)


def problems(text: str = GOOD, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_a_setting_comes_from_the_command_line_before_the_file_before_the_default() -> None:
    settings = load(GOOD, "training.steps=500")
    assert (settings.training.steps, settings.data.sequence_length, settings.seed) == (500, 64, 0)


def test_every_problem_is_told_at_once() -> None:
    text = (
        GOOD
        + "trainin: {steps: 3}\nbatch: {sequences: two}\nlayout: {device: gpu, sequence_parallel: maybe}\n"
    )
    told = problems(text, "metrics.wandb=ofline", "model.preset=2m", "name=a b", "probes")
    for piece in (
        "8 problems",
        "trainin: is no setting (did you mean 'training'?) [run.yaml:4]",
        "batch.sequences: two is not a whole number",
        "layout.device: gpu is not one of auto, cpu, cuda",
        "layout.sequence_parallel: maybe is neither true nor false",
        "metrics.wandb: ofline is not one of off, online, offline (did you mean 'offline'?)",
        "model.preset: '2m' is no preset",
        "name: 'a b' cannot name a folder",
        "probes: is no setting; write a.b.c=value",
    ):
        assert piece in told, piece


def test_problems_of_experiments_are_told_with_those_of_other_settings() -> None:
    told = problems(GOOD + "experiments: [{name: c, use: memorisation}]\nseed: -1\n")
    assert "seed: -1 must be at least 0" in told
    assert "did you mean 'memorization'?" in told


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("no", "no"),
        ("012", "012"),
        ("12:30", "12:30"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("3.10", "3.10"),
        ("on", "on"),
    ],
)
def test_a_text_setting_is_its_raw_token(written: str, meant: str) -> None:
    assert load(GOOD + f"metrics: {{group: {written}}}\n").metrics.group == meant
    assert load(GOOD, f"metrics.group={written}").metrics.group == meant
    assert load(GOOD + f"metrics: {{tags: [{written}]}}\n").metrics.tags == (meant,)


def test_a_text_setting_on_the_command_line_may_look_like_yaml() -> None:
    settings = load(GOOD, "metrics.group=a: [b #c", "metrics.project='x'", "metrics.entity=null")
    assert settings.metrics.group == "a: [b #c"
    assert settings.metrics.project == "'x'"
    assert settings.metrics.entity is None


@pytest.mark.parametrize(
    ("written", "value"), [("1_000", 1000), ("1e3", 1000), ("'1000'", 1000), ("+7", 7)]
)
def test_whole_numbers_may_be_written_in_several_ways(written: str, value: int) -> None:
    assert load(GOOD + f"seed: {written}\n").seed == value


@pytest.mark.parametrize("written", ["012", "12:30", "1.5", "0x1f", "true", ".inf", "1e400", "{}"])
def test_what_is_not_plainly_a_whole_number_is_refused(written: str) -> None:
    assert "seed: " in problems(GOOD + f"seed: {written}\n")


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_floats_without_a_point_are_floats(written: str) -> None:
    settings = load(GOOD, f"training.optimizer.lr={written}")
    assert settings.training.optimizer.lr == 1e-4


@pytest.mark.parametrize("written", ["nan", "inf", "1e999", "0", "1"])
def test_a_float_must_be_finite_and_in_bounds(written: str) -> None:
    assert "training.optimizer.lr: " in problems(GOOD, f"training.optimizer.lr={written}")


def test_experiments_keep_yaml_1_2_scalars() -> None:
    text = (
        GOOD
        + 'experiments: [{name: "no", use: memorization, doses: [0, 1e0], hypothesis: 12:30, block_by: [no]}]\n'
    )
    (entry,) = load(text.replace('"no"', "no")).experiments.list
    assert entry["name"] == "no"
    assert entry["hypothesis"] == "12:30"
    assert entry["block_by"] == ["no"]
    assert entry["doses"] == [0, 1.0]


def test_experiments_may_be_a_bare_list_and_are_reached_by_number() -> None:
    text = GOOD + "experiments:\n- {name: c, use: memorization, doses: [0, 1]}\n"
    assert load(text, "experiments.list.0.doses=[0, 2]").experiments.list[0]["doses"] == [0, 2]
    assert load(text, "experiments.controls=false").experiments.controls is False
    assert "is a list of 1" in problems(text, "experiments.list.1.name=x")


def test_experiment_files_become_part_of_the_settings(tmp_path: Path) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "b.yaml").write_text("- {name: b, use: memorization}\n")
    (folder / "a.yaml").write_text("experiments: [{name: a, use: contamination, items: q.jsonl}]\n")
    (folder / "q.jsonl").write_text("{}\n")
    text = GOOD + "experiments: {files: [questions], list: [{name: c, use: knowledge}]}\n"
    found = load(text, base=tmp_path).experiments
    assert [entry["name"] for entry in found.list] == ["c", "a", "b"]
    assert found.list[1]["items"] == str(folder / "q.jsonl")
    assert found.files == ()
    (folder / "c.yaml").write_text("- 3\n")
    assert "c.yaml: is not a list of experiments" in problems(
        text.replace("[questions]", f"[{folder}]")
    )


def test_paths_start_from_the_file_and_typed_paths_from_the_working_directory() -> None:
    settings = load(GOOD, "data.corpora.0.weight=2")
    assert settings.data.corpora == (CorpusSettings("/base/corpora/x", 2.0),)
    assert settings.runs == "/base/runs"
    assert load(GOOD, "runs=here").runs == str(Path.cwd() / "here")


def test_an_interpolation_takes_another_settings_value() -> None:
    settings = load(
        GOOD + "seed: 5\nmetrics: {group: 'seed-${seed}', project: '${name}'}\n",
        "data.seed=${seed}",
    )
    assert (settings.metrics.group, settings.metrics.project, settings.data.seed) == (
        "seed-5",
        "first",
        5,
    )
    assert "Interpolation key 'nope' not found" in problems(GOOD, "seed=${nope}")


PIECES = st.sampled_from(
    ["${", "}", "$", "\\", "oc.env:", "seed", ".", ":", ",", "'", ")", "[", " ", "é"]
)


@given(st.lists(PIECES, min_size=1, max_size=8).map("".join), st.booleans())
def test_a_malformed_interpolation_is_a_problem_of_its_setting_and_no_traceback(
    text: str, within_list: bool
) -> None:
    """`${)` in any setting ended in a traceback."""
    from motet.launcher.config.yaml_tree import Items, Leaf, Map, parse, resolve

    tree = parse("seed: 3\nname: x\nwords: [y]\n", "run.yaml")
    assert isinstance(tree, Map)
    leaf = Leaf("${" + text, True, "run.yaml:2")
    tree["name"] = leaf
    if within_list:
        tree["words"] = Items([leaf])
    _, problems = resolve(tree)
    places = ["name", "words.0"][: 1 + within_list]
    assert [problem.setting for problem in problems] in ([], places)
    assert all("${" in problem.message for problem in problems)
    assert resolve(parse("name: '${)'", "x"))[1][0].setting == "name"  # type: ignore[arg-type]


def test_a_value_of_the_environment_is_used_but_never_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANTED", "hunter2")
    text = GOOD + (
        "metrics:\n  entity: ${oc.env:PLANTED}\n  project: p-${metrics.entity}\n  group: "
        "${oc.${metrics.tags.0}:PLANTED}\n"
        "  tags: [env, '${oc.decode:${oc.env:PLANTED}}']\nruns: ${oc.env:PLANTED}/runs\n"
    )
    settings = load(text)
    assert settings.metrics.entity == "hunter2"
    assert settings.metrics.project == "p-hunter2"
    assert settings.metrics.group == "hunter2"
    assert settings.runs == "/base/hunter2/runs"
    stored = (
        run_yaml.to_yaml(settings)
        + run_yaml.resolved_json(settings)
        + json.dumps(run_yaml.public(settings))
    )
    assert "hunter2" not in stored
    assert "${oc.env:PLANTED}" in stored
    again = run_yaml.load("/elsewhere/resolved.yaml", [], text=run_yaml.to_yaml(settings))
    assert again.metrics == settings.metrics
    assert again.runs == settings.runs


def test_an_error_does_not_show_a_value_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "hunter2")
    told = problems(
        GOOD,
        "metrics.log_every=${oc.env:PLANTED}",
        "layout.device=${oc.env:PLANTED}",
        "metrics.wandb=${oc.decode:'{${oc.env:PLANTED}'}",
    )
    assert "hunter2" not in told
    assert "metrics.log_every: ${oc.env:PLANTED} is not a whole number" in told


@pytest.mark.parametrize(
    "setting", ["name", "seed", "training.z_loss", "model.preset", "batch.sequences"]
)
def test_what_defines_the_run_may_not_come_from_the_environment(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "1")
    assert f"{setting}: ${{oc.env:PLANTED}} comes from the environment" in problems(
        GOOD, f"{setting}=${{oc.env:PLANTED}}"
    )


def test_a_variable_that_is_not_set_is_named() -> None:
    told = problems(GOOD, "metrics.entity=${oc.env:MOTET_SURELY_UNSET}")
    assert "MOTET_SURELY_UNSET is not set in the environment" in told


def test_an_alias_bomb_is_refused_quickly() -> None:
    names = "abcdefgh"
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]")
    start_s = time.perf_counter()
    assert "aliases" in problems("\n".join(lines))
    assert time.perf_counter() - start_s < 5


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("name: [", "run.yaml:"),
        ("name: x\nname: y", "run.yaml:2: 'name' is given twice"),
        ("- a", "is not a mapping of settings"),
        ("a: &x [*x]", "aliases"),
        ("[" * 3000, "nested too deeply"),
        ("name: !!python/object/apply:os.system [x]", "is not allowed"),
        ("? [a]\n: b", "a name must be a plain word"),
        ("name: \x00", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_clear_message(text: str, piece: str) -> None:
    assert piece in problems(text)


def test_an_empty_file_lacks_a_name_a_length_and_a_corpus() -> None:
    told = problems("")
    for piece in ("name: is missing", "training.steps: neither is given", "data.corpora: is empty"):
        assert piece in told


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.yaml does not exist"):
        run_yaml.load(tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    ("overrides", "piece"),
    [
        (["training.tokens=9"], "both are given"),
        (
            ["batch.sequences=30"],
            "30 is not a multiple of 8 (layout.micro_sequences 8 x 1 data-parallel rank); "
            "nearest: 24 and 32",
        ),
        (["layout.processes=3"], "32 is not a multiple of 24"),
        (
            ["batch.ramp=[{step: 5, sequences: 12}]"],
            "batch.ramp.0.sequences: 12 is not a multiple of 8",
        ),
        (["batch.ramp=[{step: 5, sequences: 16}, {step: 5, sequences: 8}]"], "given twice"),
        (["training.schedule.warmup_steps=1000"], "at most 999"),
        (["training.schedule={kind: wsd, warmup_steps: 900}"], "at most 0.1"),
        (["training.optimizer.betas=[0.9]"], "takes two"),
        (["training.optimizer.betas=[0.9, 1]"], "betas.1: 1 must be less than 1"),
        (["data.corpora=[{path: a}, {path: a}]"], "listed twice"),
        (["data.corpora=[{weight: 1}]"], "data.corpora.0.path: is missing"),
        (["data.corpora.0.weight=0"], "must be more than 0"),
        (["data.sequence_length=32768"], "probes.batch_tokens: 16,384 holds no whole sequence"),
        (["model.n_heads=5"], "model."),
        (["model.from_hf=x", "model.d_model=64"], "remove model.d_model"),
        (["training.steps=9e18"], "tokens"),
        (["training.stepz=1"], "training.stepz: is no setting (did you mean 'steps'?)"),
        (["seed=null"], "seed: is empty; it is a whole number"),
        (["batch=7"], "batch: is a section"),
        (["metrics.tags=a"], "metrics.tags: is a list; write [a]"),
        (["data.corpora.x.path=a"], "is a list of 1"),
        (["name.x=3"], "name: is one text, not a mapping"),
    ],
)
def test_settings_that_contradict_each_other_are_explained(
    overrides: list[str], piece: str
) -> None:
    assert piece in problems(GOOD, *overrides)


def test_a_wrong_value_causes_no_second_complaint_about_its_default() -> None:
    assert problems(GOOD, "training.steps=x") == "training.steps: x is not a whole number"
    assert "multiple" not in problems(GOOD, "layout.micro_sequences=x", "batch.sequences=3")


def test_the_resolved_yaml_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "u.jsonl").write_text("{}\n")
    text = GOOD.replace("training: {steps: 1000}\n", "") + (
        "metrics: {group: 'no', tags: ['1e3', '~', 'a: b', \"\\\\${x}\", 'two words', '', "
        "'tab\\tnew']}\n"
        "experiments:\n- {name: c, use: knowledge, schedule: {window: [0.0, 1.0]}, hypothesis: "
        "'1.0', items: u.jsonl}\n"
        "training: {optimizer: {eps: 1e-12}, tokens: 1000000}\nbatch: {ramp: [{step: 3, sequences: "
        "64}]}\n"
    )
    settings = load(text, base=tmp_path)
    again = run_yaml.load("/elsewhere/resolved.yaml", [], text=run_yaml.to_yaml(settings))
    assert run_yaml.public(again) == run_yaml.public(settings)
    assert run_yaml.resolved_json(again) == run_yaml.resolved_json(settings)
    assert settings.metrics.tags[3] == "${x}"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=("Cs",)), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc", min_size=1, max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abcxyz", min_size=1, max_size=5), JSON, max_size=4))
def test_any_experiment_text_survives_yaml(entry: dict[str, object]) -> None:
    from motet.launcher.config.yaml_tree import Map, parse, plain, resolve

    tree = parse(dump({"root": entry}), "x")
    assert isinstance(tree, Map)
    resolve(tree)
    assert plain(tree) == {"root": entry}


def test_loading_settings_imports_no_omegaconf_without_interpolation_and_never_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from motet.launcher.config import run_yaml; "
        f"run_yaml.load(None, [], text={GOOD!r}); "
        "bad = [m for m in ('torch', 'scipy', 'omegaconf', 'rich', 'tokenizers') if m in "
        "sys.modules]; sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_balance_of_imported_experts_may_be_chosen_but_not_their_size() -> None:
    load(GOOD, "model.from_hf=x", "model.balance_loss=0.01")
    assert "remove model.n_experts" in problems(GOOD, "model.from_hf=x", "model.n_experts=4")


def test_the_ranks_of_a_begun_run_are_counted_when_it_starts(tmp_path: Path) -> None:
    own = tmp_path / "attempts" / "1" / "resolved.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(GOOD + "batch: {sequences: 48}\nlayout: {dp_shard: 6}\n")
    with pytest.raises(UserError, match="dp_shard"):
        run_yaml.load(own)
    on_six = run_yaml.load(own, world=lambda settings: 6 * settings.layout.processes)
    (tmp_path / "manifest.json").write_text("{}")
    assert run_yaml.load(own) == on_six


@dataclass(frozen=True)
class NewSection:
    kind: str = setting("whole", "a word")
    tags: tuple[str, ...] = setting((), "words", omit_default=True)
    place: str = setting("here", "a place", omit_default=True)


@dataclass(frozen=True)
class WithNewSettings(RunSettings):
    fresh: NewSection = setting(NewSection, "a new section", omit_default=True)  # noqa: RUF009
    count: int = setting(3, "a number that older runs lack", omit_default=True)


def test_a_new_setting_is_written_only_where_it_is_not_at_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = run_yaml.to_yaml(load())
    monkeypatch.setattr(run_yaml, "RunSettings", WithNewSettings)
    assert run_yaml.to_yaml(load()) == before
    assert run_yaml.to_yaml(load(GOOD, "count=3", "fresh.kind=whole")) == before
    assert run_yaml.public(load(), whole=True)["fresh"] == {
        "kind": "whole",
        "tags": [],
        "place": "here",
    }
    changed = load(GOOD, "count=4", "fresh.kind=nested")
    shown = run_yaml.public(changed)
    assert (shown["count"], shown["fresh"]) == (4, {"kind": "nested"})
    again = run_yaml.load("/elsewhere/resolved.yaml", [], text=run_yaml.to_yaml(changed))
    assert run_yaml.public(again) == shown


def test_a_new_setting_from_the_environment_stays_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_yaml, "RunSettings", WithNewSettings)
    monkeypatch.setattr(run_yaml, "_ENVIRONMENT_ALLOWED", ("fresh.place",))
    monkeypatch.setenv("PLACE", "here")
    settings = load(GOOD + "fresh: {place: '${oc.env:PLACE}'}\n")
    assert run_yaml.public(settings)["fresh"] == {"kind": "whole", "place": "${oc.env:PLACE}"}


def test_a_default_that_is_not_written_can_still_be_referred_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_yaml, "RunSettings", WithNewSettings)
    assert load(GOOD, "seed=${count}").seed == 3
