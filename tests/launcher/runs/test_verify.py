"""A run folder against its own hashes: every damaged thing is named, and nothing reads past it.

The run is invented (no weights are trained), so that each command answers within milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp

from motet.core.errors import UserError
from motet.core.files import read_json, sealed_text, write_json
from motet.core.hashing import sha256_file
from motet.experiments.corpora import storage
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.scoring.store import keep_aside, probe_files, probe_path, read_facts
from motet.experiments.stream.ledger import open_segment, read_segment
from motet.launcher import cli
from motet.launcher.config import run_yaml
from motet.launcher.launch import local
from motet.launcher.report.collect import assemble, collect
from motet.launcher.runs import snapshot
from motet.launcher.runs.attempts import DAMAGED
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.verify import WHOLE
from motet.models.config import ModelConfig, preset
from motet.models.decoder import Decoder
from tests.launcher.guests import make_corpus
from tests.launcher.invented import STEPS, InventedRun

HOW = ("bit", "cut", "empty", "swapped", "other type")
DERIVED = ("report.html", "report.json", ".lock", ".ranks", "run.yaml")
"""Made from the rest, empty, or read by people only."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "verify": ("verify",),
    "report": ("report", "--json"),
    "audit": ("experiments", "audit"),
    "resume": ("resume",),
    "export": ("export", "--output", "exported"),
    "status": ("status", "--json"),
}
Told = Mapping[str, tuple[int, str]]
TINY = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 32, "head_dim": 8}
VOLATILE = re.compile(r"/\S*pytest\S*?/runs/r|\d+ms|\(attempt \d+\)")


def weights_of(model: ModelConfig) -> Callable[[Path], None]:
    """Write a checkpoint's files: those of a model that was never trained."""
    tensors = {f"model.{name}": p.detach() for name, p in Decoder(model).named_parameters()}

    def write(folder: Path) -> None:
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is there is what we want
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)

    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was stopped once; no test may change it."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    model = preset("1m", Corpus.open(corpus).vocabulary_size, **TINY)
    few = lambda text: text.replace("draws: 400", "draws: 100")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        # Of the code one room, as every command hashes all of it: nothing is executed from there.
        package = shutil.copytree(snapshot.package_folder() / "core", folder / "motet" / "core")
        patch.setattr(snapshot, "package_folder", lambda: package.parent)
        invented = InventedRun(
            folder, corpus, few, facts={"model": vars(model), "flops_per_token": 1e6}
        )
    invented.logs, invented.weights = True, weights_of(model)
    invented.train(STEPS // 2)
    invented.train(STEPS, start=STEPS // 2)
    invented.report()
    return invented.run.root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunDir:
    root = tmp_path / "runs" / "r"
    shutil.copytree(whole, root)
    return RunDir(root)


def said(*arguments: str) -> tuple[int, str]:
    """Exit code and all that a command says."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, text.getvalue()


def asked(run: RunDir, command: str) -> tuple[int, str]:
    """Exit code and words of a command on a run; what depends on the clock is left out."""
    words = COMMANDS[command]
    out = run.root.parent / "exported"
    shutil.rmtree(out, ignore_errors=True)
    words = tuple(str(out) if word == "exported" else word for word in words)
    code, text = said(*words, str(run.root))
    if command == "export" and code == 0:
        text += str(sorted((path.name, sha256_file(path)) for path in out.glob("*.safetensors")))
    return code, VOLATILE.sub("", text)


def flip(path: Path, place: int = -1) -> None:
    """Change one bit, in the middle of a file unless a place is named."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 1
    path.write_bytes(bytes(content))


def damage(path: Path, how: str) -> None:
    """Damage a file in one way."""
    content = path.read_bytes()
    if how == "bit" and content:
        flip(path)
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other type":
        path.write_bytes(b"[1, 2]\n" if path.suffix != ".yaml" else b"- 1\n")
    elif how == "swapped":
        other = neighbour(path)
        if other is not None:
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)


def neighbour(path: Path) -> Path | None:
    """The next file of the folder, or the one of the same name in the next folder."""
    beside = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p.name not in DERIVED]
    if len(beside) > 1:
        return beside[(beside.index(path) + 1) % len(beside)]
    cousins = sorted(path.parent.parent.glob(f"*/{path.name}"))
    return cousins[(cousins.index(path) + 1) % len(cousins)] if len(cousins) > 1 else None


def files_of(root: Path) -> list[str]:
    """Every file of a run; of its code, two."""
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()]
    code = [name for name in names if name.startswith("code/")][:2]
    return [n for n in names if n not in DERIVED and not n.startswith("code/")] + code


def test_a_run_as_it_was_written_is_whole(run: RunDir) -> None:
    code, text = said("verify", str(run.root))
    assert (code, text.splitlines()[-1]) == (0, f"whole: {', '.join(WHOLE)}")
    assert "not verified" not in text


def answered(run: RunDir, command: str) -> tuple[int, str]:
    """As `asked`; the report is not drawn, which takes a second."""
    if command != "report":
        return asked(run, command)
    try:
        found = assemble(collect(run))
    except UserError as error:
        return 2, str(error)
    found["run"].pop("config_yaml")
    code = 1 if found["damaged"] else 0
    return code, VOLATILE.sub("", json.dumps(found, sort_keys=True))


def segment_of(name: str) -> str:
    """Of a file of the ledger its folder, which is named when records are missing."""
    return name.rpartition("/")[0] if name.startswith("ledger/") else name


def faults(run: RunDir, name: str, how: str, commands: Sequence[str], told: Told) -> list[str]:
    """Damage one file, ask, put it back: what went wrong in silence or with a traceback."""
    path, found = run.root / name, []
    other = neighbour(path) if how == "swapped" else None
    before = {one: one.read_bytes() for one in (path, other) if one is not None}
    damage(path, how)
    if all(one.read_bytes() == content for one, content in before.items()):
        return []
    kept = {one.relative_to(run.root).as_posix() for one in before}
    for command in commands:
        try:
            now = answered(run, command)
        except Exception as error:
            found.append(f"{name}, {how}, {command}: {type(error).__name__}: {error}")
            continue
        named = any(one in now[1] or segment_of(one) in now[1] for one in kept)
        if now != told[command] and not named:
            found.append(f"{name}, {how}, {command}: {now[0]}, {now[1][:300]!r}")
        if command == "verify" and not (now[0] == 1 and named):
            found.append(f"{name}, {how}: verify says {now[1]!r}")
    for one, content in before.items():
        one.write_bytes(content)
    return found


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets past all checks would train: that is said, and nothing is started."""

    def starts(settings: object, run: RunDir, attempt: int, **_: object) -> int:
        print("ranks start")
        run.attempt(attempt).rmdir()
        return 0

    monkeypatch.setattr(local, "launch", starts)


def swept(run: RunDir, chosen: Callable[[int], Sequence[str]]) -> list[str]:
    """Damage every file of a run in every way; `chosen` names the commands of each case."""
    told = {command: answered(run, command) for command in COMMANDS}
    found = []
    for number, name in enumerate(files_of(run.root)):
        for turn, how in enumerate(HOW):
            found += faults(run, name, how, chosen(number + turn), told)
    return found


def test_no_damage_goes_unsaid(run: RunDir) -> None:
    """Each file x each way; the commands take turns, but for `verify`, which names all of it."""
    others = [name for name in COMMANDS if name != "verify"]
    found = swept(run, lambda number: ["verify", others[number % len(others)]])
    assert not found, "\n".join(found)


@pytest.mark.long
def test_no_damage_goes_unsaid_by_any_command(run: RunDir) -> None:
    found = swept(run, lambda number: list(COMMANDS))
    assert not found, "\n".join(found)


def test_a_damaged_run_is_told_first_and_the_exit_code_says_so(run: RunDir) -> None:
    flip(run.ledger / "segment-00001" / "rank-00000.bin")
    code, text = said("report", str(run.root))
    assert code == 1
    assert text.startswith("The run folder is damaged")
    assert "ledger/segment-00001/rank-00000.bin" in " ".join(text.split())[:300]


def test_scores_that_were_set_to_zero_give_no_verdict(run: RunDir) -> None:
    """They made "effect found" of it, or "not detected", without a remark."""
    path = probe_path(run.probes, STEPS)
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    kept["canaries/logprob"] = np.zeros_like(kept["canaries/logprob"])
    with path.open("wb") as file:
        np.savez(file, **kept)
    run.judgement.unlink()
    found = assemble(collect(run))
    assert "probes/step-00000040.npz is not the one that was measured" in found["first_line"]
    kinds = {entry["verdict"]["kind"] for entry in found["answers"]["experiments"]}
    assert kinds == {"exploratory"}
    assert not run.judgement.exists()


def test_a_checkpoint_under_another_steps_name_is_refused(run: RunDir) -> None:
    shutil.rmtree(run.checkpoint(STEPS))
    shutil.copytree(run.checkpoint(STEPS // 2), run.checkpoint(STEPS))
    for command in ("audit", "report", "export", "verify"):
        code, text = answered(run, command)
        assert code in (1, 2), command
        assert "is that of step 20, in the folder of step 40" in text, command


def test_settings_and_facts_are_compared_with_what_was_frozen(run: RunDir) -> None:
    """Also when whoever edits them takes the hash away, or makes it fit."""
    text = run.resolved_yaml.read_text().rpartition("# sha256")[0]
    run.resolved_yaml.write_text(sealed_text(re.sub(r"(?m)^(  z_loss:) .*", r"\1 0.5", text)))
    code, told = asked(run, "resume")
    assert code == 2
    assert "training.z_loss: is 0.5 and was" in told
    run.resolved_yaml.write_text(sealed_text(text))
    assert asked(run, "resume")[0] == 0
    manifest = read_json(run.manifest)
    write_json(run.manifest, manifest | {"model": manifest["model"] | {"norm_eps": 1.0}})
    code, told = asked(run, "export")
    assert code == 2
    assert "is of another run" in told


def test_a_run_of_before_hashes_were_kept_is_read_and_not_vouched_for(run: RunDir) -> None:
    manifest = read_json(run.manifest)
    run.manifest.write_text(json.dumps({k: v for k, v in manifest.items() if k != "frozen_sha256"}))
    run.frozen_json.unlink()
    run.metrics.unlink()
    for step in run.checkpoint_steps():
        facts = read_json(run.checkpoint(step) / "manifest.json")
        old = {k: v for k, v in facts.items() if k not in ("run_sha256", "probes", "metrics")}
        (run.checkpoint(step) / "manifest.json").write_text(json.dumps(old))
    code, text = asked(run, "verify")
    assert code == 0
    assert "not verified: probes/step-00000040.npz: made before hashes were kept" in text
    assert assemble(collect(run))["first_line"] is None


def test_after_all_checkpoints_were_damaged_a_run_starts_over_by_an_explicit_word(
    run: RunDir,
) -> None:
    for step in run.checkpoint_steps():
        folder = run.checkpoint(step)
        folder.rename(folder.with_name(f"{folder.name}{DAMAGED}1"))
    run.done.unlink()
    for _ in range(2):
        code, text = said("resume", str(run.root))
        assert code == 2
        assert "--from-start" in text
    code, text = said("resume", str(run.root), "--from-start")
    assert code == 0
    assert "ranks start" in text
    assert len(list(run.checkpoints.glob("*.given-up-1"))) == 2


def test_damaged_probes_are_measured_again_and_kept_aside(run: RunDir) -> None:
    path = probe_path(run.probes, STEPS)
    path.write_bytes(path.read_bytes()[:100])
    keep_aside(run.probes, STEPS, 3)
    assert not path.exists()
    assert len(list((run.probes / "superseded").glob("*.damaged-*"))) == 1
    assert STEPS not in [int(read_facts(p)["step"]) for p in probe_files(run.probes)]


def test_a_damaged_segment_does_not_keep_a_run_from_going_on(run: RunDir) -> None:
    path = run.ledger / "segment-00002" / "segment.json"
    path.write_text(path.read_text()[:40])
    opened = open_segment(run.ledger, 1, 3, STEPS // 2, 1, ("p", "d"))
    assert opened.segment == 3


def test_a_damaged_segment_that_nothing_grew_from_is_named_and_spoils_no_answer(
    run: RunDir,
) -> None:
    before = assemble(collect(run))
    folder = run.ledger / "segment-00003"
    folder.mkdir()
    (folder / "segment.json").write_text('{"attempt": 3, "par')
    code, told = asked(run, "audit")
    assert code == 1  # the newest: it may be trained now
    assert "ledger/segment-00003/segment.json" in told
    facts = read_segment(run.ledger, 2)
    open_segment(run.ledger, 2, 4, STEPS, 1, (facts.plan_sha256, facts.definition_sha256))
    code, told = asked(run, "audit")
    assert code == 0
    assert "no part of this proof: ledger/segment-00003/segment.json" in told
    code, told = asked(run, "verify")
    assert code == 1
    assert "grew from it: take ledger/segment-00003 away" in " ".join(told.split())
    found = assemble(collect(run))
    assert any("ledger/segment-00003" in one for one in found["damaged"])
    assert found["answers"] == before["answers"]
    shutil.rmtree(folder)
    assert asked(run, "verify")[0] == 0


def test_a_damaged_segment_that_weights_grew_from_is_what_the_audit_names(run: RunDir) -> None:
    path = run.ledger / "segment-00001" / "segment.json"
    path.write_text(path.read_text()[:40])
    code, told = asked(run, "audit")
    assert code == 1
    assert "PROBLEM: ledger/segment-00001/segment.json cannot be read as JSON" in told


def test_a_corpus_is_hashed_once_and_again_when_it_was_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_yaml.load(RunDir(whole).resolved_yaml)
    shutil.copytree(settings.data.corpora[0].path, tmp_path / "c")
    corpus, hashed = Corpus.open(tmp_path / "c"), []
    monkeypatch.setattr(storage, "SETTLED_S", -1.0)
    plain = storage.sha256_file
    monkeypatch.setattr(
        storage, "sha256_file", lambda path, more: hashed.append(path) or plain(path, more)
    )
    assert corpus.verify(known=True) == []
    assert (len(hashed), hashed.clear()) == (len(corpus.files()), None)
    assert corpus.verify(known=True) == []
    assert hashed == []
    shard = next((tmp_path / "c").glob("tokens-*.bin"))
    times = shard.stat()
    flip(shard)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` or `touch -r` would
    (problem,) = corpus.verify(known=True)
    assert problem.setting.endswith(shard.name)


def test_status_says_so_of_a_manifest_that_is_another_file(run: RunDir) -> None:
    content = run.manifest.read_bytes()
    run.manifest.write_bytes(run.judgement.read_bytes())
    _, told = answered(run, "status")
    run.manifest.write_bytes(content)
    assert "manifest.json" in told


@pytest.mark.parametrize("text", ["", "name: r\n", "# nothing\n", "[]\n"])
def test_status_says_so_of_settings_that_lost_their_hash_however_they_did(
    run: RunDir, text: str
) -> None:
    before = run.resolved_yaml.read_bytes()
    run.resolved_yaml.write_text(text)
    _, said = answered(run, "status")
    run.resolved_yaml.write_bytes(before)
    assert "resolved.yaml" in said
