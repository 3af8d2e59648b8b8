"""A model that Motet did not build: what it is, how its probes are scored, and batches in the form
that it takes.

Any module serves whose forward takes `input_ids` [B, T] and returns an object with `.logits` [B, T,
V]. B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from motet.experiments.stream.stream import IGNORED_LABEL, Batch
from motet.models.loss import TIE

# Wrappers by name: accelerate and deepspeed need not be installed.
TRANSPARENT = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
COLLECTIVE = {"DeepSpeedEngine": "module", "FullyShardedDataParallel": "module"}
SIZES = {"n_layers": "num_hidden_layers", "d_model": "hidden_size", "vocabulary_size": "vocab_size"}
CHECK_TOKENS = 16


def unwrap(model: nn.Module, wrappers: dict[str, str] | None = None) -> nn.Module:
    """Return the module inside wrappers; by default inside all that are known."""
    wrappers = TRANSPARENT | COLLECTIVE if wrappers is None else wrappers
    while (name := wrappers.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its tokens."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return what the manifest says of the model: class, sizes that its configuration names,
    parameters.

    Parameters of ZeRO-3 and FSDP2 are counted whole; FSDP1 shows this process's flattened part
    only, so they stay unknown there.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    sizes = {ours: getattr(config, theirs, None) for ours, theirs in SIZES.items()}
    sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
    flattened = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    counted = {id(p): int(getattr(p, "ds_numel", p.numel())) for p in inner.parameters()}
    embeddings: set[int] = set()
    for find in ("get_input_embeddings", "get_output_embeddings"):
        found = getattr(inner, find)() if hasattr(inner, find) else None
        embeddings |= {id(p) for p in found.parameters()} if found is not None else set()
    return {
        "model": {"foreign": True, "name": type(inner).__name__, **sizes},
        "parameters": None if flattened else sum(counted.values()),
        "parameters_non_embedding": None
        if flattened
        else sum(n for p, n in counted.items() if p not in embeddings),
    }


def forward_takes(model: nn.Module, name: str) -> bool:
    """Return whether a model's forward has a parameter of that name."""
    return name in inspect.signature(unwrap(model).forward).parameters


def takes_label_count(model: nn.Module) -> bool:
    """Return whether the loss may be divided by a given count, `num_items_in_batch`; decided as
    transformers' Trainer does.
    """
    inner = unwrap(model)
    told = getattr(inner, "accepts_loss_kwargs", None)
    if told is not None:
        return bool(told)
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return a batch as Hugging Face models take it, int64 [B, T].

    Their loss shifts: `labels[t]` is the token *at* t, where the stream's label at t is the token
    *after* t; so labels move one to the right, and the masks with them. Where documents are masked,
    `position_ids` restart with each, which is how transformers is told where packed documents begin
    (`find_packed_sequence_indices` of its `masking_utils`).
    """
    labels_BT = np.full(batch.labels_BT.shape, IGNORED_LABEL, dtype=np.int64)
    labels_BT[:, 1:] = batch.labels_BT[:, :-1]
    found = {
        "input_ids": torch.from_numpy(batch.tokens_BT.astype(np.int64)),
        "labels": torch.from_numpy(labels_BT),
    }
    if batch.document_ids_BT is not None:
        found["position_ids"] = torch.from_numpy(positions(batch.document_ids_BT))
    return found


def positions(document_ids_BT: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return the position of each token in its document, int64 [B, T]; a document is a run of equal
    ids.
    """
    order_BT = np.broadcast_to(
        np.arange(document_ids_BT.shape[1], dtype=np.int64), document_ids_BT.shape
    )
    begins_BT = np.zeros(document_ids_BT.shape, dtype=bool)
    begins_BT[:, 1:] = np.diff(document_ids_BT, axis=1) != 0
    return order_BT - np.maximum.accumulate(np.where(begins_BT, order_BT, 0), axis=1)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate inside; training finds every mode and random state as it left them."""
    modes = [(module, module.training) for module in model.modules()]
    on_gpu = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(on_gpu), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module in model.modules():
                # FSDP2's root keeps its weights gathered after a forward pass without a backward
                # pass.
                reshard: Callable[[], None] | None = getattr(module, "reshard", None)
                if reshard is not None and hasattr(module, "unshard"):
                    reshard()


class Scorer:
    """What `ProbeSet.score` needs of an engine, over somebody else's model."""

    def __init__(self, model: nn.Module) -> None:
        # DDP and compilation add nothing to a probe; sharded models must be entered from outside,
        # on all ranks.
        self.model = unwrap(model, TRANSPARENT)
        self.device = device_of(model)
        self._extra = {"use_cache": False} if forward_takes(model, "use_cache") else {}

    def logits(self, tokens_BT: npt.NDArray[np.int64], **inputs: Tensor) -> Tensor:
        """Return [B, T, V] (a collective when the model is sharded)."""
        tokens = torch.from_numpy(tokens_BT).to(self.device)
        logits: Tensor = self.model(input_ids=tokens, **inputs, **self._extra).logits
        return logits

    def score(
        self, tokens_BT: npt.NDArray[np.int64], labels_BT: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Return log-probability (nats, computed in fp32) and greedy agreement of every label, [B,
        T]; 0 and True where it is -100.

        `labels_BT[b, t]` is the token after t, as everywhere in Motet.
        """
        logprob_BT = np.zeros(labels_BT.shape, dtype=np.float64)
        greedy_BT = np.ones(labels_BT.shape, dtype=bool)
        for row, logits_TV in enumerate(self.logits(tokens_BT)):
            wanted = np.flatnonzero(labels_BT[row] != IGNORED_LABEL)
            logits_NV = logits_TV[torch.from_numpy(wanted).to(self.device)].float()
            labels_N1 = torch.from_numpy(labels_BT[row, wanted]).to(self.device)[:, None]
            chosen_N = logits_NV.gather(1, labels_N1)[:, 0] - logits_NV.logsumexp(1)
            logprob_BT[row, wanted] = chosen_N.double().cpu().numpy()
            greedy_BT[row, wanted] = (logits_NV.argmax(1) == labels_N1[:, 0]).cpu().numpy()
        return logprob_BT, greedy_BT

    def likeliest(
        self, tokens_BT: npt.NDArray[np.int64], at_BK: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return the most likely token after each of the places `at_BK` of each row, int64 [B, K],
        the smallest of those whose logits are within `TIE`.
        """
        rows_B1 = torch.arange(len(at_BK), device=self.device)[:, None]
        at = torch.from_numpy(at_BK).to(self.device)
        logits_BKV = self.logits(tokens_BT)[rows_B1, at].float()
        near_BKV = logits_BKV >= logits_BKV.amax(-1, keepdim=True) - TIE
        return near_BKV.to(torch.uint8).argmax(-1).cpu().numpy()

    def finish_scoring(self) -> None:
        """Nothing: `untouched` puts everything back."""

    def mixes_documents(self) -> bool:
        """Return whether a token sees the document before its own, although positions restart
        between them (a collective).
        """
        tokens_BT = np.ones((1, CHECK_TOKENS), dtype=np.int64)
        half = CHECK_TOKENS // 2
        other_BT = tokens_BT.copy()
        other_BT[:, :half] = 2
        ids_BT = np.repeat([[0, 1]], half, axis=1).astype(np.int32)
        at = torch.from_numpy(positions(ids_BT)).to(self.device)
        if not forward_takes(self.model, "position_ids"):
            return True
        one, two = (self.logits(t, position_ids=at)[:, half:] for t in (tokens_BT, other_BT))
        return not torch.allclose(one.float(), two.float(), rtol=1e-3, atol=1e-4)
