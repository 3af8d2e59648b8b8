"""Noise on input embeddings in training, and the loss gradient with respect to them.

Both need the embeddings of whole sequences on every rank: of one process, or with the weights
sharded over data-parallel ranks (FSDP2). B rows, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from motet.models.decoder import Decoder
from motet.models.loss import LossSums
from motet.parallel.engines.refusals import noise_refusal
from motet.parallel.layout.layout import Layout, LayoutError
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.options import MicroBatch, Noise


def refuse_noise(noise: Mapping[str, float], layout: Layout, has_experts: bool) -> None:
    """Raise `LayoutError` where a plan has experiments with noise that a layout cannot add."""
    why = noise_refusal(layout, has_experts) if noise else None
    if why:
        raise LayoutError(f"{', '.join(noise)} adds noise to input embeddings; {why}")


class NoisyEmbeddings:
    """Part of an engine whose decoder is whole on every rank.

    Attributes:
        noises: of each micro-batch of the step at hand, as the batch gives it.
    """

    decoders: dict[int, Decoder]
    layout: Layout
    world: World
    optimizer: torch.optim.Optimizer
    noises: list[Sequence[Noise]]

    def _loss(self, micro_batch: Any) -> LossSums:
        raise NotImplementedError

    def _synchronise(self, last: bool, mixed: bool = False) -> None:
        raise NotImplementedError

    def _note_noise(self, batches: Sequence[MicroBatch]) -> None:
        """Keep what a step's batches add.

        Raises:
            LayoutError: the layout cannot add it.
        """
        self.noises = [getattr(batch, "noise", ()) for batch in batches]
        if any(self.noises):
            experts = self.decoders[0].config.n_experts > 0 if 0 in self.decoders else False
            refuse_noise({"the plan": 0.0}, self.layout, experts)

    def _with_noise(self, number: int) -> AbstractContextManager[None]:
        """Add the noise of micro-batch `number` to its embeddings inside."""
        return _added(self.decoders[0], self.noises[number], self.world.device)

    def embedding_gradient(
        self, tokens_BT: npt.NDArray[np.int64], labels_BT: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the gradient of the summed loss of all labels with respect to the input
        embeddings, float32 [B, T, D]; weights and optimizer stay as they are (a collective).

        Raises:
            LayoutError: the layout has no such gradient.
        """
        config = self.decoders[0].config
        refuse_noise({"the probe": 0.0}, self.layout, config.n_experts > 0)
        device, embedding = self.world.device, self.decoders[0].embedding
        assert embedding is not None
        shape = (*tokens_BT.shape, config.d_model)
        leaf_BTD = torch.zeros(shape, device=device, requires_grad=True)
        embedding.added = lambda x_BTD: x_BTD + leaf_BTD.to(x_BTD.dtype)
        try:
            with torch.enable_grad():
                self._synchronise(last=True)
                on_device = (torch.from_numpy(array).to(device) for array in (tokens_BT, labels_BT))
                self._loss((*on_device, None)).objective.backward()
        finally:
            embedding.added = None
            self.optimizer.zero_grad(set_to_none=True)
        gradient = leaf_BTD.grad
        found = torch.zeros(shape) if gradient is None else gradient
        return found.float().cpu().numpy()


@contextmanager
def _added(decoder: Decoder, noises: Sequence[Noise], device: torch.device) -> Iterator[None]:
    """Let the embedding add some noise to the rows that have it."""
    embedding = decoder.embedding
    if not noises or embedding is None:
        yield
        return
    width = decoder.config.d_model
    values = [torch.from_numpy(one.values(width)).to(device) for one in noises]

    def add(x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.clone()
        for one, noise_LD in zip(noises, values, strict=True):
            x_BTD[one.row, one.offset : one.offset + len(noise_LD)] += noise_LD.to(x_BTD.dtype)
        return x_BTD

    embedding.added = add
    try:
        yield
    finally:
        embedding.added = None
