"""How far neighbouring members of a family lie apart, on text that the run never read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from motet.experiments.stream.held_out import HeldOutSequences
from motet.experiments.stream.stream import IGNORED_LABEL
from motet.models.decoder import Decoder
from motet.models.divergence import divergence
from motet.models.family.base import Member

F64 = npt.NDArray[np.float64]


class MeasuredModel(NamedTuple):
    """One model that is compared.

    Attributes:
        name: of the member.
        step: of the checkpoint that has it.
        parameters: outside embedding and head.
        inside: the member as a slice of the checkpoint's model; None: it is that model.
    """

    name: str
    step: int
    parameters: int
    inside: Member | None


def pair_rows(
    models: Sequence[MeasuredModel],
    decoder_of: Callable[[int], Decoder],
    text: HeldOutSequences,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return one row for each two models that follow each other: the mean over all predicted tokens
    of KL(larger || smaller), nats, with its 95 % interval over sequences.

    Args:
        models: in order; the larger of two is that of more parameters, of equals the later.
        decoder_of: reads the model of a checkpoint; at most two are held.
    """
    held: dict[int, Decoder] = {}
    found = []
    for before, after in itertools.pairwise(models):
        steps = {before.step, after.step}
        held = {step: one for step, one in held.items() if step in steps}
        for step in sorted(steps - held.keys()):
            held[step] = decoder_of(step).to(device)
        small, large = sorted((before, after), key=lambda one: one.parameters)
        sums_S2 = _sums(held[large.step], large, held[small.step], small, text, device)
        found.append(
            {
                "before": before.name,
                "after": after.name,
                "steps": [before.step, after.step],
                "larger": large.name,
                "smaller": small.name,
                **mean_with_interval(*sums_S2.T),
            }
        )
    return found


def _sums(
    larger: Decoder,
    large: MeasuredModel,
    smaller: Decoder,
    small: MeasuredModel,
    text: HeldOutSequences,
    device: torch.device,
) -> F64:
    """Return, of each sequence, the sum of the divergences and the number of predicted tokens."""
    rows = []
    for tokens_T, labels_T in zip(text.tokens_BT, text.labels_BT, strict=True):
        tokens_BT = torch.from_numpy(tokens_T)[None].to(device)
        scored = torch.from_numpy(labels_T != IGNORED_LABEL)
        with torch.no_grad():
            mine_NV = larger(tokens_BT, member=large.inside)[0, scored]
            other_NV = smaller(tokens_BT, member=small.inside)[0, scored]
        rows.append((float(divergence(mine_NV, other_NV).sum()), int(scored.sum())))
    return np.array(rows, dtype=np.float64)


def mean_with_interval(sum_S: F64, tokens_S: F64) -> dict[str, Any]:
    """Return the mean over tokens, and its 95 % interval by Student's t over sequences, whose
    tokens are not independent; no interval for one sequence.
    """
    mean, n = float(sum_S.sum() / tokens_S.sum()), len(sum_S)
    interval = None
    if n > 1:
        # The mean is a ratio of sums: its error is that of what each sequence lies off it.
        off_S = (sum_S - mean * tokens_S) / tokens_S.mean()
        half = float(stats.t.ppf(0.975, n - 1)) * float(off_S.std(ddof=1)) / math.sqrt(n)
        interval = [max(0.0, mean - half), mean + half]
    return {"kl": mean, "interval": interval, "sequences": n, "tokens": int(tokens_S.sum())}
