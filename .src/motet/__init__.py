"""Motet: train a language model once and answer many questions with that one run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motet.core.errors import UserError as UserError
    from motet.experiments.corpora.corpus import Corpus as Corpus
    from motet.experiments.corpora.tokenizer import Tokenizer as Tokenizer
    from motet.experiments.design.experiment import Experiment as Experiment
    from motet.experiments.library.tried import TriedExperiment as TriedExperiment
    from motet.experiments.library.tried import try_experiment as try_experiment
    from motet.experiments.stream.exposure_plan import ExposurePlan as ExposurePlan
    from motet.experiments.stream.stream import Stream as Stream
    from motet.experiments.types import ItemScores as ItemScores
    from motet.experiments.types import ItemTable as ItemTable
    from motet.experiments.types import OutcomeSpec as OutcomeSpec
    from motet.experiments.types import ProbeItem as ProbeItem
    from motet.experiments.types import Unit as Unit
    from motet.experiments.types import generated_texts as generated_texts
    from motet.experiments.types import per_token as per_token
    from motet.launcher.guest.guest import Guest as Guest
    from motet.launcher.jobs.scheduler import Scheduler as Scheduler
    from motet.launcher.rank.hooks import Hook as Hook
    from motet.launcher.rank.hooks import HookContext as HookContext
    from motet.launcher.report.loaded import LoadedRun as LoadedRun
    from motet.launcher.report.loaded import LoadedRuns as LoadedRuns
    from motet.launcher.report.loaded import load as load
    from motet.launcher.report.loaded import load_runs as load_runs
    from motet.launcher.runs.rundir import RunDir as RunDir
    from motet.models.config import ModelConfig as ModelConfig
    from motet.models.decoder import Decoder as Decoder
    from motet.models.family.base import Family as Family
    from motet.models.member import Member as Member

    Plan = ExposurePlan

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
    "ExposurePlan": "motet.experiments.stream.exposure_plan",
    "ModelConfig": "motet.models.config",
    "Decoder": "motet.models.decoder",
    "Experiment": "motet.experiments.design.experiment",
    "Unit": "motet.experiments.types",
    "ProbeItem": "motet.experiments.types",
    "OutcomeSpec": "motet.experiments.types",
    "ItemScores": "motet.experiments.types",
    "ItemTable": "motet.experiments.types",
    "try_experiment": "motet.experiments.library.tried",
    "TriedExperiment": "motet.experiments.library.tried",
    "generated_texts": "motet.experiments.types",
    "per_token": "motet.experiments.types",
    "Hook": "motet.launcher.rank.hooks",
    "HookContext": "motet.launcher.rank.hooks",
    "Family": "motet.models.family.base",
    "Member": "motet.models.member",
    "Scheduler": "motet.launcher.jobs.scheduler",
}

# Names of before, which stay.
_ALIASES = {"Plan": "ExposurePlan"}

__all__ = ["__version__", *sorted([*_PUBLIC, *_ALIASES])]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import motet` stays instant."""
    known = _ALIASES.get(name, name)
    if known in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[known]), known)
    raise AttributeError(f"module 'motet' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names; those of the rooms are not part of what is promised."""
    return list(__all__)
