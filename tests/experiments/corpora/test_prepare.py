"""Preparing a corpus: one result, however many workers and however often it is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.core.listed import write_list
from motet.experiments.corpora import prepare as prepare_module
from motet.experiments.corpora import sources
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.corpora.encoding import worker_count
from motet.experiments.corpora.prepare import (
    PrepareRequest,
    Progress,
    inspect_corpus,
    prepare,
    prepare_request_problems,
)
from motet.experiments.corpora.progress import facts
from motet.experiments.corpora.tokenizer import Tokenizer

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "and",
    "then",
    "ran",
    "over",
    "under",
    "quickly,",
    "slowly.",
    "Motet",
    "voices",
    "sing\n",
]
N_DOCUMENTS = 60

# Runs `prepare` and kills its own process after some blocks; prints its workers first.
KILLED_RUN = """
import json, multiprocessing, os, signal, sys
from pathlib import Path
from motet.experiments.corpora import prepare, sources

def show(progress):
    global left
    left -= progress.stage == "encode"
    if left == 0:
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    folder, left, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sources.BLOCK_BYTES, prepare.CHECKPOINT_S = 2000, 0
    request = prepare.PrepareRequest([folder + "/in.jsonl"], Path(folder, "c"),
        vocabulary_size=300, shard_tokens=3000, workers=workers)
    prepare.prepare(request, show)
"""


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareRequest:
    """A small input cut into some twenty blocks."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_S", 0.0)
    dice = random.Random(0)
    with (tmp_path / "in.jsonl").open("w") as file:
        for number in range(N_DOCUMENTS):
            text = " ".join(dice.choices(WORDS, k=dice.randrange(5, 250)))
            file.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
    return PrepareRequest(
        inputs=[str(tmp_path / "in.jsonl")],
        output=tmp_path / "c",
        vocabulary_size=300,
        shard_tokens=3000,
        workers=1,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killing(after: int) -> Callable[[Progress], None]:
    """Return a progress callback that fails at a block, as an unexpected error would."""

    def show(progress: Progress) -> None:
        nonlocal after
        after -= progress.stage == "encode"
        if after == 0:
            raise KeyboardInterrupt

    return show


def test_the_corpus_holds_every_document_in_order_with_its_id(request_: PrepareRequest) -> None:
    corpus = prepare(request_)
    assert corpus.tokenizer_path is not None
    tokenizer = Tokenizer.load(corpus.tokenizer_path)
    records = [json.loads(line) for line in Path(request_.inputs[0]).read_text().splitlines()]
    assert corpus.n_documents == len(records)
    for ordinal, record in enumerate(records):
        start, stop = corpus.document_span(ordinal)
        ids = corpus.read(start, stop - start).tolist()
        assert corpus.document_id(ordinal) == record["id"]
        assert ids == [*tokenizer.encode(record["text"]), corpus.eod]
    assert corpus.eod_terminated
    assert len(corpus.manifest["shards"]) > 2
    assert corpus.verify() == []


def test_any_number_of_workers_gives_the_same_bytes(request_: PrepareRequest) -> None:
    results = []
    for workers in (1, 3):
        output = request_.output.with_name(f"c{workers}")
        results.append(contents(prepare(replace(request_, output=output, workers=workers)).path))
    assert results[0] == results[1]


def test_killed_again_and_again_it_completes_with_the_same_bytes(
    request_: PrepareRequest, tmp_path: Path
) -> None:
    whole = contents(prepare(replace(request_, output=tmp_path / "whole")).path)
    script = tmp_path / "killed.py"
    script.write_text(KILLED_RUN)
    for blocks, workers in ((4, 2), (5, 1)):
        command = [sys.executable, str(script), str(tmp_path), str(blocks), str(workers)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not request_.output.exists()
        for pid in json.loads(run.stdout):
            _wait_until_gone(pid)
    state = json.loads((tmp_path / "c.partial" / "prepare.json").read_text())
    assert 0 < state["n_blocks"] <= 10, "the killed runs made progress, and some was left to do"
    corpus = prepare(replace(request_, workers=2))
    assert contents(corpus.path) == whole
    assert not (tmp_path / "c.partial").exists()


def _wait_until_gone(pid: int) -> None:
    """Fail if a worker outlives its killed parent."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"worker {pid} is still there")


def test_a_resumed_run_encodes_only_what_is_left(request_: PrepareRequest) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(request_, killing(after=10))
    seen: list[Progress] = []
    prepare(request_, seen.append)
    total = os.path.getsize(request_.inputs[0])
    assert all(progress.stage == "encode" for progress in seen), "the tokenizer was kept"
    assert seen[-1].input_bytes == seen[-1].input_bytes_total == total
    assert 0 < seen[-1].text_bytes < total * 0.7


def test_a_tokenizer_that_changed_between_two_runs_is_refused(request_: PrepareRequest) -> None:
    """Half of the corpus would be in other tokens than the rest."""
    with pytest.raises(KeyboardInterrupt):
        prepare(request_, killing(after=10))
    trained = request_.output.with_name("c.partial") / "tokenizer.json"
    content = json.loads(trained.read_text())
    content["model"]["merges"].pop()
    trained.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json was altered since it was trained"):
        prepare(request_)


def test_a_tokenizer_of_another_corpus_or_of_a_model_is_compared_with_its_hash(
    request_: PrepareRequest, tmp_path: Path
) -> None:
    first = prepare(request_).path
    model = shutil.copytree(first, tmp_path / "model")
    for name in ("corpus.json", "prepare.json"):
        (model / name).unlink()
    write_list(model, {})
    for folder in (first, model):
        other = replace(request_, output=tmp_path / f"from-{folder.name}", tokenizer=str(folder))
        settings = folder / "tokenizer_config.json"
        kept = settings.read_text()
        settings.write_text(kept.replace("endofdoc", "endofall"))
        with pytest.raises(UserError, match=r"tokenizer_config.json"):
            prepare(other)
        settings.write_text(kept)
        assert prepare(other).eod_token == Corpus.open(first).eod_token


def test_resuming_under_other_settings_is_refused_by_name(request_: PrepareRequest) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(request_, killing(after=3))
    changed = replace(request_, vocabulary_size=310, shard_tokens=100)
    message = "shard_tokens was 3000, is 100; vocabulary_size was 300, is 310"
    with pytest.raises(UserError, match=message):
        prepare(changed)
    with Path(request_.inputs[0]).open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="files of the input was"):
        prepare(request_)


def test_a_finished_corpus_is_kept_under_the_same_settings_and_refused_under_others(
    request_: PrepareRequest,
) -> None:
    first = prepare(request_)
    before = (first.path / "corpus.json").stat().st_mtime_ns
    again = prepare(replace(request_, workers=2))
    assert (again.path / "corpus.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"c was made with other settings: max_documents was None"):
        prepare(replace(request_, max_documents=5))
    other = request_.output.with_name("other")
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other exists and is not empty"):
        prepare(replace(request_, output=other))


def test_max_documents_stops_exactly_there_also_after_a_kill(
    request_: PrepareRequest, tmp_path: Path
) -> None:
    limited = replace(request_, max_documents=31)
    with pytest.raises(KeyboardInterrupt):
        prepare(limited, killing(after=6))
    corpus = prepare(limited)
    assert corpus.n_documents == 31
    assert corpus.document_id(30) == "doc-30"
    whole = prepare(replace(limited, output=tmp_path / "whole", workers=2))
    assert contents(whole.path) == contents(corpus.path)


def test_a_bad_line_stops_it_and_skip_bad_goes_on_from_there(request_: PrepareRequest) -> None:
    file = Path(request_.inputs[0])
    lines = file.read_bytes().splitlines(keepends=True)
    lines[40] = b"{broken\n"
    file.write_bytes(b"".join(lines))
    tokenizer = prepare(replace(request_, output=file.with_name("t"), skip_bad=True)).tokenizer_path
    request_ = replace(request_, tokenizer=str(tokenizer))
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"in.jsonl:41: not a line of JSON"):
            prepare(replace(request_, workers=workers))
    corpus = prepare(replace(request_, skip_bad=True))
    assert corpus.n_documents == N_DOCUMENTS - 1
    with pytest.raises(UserError, match="skip_bad was True and left out 1 documents"):
        prepare(request_)


def test_two_runs_do_not_write_one_corpus(request_: PrepareRequest) -> None:
    def nested(progress: Progress) -> None:
        with pytest.raises(UserError, match=r"c.partial is being prepared by another process"):
            prepare(request_)

    assert prepare(request_, nested).n_documents == N_DOCUMENTS


def test_a_request_reports_all_its_problems_at_once(tmp_path: Path) -> None:
    request = PrepareRequest(
        inputs=[str(tmp_path / "nowhere")],
        output=tmp_path / "c",
        vocabulary_size=10,
        workers=-1,
        max_documents=0,
    )
    settings = [problem.setting for problem in prepare_request_problems(request)]
    wrong = [str(tmp_path / "nowhere"), "vocabulary_size", "workers", "max_documents"]
    assert sorted(settings) == sorted(wrong)
    missing = replace(request, tokenizer="no/tokenizer.json")
    assert "tokenizer" in [problem.setting for problem in prepare_request_problems(missing)]
    with pytest.raises(UserError, match="4 problems"):
        prepare(request)


def test_inputs_without_documents_are_refused(request_: PrepareRequest) -> None:
    Path(request_.inputs[0]).write_text("\n\n")
    with pytest.raises(UserError, match="the input is empty"):
        prepare(request_)


def test_the_training_sample_is_spread_over_the_input(
    request_: PrepareRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "MIB", 8000)
    samples: list[Progress] = []
    prepare(
        replace(request_, sample_mib=1), lambda p: samples.append(p) if p.n_tokens == 0 else None
    )
    total = os.path.getsize(request_.inputs[0])
    assert samples[-1].input_bytes < total / 2
    texts: list[str] = []

    def record(sample: Any, *_: object) -> Tokenizer:
        texts.extend(sample)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "train_bpe", record)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(request_, sample_mib=1, output=request_.output.with_name("d")))
    content = Path(request_.inputs[0]).read_text()
    assert content.index(json.dumps(texts[-1])) > len(content) * 0.6


def test_inspection_tells_sizes_and_decodes_the_first_documents(request_: PrepareRequest) -> None:
    corpus = prepare(request_)
    inspection = inspect_corpus(corpus, documents=2, first=1)
    assert [row.id for row in inspection.documents] == ["doc-1", "doc-2"]
    assert [row.start for row in inspection.documents] == corpus.document_starts(1, 10**9)[
        :2
    ].tolist()
    text = str(inspection)
    assert f"{corpus.n_tokens:,}" in text
    assert corpus.fingerprint in text
    second = json.loads(Path(request_.inputs[0]).read_text().splitlines()[1])["text"]
    assert second[:30].splitlines()[0] in text
    assert len(inspect_corpus(corpus, documents=5, first=58).documents) == 2


def test_the_bar_shows_documents_tokens_and_speed(
    request_: PrepareRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("encode", 10, 20, 3_000_000, 1234, 5678)
    assert facts(progress, 2.0) == "1,234 documents  5,678 tokens  1.5 MB/s"
    assert "MB/s" not in facts(progress, 0.0)
    assert isinstance(prepare(request_, True), Corpus)
    assert f"{N_DOCUMENTS} documents" in capsys.readouterr().err


def test_worker_processes_are_used_when_the_input_is_worth_it() -> None:
    assert worker_count(5, 10) == 5
    assert worker_count(0, 1000) == 1
    assert worker_count(0, 10**9) == worker_count(0, None) == len(os.sched_getaffinity(0))
