"""What is wrong is told before anything starts, whoever starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.experiments.corpora.corpus import Corpus
from motet.launcher import cli
from motet.launcher.runs import described_model
from motet.models.config import preset
from tests.launcher.guests import RUN_YAML, make_corpus
from tests.launcher.invented import STEPS, InventedRun


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path)


def write(folder: Path, corpus: Path, old: str = "", new: str = "") -> Path:
    path = folder / "r.yaml"
    text = RUN_YAML.format(name="r", masks="true", corpus=corpus)
    text = text.replace("steps: 12", "steps: 12, schedule: {warmup_steps: 2}")
    path.write_text(text.replace(old, new) if old else text)
    return path


def test_units_that_cannot_fit_are_refused_by_a_dry_run_before_torch_is_loaded(
    tmp_path: Path, corpus: Path
) -> None:
    """A million of them took ten seconds to be refused; six were torch's."""
    write(tmp_path, corpus, "count: 10", "count: 1000000")
    code = (
        "import sys; from motet.launcher import cli; "
        "code = cli.main(['train', 'r.yaml', '--dry-run']); "
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "has 1,000,000 units" in done.stderr


def test_weights_that_are_cut_are_refused_by_a_dry_run(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[bool] = []

    def cut(settings: object, values: bool = True) -> None:
        asked.append(values)
        raise UserError("model.safetensors is cut short")

    monkeypatch.setattr(described_model, "check_weights", cut)
    assert cli.main(["train", str(write(tmp_path, corpus)), "--dry-run"]) == 2
    assert "is cut short" in capsys.readouterr().err
    assert asked == [False], "without reading all of them"


def test_ranks_started_by_hand_refuse_altered_tokens(tmp_path: Path, corpus: Path) -> None:
    """As the README starts them, on one rank: also where size and times are as they were."""
    model = preset("1m", Corpus.open(corpus).vocabulary_size)
    facts = {"model": vars(model), "flops_per_token": 1e6, "parameters": 1}
    run = InventedRun(tmp_path, corpus, facts=facts).run
    path = next(corpus.glob("tokens-*.bin"))
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = ["--nproc-per-node", "1", "-m", "motet.launcher.worker", str(run.root)]
    done = subprocess.run([*torchrun, *worker], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert path.name in done.stderr, done.stderr
    assert path.name in (run.attempt(1) / "error.txt").read_text()
    assert f"/{STEPS} " not in done.stdout
    assert not run.checkpoint_steps()
    assert not run.metrics.exists() or b'"step"' not in run.metrics.read_bytes()
