"""How far neighbours lie apart, against sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from motet.experiments.stream.stream import IGNORED_LABEL
from motet.launcher.rank.neighbours import MeasuredModel, mean_with_interval, pair_rows
from motet.models.decoder import Decoder, initialize
from motet.models.divergence import ROWS, divergence
from motet.models.member import Member
from motet.models.slices import member_weights
from tests.models.families import tiny


def test_the_divergence_is_the_sum_over_the_vocabulary() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    (found,) = divergence(p.log()[None], (q.log() + 3)[None])  # logits are free by a constant
    assert float(found) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    torch.manual_seed(0)
    many = torch.randn(ROWS + 3, 7)
    assert divergence(many, many).abs().max() == 0
    assert (divergence(many, many.flip(0)) >= 0).all()


def test_the_mean_is_over_tokens_and_its_interval_over_sequences() -> None:
    found = mean_with_interval(np.array([1.0, 6.0]), np.array([10.0, 20.0]))
    assert (found["kl"], found["sequences"], found["tokens"]) == (pytest.approx(7 / 30), 2, 30)
    off = (1 - 70 / 30) / 15  # and as much on the other side
    half = 12.7062 * math.sqrt(2) * abs(off) / math.sqrt(2)  # t of one degree of freedom
    assert found["interval"] == pytest.approx([0.0, 7 / 30 + half], rel=1e-4)
    assert mean_with_interval(np.array([1.0]), np.array([4.0]))["interval"] is None


def test_the_larger_of_two_is_the_first_of_the_divergence_and_each_is_read_once() -> None:
    sizes = [2, 4, 1]
    made = {}
    for step, layers in enumerate(sizes):
        made[step] = Decoder(replace(tiny(), n_layers=layers))
        initialize(made[step], seed=step)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny().vocabulary_size, (3, 8))
    labels = np.full_like(tokens, IGNORED_LABEL)
    labels[:, :-1] = tokens[:, 1:]
    text: Any = SimpleNamespace(tokens_BT=tokens, labels_BT=labels)
    read: list[int] = []

    def decoder_of(step: int) -> Decoder:
        read.append(step)
        return made[step]

    models = [MeasuredModel(f"m{step}", step, size, None) for step, size in enumerate(sizes)]
    rows = pair_rows(models, decoder_of, text, torch.device("cpu"))
    assert read == [0, 1, 2]
    assert [(row["larger"], row["smaller"]) for row in rows] == [("m1", "m0"), ("m1", "m2")]
    assert [row["steps"] for row in rows] == [[0, 1], [1, 2]]
    with torch.no_grad():
        p, q = (made[s](torch.from_numpy(tokens)).double().log_softmax(-1) for s in (1, 0))
    expected = (p.exp() * (p - q)).sum(-1)[:, :-1].mean()
    assert rows[0]["kl"] == pytest.approx(float(expected), rel=1e-6)
    assert rows[0]["kl"] > 0
    assert (rows[0]["sequences"], rows[0]["tokens"]) == (3, 21)


def test_slices_of_one_checkpoint_are_compared_as_members_of_it() -> None:
    whole = Decoder(replace(tiny(), n_layers=4))
    initialize(whole, seed=0)
    short = Member("short", replace(whole.config, n_layers=2), (0, 3))
    alone = Decoder(short.config)
    state = whole.state_dict()
    alone.load_state_dict(member_weights(short, whole.config, state))
    tokens = np.random.default_rng(1).integers(0, whole.config.vocabulary_size, (2, 6))
    labels = np.roll(tokens, -1, 1)
    text: Any = SimpleNamespace(tokens_BT=tokens, labels_BT=labels)
    models = [MeasuredModel("short", 9, 1, short), MeasuredModel("whole", 9, 2, None)]
    (row,) = pair_rows(models, lambda step: whole, text, torch.device("cpu"))
    with torch.no_grad():
        p_NV, q_NV = (one(torch.from_numpy(tokens)).flatten(0, 1) for one in (whole, alone))
    assert row["kl"] == pytest.approx(float(divergence(p_NV, q_NV).mean()), rel=1e-5)
    assert (row["larger"], row["steps"]) == ("whole", [9, 9])
