from __future__ import annotations

import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motet.core.errors import Problem, UserError
from motet.core.files import atomic_write, write_json
from motet.experiments.corpora.corpus import Corpus
from motet.launcher import cli
from motet.launcher.commands import report
from motet.launcher.config import run_yaml
from motet.launcher.runs.rundir import RunDir
from motet.models.config import preset
from tests.launcher.conftest import Main

GOLDEN = Path(__file__).parents[2] / "golden"
RUN_YAML = """\
name: first
data: {sequence_length: 128, corpora: [{path: corpora/x}]}
batch: {sequences: 8}
layout: {micro_sequences: 2}
training: {steps: 200, schedule: {warmup_steps: 2}}
experiments: [{name: canaries, use: memorization, generate: {count: 16, seed: 1}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run.yaml and the corpus it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    (tmp_path / "texts").mkdir()
    for i in range(12):
        text = "".join(f"Sentence {j} of text {i} says {i * j}.\n" for j in range(120))
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    code = cli.main(
        [
            "data",
            "prepare",
            "texts",
            "--output",
            "corpora/x",
            "--vocabulary-size",
            "300",
            "--quiet",
            "--processes",
            "1",
        ]
    )
    assert code == 0
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Calls of `train`, which here leaves only what a begun run has."""
    from motet.launcher.commands import going_on
    from motet.launcher.launch import local

    calls: list[SimpleNamespace] = []

    def train(
        settings: Any, rundir: RunDir, *, yaml_text: str, resume: bool, recorded: Any = ()
    ) -> int:
        rundir.create()
        hashes = dict.fromkeys(("definition_sha256", "plan_sha256"), "0" * 64)
        write_json(rundir.manifest, {"model": vars(preset("1m", 320)), **hashes})
        atomic_write(rundir.run_yaml, yaml_text)
        atomic_write(rundir.resolved_yaml, run_yaml.to_yaml(settings))
        calls.append(
            SimpleNamespace(settings=settings, rundir=rundir, text=yaml_text, resume=resume)
        )
        return 0

    monkeypatch.setattr(local, "train", train)
    monkeypatch.setattr(going_on, "sound", lambda run: None)  # nothing was frozen here
    return calls


def test_help_is_instant_and_lists_every_command() -> None:
    command = [sys.executable, "-m", "motet.launcher.cli", "--help"]
    seconds = []
    for _ in range(5):
        start_s = _children_s()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(_children_s() - start_s)
    for words, (_, help_text) in cli.COMMANDS.items():
        if " " not in words:
            assert re.search(rf"\n    {words}\s+{re.escape(help_text[:30])}", done.stdout)
    assert min(seconds) < 0.3, statistics.median(seconds)


def _children_s() -> float:
    """Processor seconds of the processes that this one waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_only_the_asked_command_is_imported() -> None:
    code = (
        "import sys, contextlib\nfrom motet.launcher import cli\n"
        "with contextlib.suppress(SystemExit):\n    cli.main(sys.argv[1:])\n"
        "print(*(n for n in sys.modules if n.startswith('motet.launcher.commands.')))"
    )

    def imported(*words: str) -> set[str]:
        command = [sys.executable, "-c", code, *words, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()[-1].split()
        return {name.removeprefix("motet.launcher.commands.") for name in names}

    shared = {"common", "options"}
    assert imported() == imported("data") == {"options"}
    assert imported("init") - shared == {"init"}
    assert imported("data", "prepare") - shared == {"data", "data.prepare"}


VERBS = ["start", "stop", "status", "env", "rate", "cut", "crash", "mend", "restart-controller"]
WORDS = [words.split() for words, (module, _) in cli.COMMANDS.items() if module]
WORDS += [["slurm", "testbed", verb] for verb in VERBS]


@pytest.mark.parametrize("command", WORDS, ids=" ".join)
def test_every_command_has_help(command: list[str], main: Main) -> None:
    code, out, _ = main(*command, "--help")
    assert code == 0
    assert "usage: motet " + " ".join(command) in out
    acting = {"demo", "init", "prepare", "index", "train", "resume", "report", "eval", "export"}
    acting |= {"submit", "cancel", "start", "stop", "rate", "cut", "crash", "mend"}
    acting |= {"restart-controller", "probe", "plan", "sample", "new", "freeze", "import"}
    assert ("--dry-run" in out) == (command[-1] in acting)


def test_every_command_is_a_file_with_its_arguments_and_what_it_does() -> None:
    """The table lists every file that has arguments, and each of those says what it does."""
    folder = Path(cli.__file__).parent / "commands"
    files = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if re.search(r"^def run\(arguments", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    modules = {module for module, _ in cli.COMMANDS.values() if module}
    assert files == modules
    for name in modules:
        module = importlib.import_module(f"motet.launcher.commands.{name}")
        assert callable(module.run)
        assert callable(module.arguments)


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["trian"], "'trian' is no command (did you mean 'train'?); there are demo, init"),
        (["experiments", "chek"], "(did you mean 'check'?)"),
        (["train", "run.yaml", "--steps", "3"], "unknown argument: --steps 3"),
        (["report", "x", "y"], "unknown argument: y"),
        (["train"], "RUN.yaml"),
        (["train", "nope.yaml"], "nope.yaml does not exist"),
        (["train", "training.steps=3"], "the run.yaml comes first"),
        (["resume", "nope"], "nope does not exist"),
        (["report", "."], "is not the folder of a run"),
        (["experiments", "audit", "."], "is not the folder of a run"),
        (["data", "prepare", "nope", "--output", "x"], "nope: does not exist"),
        (["data", "inspect", "nope"], "nope does not exist"),
        (["data", "index", "a.npy", "b.bin", "--output", "x"], "several kinds"),
        (["demo", "--steps", "0"], "--steps 0 must be at least 1"),
        (["init", "a b"], "cannot name a folder"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_2(
    arguments: list[str], piece: str, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = main(*arguments)
    assert code == 2
    assert out == ""
    assert piece in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "piece"),
    [
        (UserError("seed: bad"), 2, "motet: seed: bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 2, "motet: /x: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, piece: str, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(report, "run", fail)
    got, _, err = main("report", "x")
    assert (got, piece in err) == (code, True)


def test_a_mistake_of_ours_keeps_its_traceback(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise ValueError("ours")

    monkeypatch.setattr(report, "run", fail)
    with pytest.raises(ValueError, match="ours"):
        main("report", "x")


def test_a_model_that_cannot_be_is_the_users_mistake(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.models.config import preset

    monkeypatch.setattr(report, "run", lambda _: preset("2m", 64))
    code, _, err = main("report", "x")
    assert code == 2
    assert "model.preset='2m'" in err


def test_files_are_as_open_as_the_shell_says(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("init", "mine")[0] == 0
    assert (tmp_path / "mine" / "run.yaml").stat().st_mode & 0o777 == 0o644


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = (
        f"{sys.executable} -m motet.launcher.cli experiments list --json | head -c 1; exit "
        f"${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_settings_may_stand_around_options(main: Main, folder: Path) -> None:
    code, out, _ = main("train", "run.yaml", "seed=3", "--dry-run", "data.verify=false")
    assert code == 0
    assert "seed: 3" in out
    assert "verify: false" in out


def test_a_dry_run_prints_settings_command_and_plan_and_touches_nothing(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = main("train", "run.yaml", "layout.processes=2", "--dry-run")
    assert (code, err) == (0, "")
    assert "--local-addr 127.0.0.1 --nproc-per-node 2" in out
    assert "200 steps = 204,800 tokens (1,024 per step)" in out
    assert "canaries" in out
    assert "% of the run)" in out
    settings = run_yaml.load(None, [], text=out)
    assert settings.layout.processes == 2
    assert (sorted(folder.rglob("*")), trained) == (before, [])


def test_a_dry_run_tells_what_stands_in_the_way(main: Main, folder: Path) -> None:
    code, _, err = main("train", "run.yaml", "data.corpora.0.path=nope", "--dry-run")
    assert code == 2
    assert "nope" in err


def test_a_dry_run_checks_the_layout_against_the_vocabulary_of_the_corpus(
    main: Main, folder: Path
) -> None:
    sizes = ["model.n_heads=7", "model.n_kv_heads=7", "model.d_model=112", "model.d_ffn=448"]
    layout = ["layout.processes=7", "layout.tp=7", "data.sequence_length=126"]
    code, out, err = main("train", "run.yaml", *sizes, *layout, "--dry-run")
    assert code == 2
    assert "# layout       tp 7, native" in out
    assert err == "motet: layout.tp: 7 does not divide model.vocabulary_size=320; nearest: 1\n"


def test_a_run_goes_on_in_any_layout_that_fits_its_model(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    main("train", "run.yaml")
    assert main("resume", "runs/first", "layout.processes=2", "layout.tp=2")[0] == 0
    assert trained[-1].settings.layout_for(2).tp == 2
    code, _, err = main("resume", "runs/first", "layout.processes=4", "layout.tp=4")
    assert code == 2
    assert "layout.tp: 4 does not divide model.n_heads=2" in err


def test_training_gets_the_checked_settings_and_the_text_as_written(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    assert main("train", "run.yaml", "training.steps=260")[0] == 0
    (call,) = trained
    assert call.settings.training.steps == 260
    assert call.rundir.root == folder / "runs" / "first"
    assert call.text.startswith(RUN_YAML.rstrip())
    assert "#   training.steps=260" in call.text
    assert call.resume is False


def test_a_run_is_never_trained_over(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    assert main("train", "run.yaml")[0] == 0
    code, _, err = main("train", "run.yaml")
    assert code == 2
    assert "with these settings; `motet resume runs/first`" in err
    code, _, err = main("train", "run.yaml", "seed=1", "training.optimizer.lr=0.001")
    assert code == 2
    assert "with other settings; choose another name" in err
    assert "seed: 0 there, 1 here" in err
    assert main("train", "run.yaml", "seed=1", "name=second")[0] == 0
    (folder / "runs" / "third").mkdir()
    (folder / "runs" / "third" / "notes").write_text("mine")
    assert "exists and is no run" in main("train", "run.yaml", "name=third")[2]
    assert len(trained) == 2


def test_a_run_goes_on_with_other_processes_or_for_longer_but_not_as_another(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    main("train", "run.yaml")
    assert main("resume", "runs/first", "layout.processes=2", "training.steps=280")[0] == 0
    assert trained[-1].resume is True
    assert trained[-1].settings.layout.processes == 2
    assert trained[-1].settings.steps == 280
    assert main("resume", "runs/first", "training.tokens=400000")[0] == 0
    assert trained[-1].settings.training.steps is None
    code, _, err = main("resume", "runs/first", "seed=1", "training.optimizer.lr=0.1")
    assert code == 2
    assert "seed: is 0 in this run and cannot become 1 when it goes on" in err
    assert "training.optimizer.lr" in err
    assert "a run can only be extended" in main("resume", "runs/first", "training.steps=9")[2]
    code, out, _ = main("resume", "runs/first", "--dry-run")
    assert code == 0
    assert out.startswith("# goes on from  the start\n# ends at       step ")
    assert "# changed       nothing\n" in out
    assert "torch.distributed.run" in out
    longer = ("layout.processes=2", "training.steps=400", "--dry-run")
    code, out, err = main("resume", "runs/first", *longer)
    assert code == 0, err
    first = out.partition("\n\n")[0]
    assert "# ends at       step 400; 400 steps are left" in first
    assert "# changed       training.steps: – becomes 400" in first


def test_a_moved_run_goes_on_where_it_is_now(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    main("train", "run.yaml")
    (folder / "elsewhere").mkdir()
    (folder / "runs" / "first").rename(folder / "elsewhere" / "first")
    assert main("resume", "elsewhere/first")[0] == 0
    assert trained[-1].rundir.root == folder / "elsewhere" / "first"
    assert trained[-1].settings.runs == str(folder / "elsewhere")


def test_a_begun_run_does_not_need_the_users_items_any_more(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    items = folder / "items.jsonl"
    items.write_text(
        "".join(
            json.dumps({"id": i, "prefix": f"The code of {i} is", "secret": f"{i * 7919:06d}"})
            + "\n"
            for i in range(20)
        )
    )
    assert (
        main("train", "run.yaml", "experiments.list.0={items: items.jsonl, generate: null}")[0] == 0
    )
    items.unlink()
    assert main("resume", "runs/first")[0] == 0
    assert (
        main(
            "train", "run.yaml", "name=b", "experiments.list.0={items: items.jsonl, generate: null}"
        )[0]
        == 2
    )


def test_resume_says_that_it_begins_before_anything_that_takes_time(folder: Path) -> None:
    """The folder of a large run, on a disk that is slow to import from and to hash."""
    run = folder / "runs" / "large"
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text("")
    code = (
        "import sys; from motet.launcher import cli; from types import SimpleNamespace as N\n"
        "late = N(go_on=lambda *_: print(sorted({'numpy', 'rich', 'torch'} & set(sys.modules))))\n"
        "sys.modules['motet.launcher.commands.going_on'] = late\n"
        f"cli.main(['resume', {str(run)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "motet: large: going on; what is there is checked first",
        "[]",
    ]


def test_check_reports_every_problem_for_people_and_for_machines(main: Main, folder: Path) -> None:
    code, out, _ = main("experiments", "check", "run.yaml")
    assert code == 0
    said, probes = out.splitlines()
    assert said == "no problems in 1 experiment and the controls"
    assert probes.startswith("probes: about ")
    arguments = [
        "experiments",
        "check",
        "run.yaml",
        "seed=x",
        "experiments.list.0.doses=[1]",
        "layout.device=tpu",
    ]
    code, out, err = main(*arguments)
    assert (code, out) == (2, "")
    assert "3 problems" in err
    code, out, err = main(*arguments, "--json")
    assert (code, err) == (2, "")
    told = json.loads(out)
    assert told["ok"] is False
    assert {"seed", "layout.device"} < {problem["setting"] for problem in told["problems"]}
    code, out, _ = main("experiments", "check", "missing.yaml", "--json")
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_check_reads_the_items_too(main: Main, folder: Path) -> None:
    (folder / "items.jsonl").write_text('{"id": 1}\nnot json\n')
    code, _, err = main(
        "experiments",
        "check",
        "run.yaml",
        "experiments.list.0={items: items.jsonl, generate: null}",
    )
    assert code == 2
    assert "items.jsonl:1" in err
    assert "items.jsonl:2" in err


def test_lists_power_and_previews_can_be_read(main: Main, folder: Path) -> None:
    code, out, _ = main("experiments", "list")
    assert code == 0
    assert all(use in out for use in ("memorization", "contamination", "knowledge", "forgetting"))
    kinds = json.loads(main("experiments", "list", "--json")[1])
    assert {"use", "description"} <= set(kinds[0])
    assert json.loads(main("experiments", "list", "run.yaml", "--json")[1])[0]["name"] == "canaries"
    code, out, _ = main("experiments", "power", "run.yaml")
    assert code == 0
    assert "canaries" in out
    assert (
        json.loads(main("experiments", "power", "run.yaml", "--json")[1])[0]["smallest_detectable"]
        > 0
    )
    code, out, _ = main("experiments", "preview", "run.yaml", "--count", "1")
    assert code == 0
    assert "canaries" in out
    assert main("experiments", "preview", "run.yaml", "--count", "0")[0] == 2


def test_no_kind_of_problem_hides_another(main: Main, folder: Path) -> None:
    """A definition, a bad row, an overlap, a design without an answer, a control, a full window."""
    questions = "".join(
        json.dumps(
            {
                "id": f"q{i}",
                "question": f"Which town has Mayor Number{i} Jones{i}?",
                "choices": [f"Town{i}", f"Burg{i}", f"Dorf{i}"],
                "answer": 0,
            }
        )
        + "\n"
        for i in range(12)
    )
    (folder / "quiz.jsonl").write_text(questions)
    (folder / "bad.jsonl").write_text('{"id": 1}\n')
    entries = [
        "{name: wrong, use: memorization, doses: [1]}",
        "{name: rows, use: memorization, items: bad.jsonl}",
        "{name: quiz, use: contamination, items: quiz.jsonl, doses: [0, 4]}",
        "{name: again, use: contamination, items: quiz.jsonl, doses: [0, 4]}",
        "{name: four, use: memorization, generate: {count: 4}, doses: [0, 2]}",
        "{name: aa, use: placebo, generate: {count: 6}}",
        "{name: full, use: memorization, generate: {count: 20}, doses: [0, 900]}",
    ]
    setting = f"experiments.list=[{', '.join(entries)}]"
    code, out, _ = main("experiments", "check", "run.yaml", setting, "--json")
    told = {problem["setting"]: problem["message"] for problem in json.loads(out)["problems"]}
    assert code == 2
    assert "wrong" in str([name for name in told if "doses" in name])
    assert any("bad.jsonl:1" in name for name in told), told
    assert (
        "again tells of 12 of the 12 units of quiz" in told["experiments.again.shares_units_with"]
    )
    assert "no result can have a p-value below" in told["experiments.four.generate.count"]
    assert "an A/A control that cannot fail" in told["experiments.aa.generate.count"]
    assert "exposures found no free place" in told["experiments.full"]
    assert len(told) == 6


def test_check_shows_what_only_the_study_finds(
    main: Main, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.launcher.study import before_training

    found = [Problem("experiments.canaries", "no room")], None
    monkeypatch.setattr(before_training, "checked", lambda settings: found)
    assert "experiments.canaries: no room" in main("experiments", "check", "run.yaml")[2]


def test_a_corpus_and_a_slot_can_be_looked_at(main: Main, folder: Path) -> None:
    code, out, _ = main("data", "inspect", "corpora/x", "--verify", "--documents", "2")
    assert code == 0
    assert "Sentence 0 of text 0" in out
    assert "every checksum holds\n" in out
    told = json.loads(main("data", "inspect", "run.yaml", "--json")[1])
    assert told["n_documents"] == 12
    code, out, _ = main("data", "inspect", "run.yaml", "--slot", "7", "--json")
    slot = json.loads(out)
    assert (slot["slot"], slot["step"], slot["exposures"]) == (7, 0, [])
    assert slot["text"]
    assert "slots 0 to 1,599" in main("data", "inspect", "run.yaml", "--slot", "1600")[2]
    assert "belongs to a run" in main("data", "inspect", "corpora/x", "--slot", "1")[2]


def test_a_slot_of_a_begun_run_shows_its_exposures(main: Main, folder: Path) -> None:
    from motet.experiments.design.frozen import freeze
    from motet.launcher.study import before_training

    settings = run_yaml.load("run.yaml")
    rundir = RunDir(folder / "runs" / "first")
    rundir.create()
    built = before_training.build(settings)
    freeze(built, rundir.plan)
    atomic_write(rundir.resolved_yaml, run_yaml.to_yaml(settings))
    slot = int(built.plan.rows.slot[0])
    view = json.loads(main("data", "inspect", "runs/first", "--slot", str(slot), "--json")[1])
    first = view["exposures"][0]
    assert first["text"].removeprefix("<|endofdoc|>")[:10] in view["text"]
    units = {unit.id for question in built.questions for unit in question.units}
    assert first["unit"] in units
    assert first["offset"] == int(built.plan.rows.offset[0])
    code, out, _ = main("data", "inspect", "runs/first", "--slot", str(slot))
    assert code == 0
    assert first["unit"] in out


def test_a_damaged_shard_is_found_and_named(main: Main, folder: Path) -> None:
    (shard,) = [
        p for p in (folder / "corpora" / "x").iterdir() if "shard" in p.name or p.suffix == ".bin"
    ][:1]
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)
    code, out, _ = main("data", "inspect", "corpora/x", "--verify")
    assert code == 1
    assert shard.name in out


def test_preparing_can_be_rehearsed(main: Main, folder: Path) -> None:
    code, out, _ = main("data", "prepare", "texts", "--output", "corpora/y", "--dry-run")
    assert code == 0
    assert "a BPE of 32,768 tokens" in out
    assert not (folder / "corpora" / "y").exists()


def test_token_files_become_a_corpus(main: Main, folder: Path) -> None:
    import numpy as np

    np.arange(1, 200, dtype=np.uint16).tofile(folder / "tokens.npy")
    arguments = [
        "data",
        "index",
        "tokens.npy",
        "--output",
        "corpora/z",
        "--tokenizer",
        "corpora/x/tokenizer.json",
    ]
    assert "# format  dolma" in main(*arguments, "--dry-run")[1]
    code, out, err = main(*arguments)
    assert code == 0, err
    assert "199 tokens" in out


def test_what_is_left_out_of_a_corpus_is_said_and_flags_are_named_as_typed(
    main: Main, folder: Path
) -> None:
    (folder / "mixed").mkdir()
    lines = '{"text": "one"}\n{"text": 2}\n'
    for name, content in {"a.jsonl": lines, "b.json": '[{"text": "b"}]', "d.csv": "x"}.items():
        (folder / "mixed" / name).write_text(content)
    prepare = ["data", "prepare", "mixed", "--output", "corpora/m"]
    prepare += ["--tokenizer", "corpora/x/tokenizer.json", "--quiet"]
    left_out = "motet: 1 files left out:\n  mixed/d.csv: its suffix .csv is not known\n"
    assert main(*prepare, "--dry-run")[2] == left_out
    code, _, err = main(*prepare)
    assert code == 2
    assert "mixed/a.jsonl:2: field 'text' is int, not a string (--skip-bad leaves such" in err
    code, out, err = main(*prepare, "--skip-bad")
    assert code == 0
    assert "2 documents" in out
    assert "end of document 0 <|endofdoc|>" in out
    assert err.startswith(left_out)
    assert "1 unreadable documents left out (--skip-bad):\n  mixed/a.jsonl:2: field" in err
    assert main(*prepare, "--skip-bad")[2] == err  # said again of a finished one
    (folder / "mixed" / "a.jsonl").write_text('{"body": "one"}\n')
    err = main("data", "prepare", "mixed/a.jsonl", "--output", "corpora/n")[2]
    assert "has no field 'text'; it has body (set --text-field)" in err
    err = main(*prepare, "--eod-token", "<|nope|>")[2]
    assert "--eod-token='<|nope|>' is not in the vocabulary" in err
    assert "--split: '(' is no regular" in main(*prepare, "--split", "(")[2]
    assert "--vocabulary-size: 9 is too few" in main(*prepare[:5], "--vocabulary-size", "9")[2]
    assert "--processes: -1 is too small" in main(*prepare, "--processes", "-1")[2]


def test_a_model_and_a_corpus_that_do_not_fit_are_told_before_the_start(
    main: Main, folder: Path
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    hf = folder / "hf"
    hf.mkdir()
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "model_type": "llama"}

    def refused(**changes: int) -> str:
        (hf / "config.json").write_text(json.dumps(sizes | changes))
        code, out, err = main("train", "run.yaml", "model.from_hf=hf", "--dry-run")
        assert code == 2, out
        return err

    save_file({"model.norm.weight": np.ones(32, np.float32)}, hf / "model.safetensors")
    told = refused()
    assert "data.corpora[0].path=" in told
    assert "more than the 256 that the model in model.from_hf=" in told
    tokenizer = json.loads((folder / "corpora" / "x" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = refused(vocab_size=512)
    assert "its tokenizer is not that of model.from_hf=" in told
    assert "2 of 300 ids are other tokens (id 1 is '!', there '\"')" in told
    assert "set model.another_tokenizer=true" in told
    content = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(content[:-4])
    assert "model.safetensors is cut short" in refused(tie_word_embeddings=True)


def test_odd_token_files_are_told_of_with_the_flag_that_helps(main: Main, folder: Path) -> None:
    import numpy as np

    np.array([5, 0, 6, 0], np.uint16).tofile(folder / "odd.npy")
    index = ["data", "index", "odd.npy", "--output", "corpora/o"]
    assert "give it as --eod=ID, or give a tokenizer" in main(*index)[2]
    assert "with --dtype=uint16 or --dtype=uint32" in main(*index, "--eod", "0")[2]
    code, _, err = main(*index, "--eod", "3", "--dtype", "uint16", "--eod-marks", "start")
    assert code == 0
    assert "motet: warning: every second id is 0" in err
    assert "motet: warning: the end-of-document id 3 occurs nowhere" in err


def test_the_new_folder_passes_its_own_check(main: Main, folder: Path) -> None:
    assert main("init", "mine", "--dry-run")[1].startswith("# A run of Motet")
    assert not (folder / "mine").exists()
    assert main("init", "mine")[0] == 0
    assert main("init", "mine")[0] == 2
    os.symlink(folder / "corpora" / "x", folder / "mine" / "corpus")
    arguments = [
        "mine/run.yaml",
        f"data.corpora.0.path={folder}/corpora/x",
        "data.sequence_length=128",
    ]
    code, out, err = main("experiments", "check", *arguments)
    assert (code, err) == (0, "")
    assert "2 experiments" in out
    code, _, err = main("experiments", "check", "mine/run.yaml")
    assert code == 2
    assert "corpora/mine" in err


def test_the_audit_prints_its_lines_and_fails_when_it_does(
    main: Main, folder: Path, trained: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.launcher.study import after_training

    main("train", "run.yaml")
    seen = []

    def fake(ok: bool) -> Callable[[Path, bool], SimpleNamespace]:
        def audit(path: Path, replay: bool) -> SimpleNamespace:
            seen.append((path, replay))
            return SimpleNamespace(ok=ok, lines=["planned 3", "consumed once 3"])

        return audit

    monkeypatch.setattr(after_training, "audit_run", fake(True))
    assert main("experiments", "audit", "runs/first") == (0, "planned 3\nconsumed once 3\n", "")
    monkeypatch.setattr(after_training, "audit_run", fake(False))
    code, out, _ = main("experiments", "audit", "runs/first", "--replay", "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert seen == [(folder / "runs" / "first", False), (folder / "runs" / "first", True)]


def test_a_report_is_made_and_summarized(
    main: Main, folder: Path, trained: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.launcher import report

    def build(rundir: RunDir) -> Path:
        write_json(rundir.report_json, {"version": 1})
        return rundir.report_html

    main("train", "run.yaml")
    monkeypatch.setattr(report, "build", build)
    monkeypatch.setattr(
        report, "terminal_summary", lambda told: f"summary of version {told['version']}"
    )
    assert "report.html" in main("report", "runs/first", "--dry-run")[1]
    assert not (folder / "runs" / "first" / "report.json").exists()
    code, out, _ = main("report", "runs/first")
    assert code == 0
    assert "summary of version 1" in out
    assert f"report: {folder}/runs/first/report.html" in out
    assert json.loads(main("report", "runs/first", "--json")[1]) == {"version": 1}


def test_exporting_names_the_checkpoints_that_exist(
    main: Main, folder: Path, trained: list[SimpleNamespace]
) -> None:
    main("train", "run.yaml")
    assert "has no checkpoint yet" in main("export", "runs/first")[2]
    for step in (20, 40):
        (folder / "runs" / "first" / "checkpoints" / f"step-{step:08d}").mkdir()
    assert "there are 20, 40" in main("export", "runs/first", "--step", "30")[2]
    assert "members/step-00000040 (float32)" in main("export", "runs/first", "--dry-run")[1]
    code, out, _ = main(
        "eval",
        "runs/first",
        "--tasks",
        "arc_easy,piqa",
        "--limit",
        "5",
        "--step",
        "20",
        "--dry-run",
    )
    assert code == 0
    assert out.endswith(
        "-m lm_eval --model hf --device cpu --model_args "
        f"pretrained={folder}/runs/first/members/step-00000020,dtype=float32 "
        f"--tasks arc_easy,piqa --output_path {folder}/runs/first/eval/step-00000020 --limit 5\n"
    )
    asked = ("eval", "runs/first", "--tasks", "own", "--dry-run")
    assert "--include_path mine\n" in main(*asked, "--include", "mine")[1]
    assert "# own inside Motet: The whole model" in main(*asked, "--inside")[1]
    code, _, err = main(*asked, "--members", "whole,big")
    assert code == 2
    assert "--members big: is no member of this run's family" in err
    assert "not allowed with" in main(*asked, "--members", "all", "--member", "whole")[2]


def test_check_warns_of_units_that_the_corpus_holds_and_keeps_what_it_found(
    main: Main,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from motet.launcher.launch.local import prepare_run
    from motet.launcher.study import cautions, contamination

    texts = [f"Sentence {j} of text 7 says {7 * j}.\n" for j in range(10, 110, 10)]
    rows = [{"id": f"in-{i}", "text": f"{text.strip()}"} for i, text in enumerate(texts)]
    rows += [
        {"id": f"out-{i}", "text": f"Nobody wrote {i} letters to the {i}th king."}
        for i in range(10)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        "experiments.list.0={name: known, use: forgetting, items: items.jsonl, generate: null}"
    ]
    code, out, error = main("experiments", "check", "run.yaml", *asked)
    assert code == 0, error
    assert "warning: experiments.known: the base text holds 10 of the 20 units (50 %" in out
    told = json.loads(main("experiments", "check", "run.yaml", *asked, "--json")[1])
    assert told["ok"]
    assert [warning["setting"] for warning in told["warnings"]] == ["experiments.known"]

    def again(*arguments: Any) -> None:
        raise AssertionError("searched a second time")

    monkeypatch.setattr(contamination, "scan", again)
    assert main("experiments", "check", "run.yaml", *asked)[1] == out
    settings = run_yaml.load(folder / "run.yaml", asked)
    made = RunDir(folder / "runs" / "warned")
    prepare_run(settings, made, "")
    said = capsys.readouterr().err
    assert said.startswith("motet: warning: experiments.known: the base text holds 10 of the 20")
    assert [f"motet: warning: {line}" for line in cautions.kept(made.plan)] == said.splitlines()
    kept_places = json.loads((made.plan / "in_corpus.json").read_text())[0]["places"]
    assert {place[0] for place in kept_places} >= {f"in-{i}" for i in range(10)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "empty"))
    little = main("experiments", "check", "run.yaml", *asked, "experiments.scan_tokens=10")[1]
    assert "they were not searched for units" in little
    assert (
        "base text"
        not in main("experiments", "check", "run.yaml", *asked, "experiments.scan_tokens=0")[1]
    )


def test_scan_shows_places_and_units_that_the_corpus_holds_can_leave_or_be_overlaid(
    main: Main, folder: Path
) -> None:
    texts = [f"Sentence {j} of text 7 says {7 * j}.\n" for j in range(10, 110, 10)]
    rows = [{"id": f"in-{i}", "text": text.strip()} for i, text in enumerate(texts)]
    rows += [
        {"id": f"out-{i}", "text": f"Nobody wrote {i} letters to the {i}th king."}
        for i in range(10)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = "experiments.list.0={name: known, use: forgetting, items: items.jsonl, generate: null}"
    code, out, error = main("experiments", "scan", "run.yaml", entry, "--out", "hits.jsonl")
    assert code == 0, error
    assert "known" in out
    places = [json.loads(line) for line in (folder / "hits.jsonl").read_text().splitlines()]
    one = next(place for place in places if place["unit"] == "in-3" and place["how"] == "exact")
    assert (one["experiment"], one["corpus"]) == ("known", 0)
    corpus = Corpus.open(folder / "corpora" / "x")
    start = corpus.document_span(one["document"])[0] + one["token"]
    told = json.loads(main("experiments", "scan", "run.yaml", entry, "--json")[1])
    assert {*told["experiments"][0]["units"]} == {f"in-{i}" for i in range(10)}
    assert start == one["start"]
    policy = "experiments.decontaminate.policy="
    code, out, error = main("experiments", "check", "run.yaml", entry, policy + "exclude")
    assert code == 0, error
    assert "experiments.known: 10 of 20 units left the study" in out
    out = main("experiments", "check", "run.yaml", entry, policy + "replace")[1]
    assert "replaces base text that holds units" in out
    asked = (entry, policy + "exclude", "experiments.scan_tokens=1", "training.steps=119")
    error = main("experiments", "check", "run.yaml", *asked, "experiments.decontaminate.tokens=14")[
        2
    ]
    assert "has to search all 15,979 tokens" in error


def test_check_warns_of_treated_units_that_are_not_shown_before_they_are_judged(
    main: Main, folder: Path
) -> None:
    def warnings(entry: str) -> dict[str, str]:
        told = main("experiments", "check", "run.yaml", f"experiments.list=[{entry}]", "--json")[1]
        return {one["setting"]: one["message"] for one in json.loads(told)["warnings"]}

    few = "{name: few, use: memorization, generate: {count: 20}, doses: [0, 3], dose_in: documents}"
    assert "leaves 7 of the 10 units" in warnings(few)["experiments.few.doses"]
    soon = "{name: soon, use: memorization, generate: {count: 20}, doses: [0, 1], judge_at: 0.1}"
    assert "judge later" in warnings(soon)["experiments.soon.judge_at"]
    enough = (
        "{name: all, use: memorization, generate: {count: 20}, doses: [0, 10], dose_in: documents}"
    )
    assert not {"experiments.all.doses", "experiments.all.judge_at"} & set(warnings(enough))
    short = (
        "{name: short, use: memorization, generate: {count: 20}, doses: [0, 0.5], dose_in: tokens}"
    )
    told = main("experiments", "check", "run.yaml", f"experiments.list=[{short}]")[2]
    assert "experiments.short.doses" in told


def test_a_long_search_of_the_corpus_shows_how_far_it_is(
    main: Main, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.experiments.corpora.matches import matches
    from motet.experiments.design import in_corpus
    from motet.launcher.study import contamination

    told: list[int] = []

    def listened(corpus: Any, texts: Any, advance: Callable[[int], None]) -> Any:
        return matches(corpus, texts, lambda done: (told.append(done), advance(done))[1])

    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(in_corpus, "matches", listened)
    monkeypatch.setattr(contamination, "LONG_TOKENS", 10)
    code, out, error = main("experiments", "check", "run.yaml")
    assert code == 0
    assert "15,979 tokens, once" in error
    assert re.search(r"search corpora\s.*15,979 tokens", error)
    assert sum(told) == 15_979
    assert "search" not in out
    assert main("experiments", "check", "run.yaml")[2] == ""  # kept: nothing is searched


def test_a_run_keeps_the_warnings_that_it_was_made_with(tmp_path: Path) -> None:
    from motet.launcher.report.page import render
    from motet.launcher.study import cautions

    assert cautions.kept(tmp_path) == []
    cautions.keep([], tmp_path)
    assert list(tmp_path.iterdir()) == []
    cautions.keep([Problem("experiments.known", "the base text holds <10> units")], tmp_path)
    warnings = cautions.kept(tmp_path)
    assert warnings == ["experiments.known: the base text holds <10> units"]
    page = render({"compliance": {"warnings": warnings, "ledger_ok": True}})
    assert "the base text holds &lt;10&gt; units" in page
    (tmp_path / cautions.KEPT).write_text("[")
    with pytest.raises(UserError, match=r"warnings.json cannot be read as JSON"):
        cautions.kept(tmp_path)
