"""The loss on text that the run does not train on, the same number under every layout."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.stream import IGNORED_LABEL, Batch, Stream
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.evaluating import mean_loss
from motet.launcher.runs.manifest import validation_streams
from motet.models.family.base import Member
from motet.parallel.engines.protocol import Engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ValidationText:
    """The sequences of one validation loss: tokens and labels, int64 [B, T]."""

    tokens_BT: I64
    labels_BT: I64

    @property
    def n_labels(self) -> int:
        """How many tokens are predicted."""
        return int((self.labels_BT != IGNORED_LABEL).sum())


@dataclass(frozen=True)
class Validation:
    """What is validated, and when.

    Attributes:
        texts: by name.
        every: fraction of the run between validations.
        batch_tokens: most tokens in one forward pass, per rank.
    """

    texts: Mapping[str, ValidationText]
    every: float
    batch_tokens: int

    @classmethod
    def of_run(cls, settings: RunSettings) -> Validation | None:
        """Return the validation of a run; None where nothing is asked for."""
        asked = settings.validation
        if not asked.used:
            return None
        texts = {
            name: text_of(stream, asked.sequences)
            for name, stream in validation_streams(settings).items()
        }
        return cls(texts, asked.every, settings.probes.batch_tokens)

    def due(self, step: int, total: int) -> bool:
        """Return whether the model is validated after a step: a function of step and length of the
        run alone, so that a resumed run does as one that was not interrupted.
        """
        return step == total or step % max(1, round(self.every * total)) == 0

    def losses(
        self, engine: Engine, layout: Layout, world: World, member: Member | None = None
    ) -> dict[str, float]:
        """Return the mean cross-entropy over all labels of each text, nats (a collective)."""
        return {
            name: mean_loss(
                text.tokens_BT, text.labels_BT, self.batch_tokens, engine, layout, world, member
            )
            for name, text in self.texts.items()
        }


def text_of(stream: Stream, most: int) -> ValidationText:
    """Return the first sequences in the order of a stream of one corpus, at most `most`: a random
    draw, the same whenever it is made.

    Where attention stays inside documents, a row holds one document of a sequence, padded: scoring
    has no masks, and a document sees the same either way.
    """
    batch = stream.batch(0, min(most, stream.sequences_of(0)))
    tokens_BT = batch.tokens_BT.astype(np.int64)
    if batch.document_ids_BT is None:
        return ValidationText(tokens_BT, batch.labels_BT)
    return one_document_a_row(batch, stream.eod)


def one_document_a_row(batch: Batch, padding: int) -> ValidationText:
    """Return each document of each sequence as a row of its own, filled up with `padding`; what
    predicts nothing is left out.
    """
    assert batch.document_ids_BT is not None
    tokens, labels = [], []
    for row, ids_T in enumerate(batch.document_ids_BT):
        edges = [0, *(np.flatnonzero(np.diff(ids_T)) + 1).tolist(), len(ids_T)]
        for start, stop in itertools.pairwise(edges):
            if not (batch.labels_BT[row, start:stop] != IGNORED_LABEL).any():
                continue
            fill = (0, len(ids_T) - (stop - start))
            part = batch.tokens_BT[row, start:stop].astype(np.int64)
            tokens.append(np.pad(part, fill, constant_values=padding))
            labels.append(
                np.pad(batch.labels_BT[row, start:stop], fill, constant_values=IGNORED_LABEL)
            )
    return ValidationText(np.stack(tokens), np.stack(labels))
