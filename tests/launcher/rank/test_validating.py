"""Validation loss: the same number on any layout, of the text that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.corpora.corpus import CorpusWriter
from motet.experiments.corpora.tokenizer import train_bpe
from motet.experiments.stream.stream import Batch
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.launch.local import verify_corpora
from motet.launcher.rank.mirrored_rows import history_of
from motet.launcher.rank.validating import Validation, ValidationText, one_document_a_row
from motet.launcher.runs.begun import frozen_problems
from motet.launcher.runs.manifest import data_facts, open_stream
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, LENGTH, global_batch

TOKENIZER = train_bpe(["some text"], 257)
ROWS = 13


def text(masked: bool) -> ValidationText:
    whole = global_batch(5, masked)
    batch = Batch(
        0,
        whole.tokens_BT[:ROWS],
        whole.labels_BT[:ROWS],
        None if whole.document_ids_BT is None else whole.document_ids_BT[:ROWS],
        np.empty(0, dtype=np.uint64),
    )
    if masked:
        return one_document_a_row(batch, 0)
    return ValidationText(batch.tokens_BT.astype(np.int64), batch.labels_BT)


def losses(world: World, layout: Layout) -> dict[str, float]:
    engine = build_engine(DENSE, EngineOptions(), layout, world)
    texts = {"plain": text(False), "masked": text(True)}
    found = Validation(texts, 0.1, 3 * LENGTH).losses(engine, layout, world)
    engine.finish_scoring()
    return found


def test_validation_loss_is_the_same_on_every_layout() -> None:
    expected = run_ranks(1, losses, Layout(micro_sequences=2))[0]
    layouts = {
        "fsdp": Layout(dp_shard=2, micro_sequences=2),
        "replicas": Layout(dp_replicate=2, micro_sequences=2),
        "tp": Layout(tp=2, micro_sequences=2),
        "pp": Layout(pp=2, micro_sequences=2),
        "cp": Layout(cp=2, micro_sequences=2),
    }
    for name, layout in layouts.items():
        for found in run_ranks(2, losses, layout):
            assert found == pytest.approx(expected, rel=1e-6), name


def trained_and_validated(world: World) -> tuple[float, float]:
    """The loss of a step whose attention stays inside documents, and the validation loss of the
    same rows.
    """
    layout = Layout(micro_sequences=16)
    engine = build_engine(DENSE, EngineOptions(), layout, world)
    batch = global_batch(5, True)
    assert batch.document_ids_BT is not None
    whole = Batch(
        0, batch.tokens_BT, batch.labels_BT, batch.document_ids_BT, np.empty(0, np.uint64)
    )
    rows = one_document_a_row(whole, 0)
    found = Validation({"v": rows}, 0.1, 4 * LENGTH).losses(engine, layout, world)["v"]
    result = engine.step([batch], 0.0, lambda *all: False, lambda: False)
    assert rows.n_labels == result.n_labels
    return result.loss, found


def test_documents_are_validated_as_they_are_trained() -> None:
    trained, validated = run_ranks(1, trained_and_validated)[0]
    assert validated == pytest.approx(trained, rel=1e-6)


def corpus(folder: Path, documents: int = 40, tokens: int = 20, first: int = 10) -> Path:
    with CorpusWriter(folder, TOKENIZER) as writer:
        for number in range(documents):
            writer.append([first + number] * tokens, f"d{number}")
    return folder


def settings(folder: Path, section: str, data: str = "") -> RunSettings:
    text = (
        f"name: r\ndata: {{sequence_length: 16, corpora: [{{path: {folder / 'c'}}}]{data}}}\n"
        f"training: {{steps: 10, schedule: {{warmup_steps: 0}}}}\nvalidation: {section}\n"
    )
    return run_yaml.load(None, text=text, base=folder)


def test_text_of_both_kinds_is_named_and_none_of_it_is_trained_on(tmp_path: Path) -> None:
    corpus(tmp_path / "c")
    corpus(tmp_path / "own", first=100)
    section = f"{{documents: 5, corpora: [{{path: {tmp_path / 'own'}}}], sequences: 4}}"
    asked = settings(tmp_path, section)
    verify_corpora(asked)
    found = Validation.of_run(asked)
    assert found is not None
    assert set(found.texts) == {"c", "own"}
    assert all(len(one.tokens_BT) == 4 for one in found.texts.values())
    hidden = set(found.texts["c"].tokens_BT.ravel().tolist()) - {TOKENIZER.eod}
    stream = open_stream(asked)
    read = stream.base_tokens(np.arange(3 * stream.sequences_of(0))).ravel().tolist()
    assert hidden
    assert not hidden & set(read)
    assert data_facts(asked)["corpora"] == data_facts(settings(tmp_path, "{}"))["corpora"]
    assert Validation.of_run(settings(tmp_path, "{}")) is None


def test_it_is_due_by_step_alone_and_at_the_end() -> None:
    found = Validation({}, 0.25, 64)
    assert [step for step in range(1, 11) if found.due(step, 10)] == [2, 4, 6, 8, 10]
    assert [step for step in range(1, 4) if found.due(step, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{documents: 21}", r"validation.documents=21: data.corpora\[0\] has 40 documents"),
        ("{documents: -1}", "validation.documents"),
        ("{corpora: [{name: x}]}", "validation.corpora.0.path: is missing"),
        ("{corpora: [{path: c}]}", "is trained on too"),
        ("{corpora: [{path: copy}]}", "data.corpora.0. holds the same tokens"),
        ("{corpora: [{path: none}]}", "none"),
        ("{corpora: [{path: short}]}", "fewer than one sequence"),
        ("{corpora: [{path: other}]}", r"validation.corpora\[0\].path=.*tokenizers differ"),
        ("{corpora: [{path: own}, {path: x/own}]}", "'own' is what another validation loss"),
        ("{every: 0}", "validation.every"),
        ("{documnets: 2}", "documents"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_the_start(
    tmp_path: Path, section: str, message: str
) -> None:
    corpus(tmp_path / "c")
    corpus(tmp_path / "own", first=100)
    corpus(tmp_path / "copy")
    corpus(tmp_path / "short", documents=1, tokens=3)
    with CorpusWriter(tmp_path / "other", train_bpe(["other words, other words"], 260)) as writer:
        writer.append([1] * 40, "d")
    with pytest.raises(UserError, match=message):
        verify_corpora(settings(tmp_path, section))


def test_what_is_held_out_is_frozen_with_the_run(tmp_path: Path) -> None:
    corpus(tmp_path / "c")
    before, after = (settings(tmp_path, f"{{documents: {n}}}") for n in (3, 4))
    assert [p.setting for p in frozen_problems(before, after)] == ["validation.documents"]


def test_a_row_is_shown_by_text_and_member() -> None:
    row = {
        "kind": "validation", "step": 4, "losses": {"web": 2.0}, "labels": {"web": 31},
        "members": {"small": {"web": 2.5}}, "seconds": 0.1,
    }  # fmt: skip
    assert history_of(row) == {
        "step": 4, "validation/web/loss": 2.0, "validation/web@small/loss": 2.5,
    }  # fmt: skip
