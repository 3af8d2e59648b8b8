"""What an engine tells of text: the score of each label, and the likeliest next token."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from motet.models.family.base import Member
from motet.models.loss import IGNORED

I64 = npt.NDArray[np.int64]


class Scoring(ABC):
    """`Engine.score` and `Engine.likeliest` by one forward pass each."""

    @abstractmethod
    def _scored(
        self, tokens_BT: I64, labels_BT: I64, member: Member | None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probability of each label and the likeliest token in its place, [B, T] (a
        collective); what stands without a label does not count.
        """

    @torch.no_grad()
    def score(
        self, tokens_BT: I64, labels_BT: I64, member: Member | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """See `Engine.score`."""
        logprob_BT, likeliest_BT = self._scored(tokens_BT, labels_BT, member)
        greedy_BT = likeliest_BT.long().cpu().numpy() == labels_BT
        return logprob_BT.double().cpu().numpy(), greedy_BT | (labels_BT == IGNORED)

    @torch.no_grad()
    def likeliest(self, tokens_BT: I64, at_BK: I64, member: Member | None = None) -> I64:
        """See `Engine.likeliest`."""
        labels_BT, rows_B1 = np.full_like(tokens_BT, IGNORED), np.arange(len(at_BK))[:, None]
        labels_BT[rows_B1, at_BK] = 0  # any label asks; only rows with one meet the head
        _, likeliest_BT = self._scored(tokens_BT, labels_BT, member)
        found_BK: I64 = likeliest_BT.long().cpu().numpy()[rows_B1, at_BK]
        return found_BK
