"""`motet eval`: what the harness is told, exports that were cut short, and results in the report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.core.files import write_json
from motet.core.listed import listed_files
from motet.experiments.corpora.corpus import Corpus, CorpusWriter
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.launcher.commands import evaluate
from motet.launcher.commands.export import begin_token, begins_with_special, is_cut_short
from motet.launcher.report.benchmarks import benchmark_rows
from motet.launcher.report.page import render
from motet.launcher.runs.listed import seal
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize
from motet.models.hf import to_hf
from tests.launcher.conftest import Main
from tests.launcher.followed import make_run

MODEL = ModelConfig(16, 8, 1, 2, 2, 8)
VOCABULARY = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 9)}}
ADDS_BOTH = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def tokenizer(folder: Path, processor: Any) -> Path:
    """A folder of a Llama-like tokenizer, which begins each text with <s>."""
    folder.mkdir()
    special = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(("<s>", "</s>"))
    ]
    content = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": processor,
        "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "w2"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def exported(folder: Path, source: Path | None, begins: bool = False) -> Path:
    decoder = Decoder(MODEL)
    initialize(decoder, 0)
    to_hf(decoder.state_dict(), MODEL, source, folder, end_id=1, begins=begins)
    return folder


@pytest.mark.parametrize(
    ("processor", "kept"),
    [
        (ADDS_BOTH, None),
        ({"type": "Sequence", "processors": [BYTES, ADDS_BOTH]}, [BYTES]),
        ({"type": "Sequence", "processors": [ADDS_BOTH]}, None),
        ({"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}, None),
        (BYTES, BYTES),
        (None, None),
    ],
)
def test_an_exported_tokenizer_adds_no_token_that_the_corpus_has_not(
    processor: Any, kept: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = tokenizer(tmp_path / "in", processor)
    folder = exported(tmp_path / "out", source)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("w3 w4")["input_ids"][:1] != [0]
    found = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
    assert (found["processors"] if isinstance(kept, list) else found) == kept
    before = (source / "tokenizer.json").read_bytes()
    with_it = exported(tmp_path / "with", source, begins=True)
    assert (with_it / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(("first", "begins"), [([0], True), ([], False)])
def test_documents_that_begin_with_the_token_say_so(
    first: list[int], begins: bool, tmp_path: Path
) -> None:
    source = tokenizer(tmp_path / "tokenizer", ADDS_BOTH)
    with CorpusWriter(tmp_path / "corpus", Tokenizer.load(source)) as writer:
        for i in range(4):
            writer.append([*first, 3, 4, 1], str(i))
    corpus = Corpus.open(tmp_path / "corpus")
    assert begin_token(corpus) == 0
    assert begins_with_special(corpus) is begins


def test_an_export_that_was_cut_short_is_told_from_a_whole_one_and_from_other_files(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path / "run")
    run.members.mkdir(parents=True)
    whole = exported(run.members / "step-00000004", None)
    assert not is_cut_short(run, whole)
    weights = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(weights[:-9])
    assert is_cut_short(run, whole)
    (whole / "model.safetensors").write_bytes(weights)
    (whole / "config.json").unlink()
    assert is_cut_short(run, whole)
    (whole / "notes.txt").write_text("mine")
    assert not is_cut_short(run, whole)
    assert not is_cut_short(run, run.members / "step-00000009")
    elsewhere = exported(tmp_path / "elsewhere", None)
    (elsewhere / "config.json").unlink()
    assert not is_cut_short(run, elsewhere)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (["--batch-size", "0"], "--batch-size 0: is not a number of at least 1"),
        (["--batch-size", "many"], "--batch-size many"),
        (["--device", "gpu"], "--device gpu: is not cpu, cuda"),
        (["--model-args", "dtype"], "'dtype' is not like key=value"),
        (["--model-args", "pretrained=x"], "pretrained is the run's own"),
        (["--limit", "0"], "--limit 0"),
        (["--inside", "--batch-size", "2"], "--batch-size 2: is for the harness's own model"),
        (["--params", "1m", "--spec", "{}"], "not allowed with"),
    ],
)
def test_what_the_harness_cannot_take_is_refused_before_anything_starts(
    asked: list[str], match: str, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs", "first")
    code, _, err = main("eval", "runs/first", "--tasks", "x", "--dry-run", *asked)
    assert code == 2
    assert match in err


def test_results_are_rows_of_the_report_and_a_damaged_file_costs_itself_alone(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path)
    for folder, task, value in (
        ("step-00000020", "piqa", 0.5),
        ("step-00000020@small", "piqa", 0.25),
        ("step-00000020@small.inside", "arc<b>", 0.75),
    ):
        (run.evaluations / folder / "m").mkdir(parents=True)
        results = {task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.1}}
        file = run.evaluations / folder / "m" / "results_1.json"
        file.write_text(json.dumps({"results": results}))
        (run.evaluations / folder / "results_2.json").write_text("{")
    rows = benchmark_rows(run)
    shown = [(r["member"], r["inside"], r["task"], r["value"], r["stderr"]) for r in rows]
    assert shown == [
        ("whole", False, "piqa", 0.5, 0.1),
        ("small", False, "piqa", 0.25, 0.1),
        ("small", True, "arc<b>", 0.75, 0.1),
    ]
    page = render({"benchmarks": rows, "run": {"name": "x"}})
    assert "Benchmarks" in page
    assert "arc&lt;b&gt;" in page


def test_a_corpus_that_is_gone_is_told_where_texts_cannot_be_scored_as_in_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = SimpleNamespace(data=SimpleNamespace(corpora=[SimpleNamespace(path=tmp_path / "gone")]))
    monkeypatch.setattr(evaluate.run_yaml, "load", lambda _: gone)
    assert evaluate._scored_as_trained(RunDir(tmp_path)) == {}
    told = capsys.readouterr().err
    assert told.startswith("motet: warning: ")
    assert str(tmp_path / "gone") in told
    assert "which may not be as in training" in told


def test_neither_a_damaged_export_nor_damaged_results_are_evaluated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was exported or found before: the new results would vouch for it."""
    rundir, called = RunDir(tmp_path / "r"), []
    folder, output = rundir.members / "step-00000004", rundir.evaluations / "step-00000004"
    exported(folder, None)
    write_json(rundir.manifest, {"plan_sha256": "p", "definition_sha256": "d"})
    seal(folder, rundir, 4)
    model = evaluate.ChosenModel("whole", None, "The whole model")
    arguments = SimpleNamespace(json=False, inside=False, dry_run=False, tasks="t")
    monkeypatch.setattr(evaluate, "member_folder", lambda *_: folder)
    monkeypatch.setattr(evaluate, "harness_command", lambda *_: ["harness"])
    monkeypatch.setattr(evaluate, "_scored_as_trained", lambda _: {})
    monkeypatch.setattr(evaluate.subprocess, "call", lambda command, **_: called.append(command) or write(output))  # fmt: skip

    def write(output: Path) -> int:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results_1.json").write_text('{"results": {"t": {"acc,none": 0.5}}}')
        return 0

    assert evaluate._exported(rundir, 4, [model], arguments) == 0  # type: ignore[arg-type]
    assert listed_files(output, "") is not None
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model.safetensors was altered"):
        evaluate._exported(rundir, 4, [model], arguments)  # type: ignore[arg-type]
    weights.write_bytes(kept)
    (output / "results_1.json").write_text('{"results": {"t": {"acc,none": 0.9}}}')
    with pytest.raises(UserError, match=r"results_1.json was altered"):
        evaluate._refuse_altered_results(rundir, 4, [model], False)
    assert len(called) == 1
