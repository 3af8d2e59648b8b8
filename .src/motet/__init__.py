"""Motet: train a language model once and answer many questions with that one run."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Corpus": "motet.experiments.corpora.corpus",
    "Stream": "motet.experiments.stream.stream",
    "Plan": "motet.experiments.stream.exposure_plan",
    "Tokenizer": "motet.experiments.corpora.tokenizer",
    "UserError": "motet.core.errors",
    "ModelConfig": "motet.models.config",
    "Decoder": "motet.models.decoder",
    "RunDir": "motet.launcher.runs.rundir",
    "Guest": "motet.launcher.guest.guest",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import motet` stays instant."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'motet' has no attribute {name!r}")
