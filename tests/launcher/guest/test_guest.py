"""Experiments in a plain loop that is not Motet's: the same tokens, probes and proofs, and errors
where it strays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from motet.core.errors import UserError
from motet.experiments.stream.audit import check_ledger
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.stream import Batch
from motet.launcher import cli, report
from motet.launcher.guest.guest import Guest
from motet.launcher.guest.model import Scorer, model_facts, model_inputs, positions, untouched
from motet.launcher.report.collect import assemble, collect
from motet.launcher.runs.metrics import read_metrics, rows_of
from motet.launcher.study.after_training import audit_run
from motet.models.hf import from_hf
from tests.imports import ROOT
from tests.launcher.guests import (
    STEPS,
    adamw,
    llama,
    make_corpus,
    one_step,
    train,
    write_yaml,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def save(guest: Guest, model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    """Return what saves and records a checkpoint every 4 steps."""

    def after(step: int) -> None:
        if step % 4 == 0:
            model.save_pretrained(folder / str(step))
            torch.save(optimizer.state_dict(), folder / str(step) / "optimizer.pt")
            guest.saved(step, folder / str(step))

    return after


def audit_lines(root: Path) -> str:
    result = audit_run(root, replay=True)
    assert result.ok, result.lines
    return "\n".join(result.lines)


def test_a_plain_loop_makes_a_run_that_passes_its_audit_and_has_a_report(
    corpus: Path, tmp_path: Path
) -> None:
    guest = Guest(write_yaml(tmp_path, corpus))
    model = llama()
    losses = train(guest, model, adamw(model))
    run = guest.run
    assert run.done.read_text().strip() == str(STEPS)
    assert "missing 0, repeated 0, unplanned 0" in audit_lines(run.root)
    rows = rows_of(read_metrics(run.metrics), "step")
    assert [row["loss"] for row in rows] == losses
    assert rows[-1]["tokens"] == STEPS * 8 * 64
    definition = json.loads((run.plan / "definition.json").read_text())
    probed = sorted(int(path.stem[5:]) for path in run.probes.glob("*.npz"))
    assert probed == sorted(definition["experiments"][0]["probe_steps"])
    assert {0, STEPS} <= set(probed)
    page = report.build(run).read_text()
    assert "canaries" in page
    facts = json.loads(run.report_json.read_text())["run"]
    assert facts["model"]["name"] == "LlamaForCausalLM"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_training_does_not_notice_the_probes(corpus: Path, tmp_path: Path) -> None:
    """A model with dropout uses the random generator, which a probe must leave alone."""
    guest = Guest(write_yaml(tmp_path, corpus))
    model, alone = llama(attention_dropout=0.2), llama(attention_dropout=0.2)
    model.model.norm.eval()  # a part that its owner froze stays so
    torch.manual_seed(5)
    losses = train(guest, model, adamw(model))
    assert model.training
    assert not model.model.norm.training
    optimizer = adamw(alone)
    torch.manual_seed(5)
    for step in range(STEPS):
        batches = [model_inputs(guest.stream.batch(8 * step + 2 * k, 2)) for k in range(4)]
        assert one_step(alone, optimizer, batches) == losses[step]
    for name, value in alone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_seen_as_well(corpus: Path, tmp_path: Path, how: str) -> None:
    guest, model = Guest(write_yaml(tmp_path, corpus)), llama()
    optimizer = adamw(model)
    if how == "wrapped":
        compiled: Any = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    train(guest, compiled, optimizer)
    audit_lines(guest.run.root)
    assert json.loads(guest.run.manifest.read_text())["model"]["name"] == "LlamaForCausalLM"


def skip(model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batches[:-1]


def repeat(model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*batches, batches[0]]


def replace(model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    other = {name: value.roll(1, 1) for name, value in batches[0].items()}
    return [other, *batches[1:]]


def add(model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*batches, {name: value.roll(1, 1) for name, value in batches[0].items()}]


def relabel(model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    batches[0]["labels"][:, :20] = -100
    return batches


@pytest.mark.parametrize(
    ("stray", "why"),
    [
        (skip, "slots 30, 31 never reached the model"),
        (repeat, "slots 24, 25 reached it more than once"),
        (replace, "slots 24, 25 never reached the model; 2 sequences reached it"),
        (add, "2 sequences reached it that this process was not to read"),
        (relabel, "the labels of slots 24, 25 were changed"),
    ],
)
def test_a_loop_that_strays_is_stopped_and_its_ledger_fails_the_audit(
    corpus: Path, tmp_path: Path, stray: Callable[..., Any], why: str
) -> None:
    guest = Guest(write_yaml(tmp_path, corpus))
    model = llama()
    optimizer = adamw(model)
    with pytest.raises(UserError, match="step 3 was not trained as planned") as error:
        for step, batches in guest.steps(model):
            used = stray(model, batches) if step == 3 else batches
            guest.done(step, one_step(model, optimizer, used))
    assert why in str(error.value)
    guest.finish()
    plan = ExposurePlan(guest.run.plan / "exposures.plan")
    steps = guest.settings.batch_steps
    assert check_ledger(guest.run.ledger, plan, steps, 1, 3).ok
    verdict = check_ledger(guest.run.ledger, plan, steps, 1, 4)
    assert "do not cover their slots exactly once" in " ".join(verdict.problems)
    assert not guest.run.done.exists()
    assert json.loads((guest.run.attempt(1) / "attempt.json").read_text())["reason"] == "crashed"
    assert why in (guest.run.attempt(1) / "error.txt").read_text()


def test_a_step_without_its_done_and_training_between_steps_are_found(
    corpus: Path, tmp_path: Path
) -> None:
    guest = Guest(write_yaml(tmp_path, corpus, "silent"))
    model = llama()
    with pytest.raises(UserError, match=r"guest\.done\(0\) was not called"):
        for _ in guest.steps(model):
            pass
    guest = Guest(write_yaml(tmp_path, corpus, "extra"))
    optimizer = adamw(model)
    with pytest.raises(UserError, match="step 1 was not trained as planned"):
        for step, batches in guest.steps(model):
            guest.done(step, one_step(model, optimizer, batches))
            model(**batches[0]).loss.backward()
    with pytest.raises(UserError, match=r"step that guest.steps handed out is none"):
        guest.done(7)


def test_an_evaluation_inside_the_loop_is_no_training(corpus: Path, tmp_path: Path) -> None:
    guest = Guest(write_yaml(tmp_path, corpus))
    model = llama()

    def evaluate(step: int) -> None:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 9, dtype=torch.int64))

    train(guest, model, adamw(model), after=evaluate)
    audit_lines(guest.run.root)


def test_updates_that_were_left_out_and_a_batch_ramp_are_in_the_proof(
    corpus: Path, tmp_path: Path
) -> None:
    ramp = "batch.ramp=[{step: 5, sequences: 12}]"
    guest, model = Guest(write_yaml(tmp_path, corpus), (ramp,)), llama()
    sizes = []
    for step, batches in guest.steps(model):
        sizes.append(len(batches))
        assert guest.micro_batches(step) == len(batches)
        one_step(model, adamw(model), batches)
        guest.done(step, applied=step != 2)
    guest.finish()
    assert sizes == [4] * 5 + [6] * 7
    assert "1 steps left their update out" in audit_lines(guest.run.root)
    rows = rows_of(read_metrics(guest.run.metrics), "step")
    assert [row["step"] for row in rows if row["skipped"]] == [3]
    assert {row["loss"] for row in rows} == {None}


def test_a_run_that_was_cut_short_goes_on_from_a_recorded_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    whole_model = llama()
    whole = train(Guest(write_yaml(tmp_path, corpus, "whole")), whole_model, adamw(whole_model))

    yaml = write_yaml(tmp_path, corpus, "cut")
    guest, model = Guest(yaml), llama()
    optimizer = adamw(model)
    train(guest, model, optimizer, until=7, after=save(guest, model, optimizer, tmp_path))
    assert not guest.run.done.exists()
    guest = Guest(yaml, resume=True)
    ((step, folder),) = guest.saved_steps().items()
    assert (step, folder) == (4, tmp_path / "4")
    model = type(model).from_pretrained(folder).train()
    optimizer = adamw(model)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    assert train(guest, model, optimizer, start_step=4) == whole[4:]
    lines = audit_lines(guest.run.root)
    assert f"model after step {STEPS}; 2 segment(s), ranks 1 -> 1" in lines
    assert "missing 0, repeated 0, unplanned 0" in lines
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_run_goes_on_only_from_what_was_recorded_with_the_same_model_and_settings(
    corpus: Path, tmp_path: Path
) -> None:
    yaml = write_yaml(tmp_path, corpus)
    guest, model = Guest(yaml), llama()
    with pytest.raises(UserError, match=r"is being trained already|exists"):
        Guest(yaml)
    optimizer = adamw(model)
    train(guest, model, optimizer, until=9, after=save(guest, model, optimizer, tmp_path))

    def again(step: int | None, model: Any = model, settings: tuple[str, ...] = ()) -> None:
        guest = Guest(yaml, settings, resume=True)
        try:
            next(guest.steps(model, step))
        finally:
            guest.finish()

    with pytest.raises(UserError, match=r"exists; motet.Guest"):
        Guest(yaml)
    with pytest.raises(UserError, match=r"which checkpoint.*recorded: 4, 8"):
        again(None)
    with pytest.raises(UserError, match=r"step 5 .* was not recorded.*recorded: 4, 8"):
        again(5)
    with pytest.raises(UserError, match=r"its parameters are|its model is"):
        again(8, llama(hidden_size=48))
    with pytest.raises(UserError, match=r"batch.sequences: is 8 in this run"):
        again(8, settings=("batch.sequences=16",))
    weights = tmp_path / "8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"is not what was recorded: model.safetensors was altered"):
        again(8)
    again(4)
    assert Guest(yaml, resume=True).saved_steps().keys() == {4}, "later ones were set aside"


def test_an_extended_guest_is_judged_as_frozen_and_one_extended_too_early_is_not(
    corpus: Path, tmp_path: Path
) -> None:
    def go_on(yaml: Path, guest: Guest, step: int) -> None:
        model = llama().from_pretrained(guest.saved_steps()[step]).train()
        longer = Guest(yaml, ("training.steps=16",), resume=True)
        train(longer, model, adamw(model), start_step=step, until=16)

    found = {}
    for name, stop in (("whole", STEPS), ("cut", 8)):
        yaml = write_yaml(tmp_path, corpus, name)
        guest, model = Guest(yaml), llama()
        optimizer = adamw(model)
        folder = tmp_path / name
        train(guest, model, optimizer, until=stop, after=save(guest, model, optimizer, folder))
        go_on(yaml, guest, stop)
        found[name] = assemble(collect(guest.run))
    whole, cut = found["whole"], found["cut"]
    assert "Judged at step 12, as frozen; the run went on to step 16" in whole["first_line"]
    (entry,) = whole["answers"]["experiments"]
    assert entry["verdict"]["kind"] in ("found", "not_found")
    assert [one["step"] for one in entry["exploratory"]] == [16]
    assert "16 steps long instead of 12 before step 12 of its judgement" in cut["first_line"]
    assert cut["answers"]["experiments"][0]["verdict"]["kind"] == "exploratory"


def test_saving_under_a_wrong_step_is_refused(corpus: Path, tmp_path: Path) -> None:
    guest, model = Guest(write_yaml(tmp_path, corpus)), llama()
    with pytest.raises(UserError, match="before the first step"):
        guest.saved(0, tmp_path)
    with pytest.raises(UserError, match=r"step 5 .* but 1 updates were counted"):
        train(guest, model, adamw(model), after=lambda step: guest.saved(step + 4, tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no files of a checkpoint"):
        guest.saved(1, empty)


def test_settings_that_only_motet_train_obeys_are_refused_together(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = write_yaml(tmp_path, corpus)
    given = ("model.preset=4m", "training.optimizer.lr=0.1", "layout.tp=2", "checkpoint.keep=9")
    with pytest.raises(UserError) as error:
        Guest(yaml, given)
    for setting in given:
        assert f"{setting.partition('=')[0]}: is decided by your own training loop" in str(
            error.value
        )
    with pytest.raises(UserError, match="no run to go on with"):
        Guest(yaml, resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="the processes have not joined yet"):
        Guest(yaml)
    monkeypatch.delenv("WORLD_SIZE")
    guest = Guest(yaml, ("layout.micro_sequences=3",))
    with pytest.raises(UserError, match="8 sequences cannot be divided over 1 process in micro"):
        next(guest.steps(llama()))
    guest = Guest(yaml, ("name=small",))
    with pytest.raises(UserError, match="the model knows 100 tokens, the tokenizer"):
        next(guest.steps(llama(vocab_size=100)))


def test_a_plan_that_was_altered_stops_a_guest(corpus: Path, tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path, corpus)
    guest, model = Guest(yaml), llama()
    optimizer = adamw(model)
    train(guest, model, optimizer, until=5, after=save(guest, model, optimizer, tmp_path))
    path = guest.run.plan / "exposures.plan"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"exposures.plan"):
        Guest(yaml, resume=True)


def packed(sequences: int = 4, length: int = 32, seed: int = 0) -> Batch:
    """Return a batch with several documents a sequence, as the stream makes them."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 300, (sequences, length)).astype(np.int32)
    ids = np.cumsum(draw.random(tokens.shape) < 0.15, axis=1).astype(np.int32)
    labels = np.full(tokens.shape, -100, dtype=np.int64)
    labels[:, :-1] = tokens[:, 1:]
    labels[:, :-1][np.diff(ids, axis=1) != 0] = -100
    return Batch(0, tokens, labels, ids, np.empty(0, dtype=np.uint64))


def decoder_twin(model: Any, folder: Path) -> Any:
    from motet.models.decoder import Decoder

    model.save_pretrained(folder)
    config, state = from_hf(folder)
    decoder = Decoder(config)
    decoder.load_state_dict(state)
    return decoder


def test_positions_restart_with_each_document() -> None:
    ids = np.array([[3, 3, 4, 4, 4, 5], [0, 1, 2, 2, 2, 2]], dtype=np.int32)
    assert positions(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_of_packed_documents_is_the_decoders(attention: str, tmp_path: Path) -> None:
    model = llama(attn_implementation=attention)
    decoder = decoder_twin(model, tmp_path)
    batch = packed()
    loss = model(**model_inputs(batch), use_cache=False).loss
    tokens, ids = (torch.from_numpy(a).long() for a in (batch.tokens_BT, batch.document_ids_BT))
    sums = decoder(tokens, torch.from_numpy(batch.labels_BT), ids, mode="loss")
    assert loss.item() == pytest.approx((sums.cross_entropy / sums.n_labels).item(), rel=1e-6)
    wrong = model(**{**model_inputs(batch), "position_ids": None}).loss
    assert abs(wrong.item() - loss.item()) > 1e-5, "the masks matter here"


def test_scores_of_probes_are_the_decoders(tmp_path: Path) -> None:
    model = llama()
    decoder = decoder_twin(model, tmp_path)
    batch = packed()
    tokens = batch.tokens_BT.astype(np.int64)
    with untouched(model):
        logprob, greedy = Scorer(model).score(tokens, batch.labels_BT)
    with torch.no_grad():
        wanted = decoder(torch.from_numpy(tokens), torch.from_numpy(batch.labels_BT), mode="score")
    np.testing.assert_allclose(logprob, wanted.logprob.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(greedy, wanted.greedy.numpy())
    assert (logprob[batch.labels_BT == -100] == 0).all()


def test_accumulated_gradients_of_packed_documents_are_those_of_the_whole_batch(
    corpus: Path, tmp_path: Path
) -> None:
    """Micro-batches hold different numbers of labels, and every label counts alike all the same."""
    guest, model = Guest(write_yaml(tmp_path, corpus, masks=True)), llama()
    decoder = decoder_twin(model, tmp_path / "m")
    _, batches = next(guest.steps(model))
    loss = sum(model(**batch).loss / len(batches) for batch in batches)
    loss.backward()
    whole = guest.stream.batch(0, 8)
    counts = {int((guest.stream.batch(2 * k, 2).labels_BT >= 0).sum()) for k in range(4)}
    assert len(counts) > 1
    assert whole.document_ids_BT is not None
    tokens, ids = (torch.from_numpy(a).long() for a in (whole.tokens_BT, whole.document_ids_BT))
    sums = decoder(tokens, torch.from_numpy(whole.labels_BT), ids, mode="loss")
    mean = sums.cross_entropy / sums.n_labels
    mean.backward()
    assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad, decoder.embedding.weight.grad, rtol=1e-4, atol=1e-7
    )


class Blind(torch.nn.Module):
    """A model that takes positions and heeds them for nothing but their own embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **more: Any) -> Any:
        return self.inner(input_ids=input_ids, **more)


def test_a_model_that_would_mix_packed_documents_is_refused(corpus: Path, tmp_path: Path) -> None:
    guest = Guest(write_yaml(tmp_path, corpus, masks=True))
    with pytest.raises(UserError, match=r"data\.document_masks=true, but this model lets a token"):
        next(guest.steps(Blind()))


def test_facts_of_a_model_count_embeddings_apart() -> None:
    facts = model_facts(llama())
    assert facts["parameters"] - facts["parameters_non_embedding"] == 2 * 384 * 32
    tied = model_facts(llama(tie_word_embeddings=True))
    assert tied["parameters"] - tied["parameters_non_embedding"] == 384 * 32


def test_a_class_of_ones_own_is_asked_in_a_foreign_loop_and_read_from_the_snapshot(
    corpus: Path, tmp_path: Path
) -> None:
    yaml = write_yaml(tmp_path, corpus)
    shutil.copy(ROOT / "examples" / "slogans.py", tmp_path)
    entry = "{name: slogans, use: 'slogans.py:Slogans', doses: [0, 2], placement: anywhere}"
    yaml.write_text(f"{yaml.read_text()}  - {entry}\n")
    guest, model = Guest(yaml), llama()
    (tmp_path / "slogans.py").unlink()
    train(guest, model, adamw(model))
    audit_lines(guest.run.root)
    report.build(guest.run)
    assert "slogans" in guest.run.report_json.read_text()
    kept = guest.run.plugins / "slogans.py"
    kept.write_text(kept.read_text() + "# later\n")
    with pytest.raises(UserError, match="is not the source that the run was frozen with"):
        Guest(yaml, resume=True)
    kept.unlink()
    with pytest.raises(UserError, match=r"experiments.slogans.use: is .*; there is no file"):
        Guest(yaml, resume=True)


@pytest.mark.parametrize("command", ["check", "list"])
def test_questions_of_a_short_guest_are_not_refused_for_a_warm_up_that_it_does_not_read(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    yaml = str(write_yaml(tmp_path, corpus))
    asked = ["experiments", command, yaml]
    assert cli.main(asked) == 0
    if command == "check":
        told = "warning: training.schedule.warmup_steps: 100 leaves none of the run's 12 steps"
        assert told in capsys.readouterr().out
    for of_train in ("training.schedule.warmup_steps=100", "model.d_model=64"):
        assert cli.main([*asked, of_train]) == 2, "a guest would refuse it"
