"""Motet: train a language model once and answer many questions with that one run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motet.core.errors import UserError as UserError
    from motet.experiments.corpora.corpus import Corpus as Corpus
    from motet.experiments.corpora.tokenizer import Tokenizer as Tokenizer
    from motet.experiments.stream.exposure_plan import Plan as Plan
    from motet.experiments.stream.stream import Stream as Stream
    from motet.launcher.guest.guest import Guest as Guest
    from motet.launcher.report.loaded import LoadedRun as LoadedRun
    from motet.launcher.report.loaded import LoadedRuns as LoadedRuns
    from motet.launcher.report.loaded import load as load
    from motet.launcher.report.loaded import load_runs as load_runs
    from motet.launcher.runs.rundir import RunDir as RunDir
    from motet.models.config import ModelConfig as ModelConfig
    from motet.models.decoder import Decoder as Decoder

__version__ = "0.1.0"

# In the order of docs/api.md, which `make docs` writes from their docstrings.
_PUBLIC = {
    "load": "motet.launcher.report.loaded",
    "load_runs": "motet.launcher.report.loaded",
    "LoadedRun": "motet.launcher.report.loaded",
    "LoadedRuns": "motet.launcher.report.loaded",
    "UserError": "motet.core.errors",
    "RunDir": "motet.launcher.runs.rundir",
    "Guest": "motet.launcher.guest.guest",
    "Corpus": "motet.experiments.corpora.corpus",
    "Tokenizer": "motet.experiments.corpora.tokenizer",
    "Stream": "motet.experiments.stream.stream",
    "Plan": "motet.experiments.stream.exposure_plan",
    "ModelConfig": "motet.models.config",
    "Decoder": "motet.models.decoder",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import motet` stays instant."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'motet' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names; those of the rooms are not part of what is promised."""
    return list(__all__)
