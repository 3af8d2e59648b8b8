"""The weights of a checkpoint, whole, in one process."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from motet.launcher.rank.safe_reader import SafeReader
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder


def stored_weights(folder: Path, config: ModelConfig, source: str) -> dict[str, torch.Tensor]:
    """Return the unsharded weights of a checkpoint's model, on the CPU; no collective.

    Args:
        folder: of the checkpoint, whose files were verified.
        source: "model", or "teacher" of a run that keeps one.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(config).named_parameters()}
    tensors = {f"{source}.{name}": torch.empty(shape) for name, shape in shapes.items()}
    with warnings.catch_warnings():  # that no process group is there is what we want
        warnings.simplefilter("ignore")
        dcp.load(dict(tensors), storage_reader=SafeReader(folder), no_dist=True)
    return {name.removeprefix(f"{source}."): tensor for name, tensor in tensors.items()}
