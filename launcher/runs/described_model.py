"""The model that settings describe, before anything is built: reads no more than a manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import read_json
from motet.launcher.config.sections import ModelSettings, RunSettings

if TYPE_CHECKING:
    from motet.models.config import ModelConfig

UNKNOWN_VOCABULARY = 1 << 15


def vocabulary_size(settings: RunSettings) -> int | None:
    """Rows of the embedding: as set, or the first corpus's tokenizer rounded up to 64; None without
    a corpus.
    """
    if settings.model.vocabulary_size is not None:
        return settings.model.vocabulary_size
    from motet.experiments.corpora.corpus import Corpus

    try:
        return -(-Corpus.open(Path(settings.data.corpora[0].path)).vocabulary_size // 64) * 64
    except UserError:
        return None


def model_of(settings: RunSettings) -> tuple[ModelConfig, bool]:
    """The model's sizes, and whether its vocabulary is known."""
    if settings.model.from_hf is not None:
        return imported_model(settings.model), True
    from motet.models.config import preset

    size = vocabulary_size(settings)
    overrides = settings.model.overrides() | {"vocabulary_size": size or UNKNOWN_VOCABULARY}
    return preset(settings.model.preset, **overrides), size is not None


def imported_model(section: ModelSettings) -> ModelConfig:
    """The sizes of the Hugging Face model that `model.from_hf` names, with what is set beside it.

    Raises:
        UserError: the folder has no config.json that can be read, or the sizes do not fit together.
    """
    from motet.models.config import problems
    from motet.models.hf_config import config_from_hf

    assert section.from_hf is not None
    config = config_from_hf(read_json(Path(section.from_hf) / "config.json"))
    config = replace(config, **section.overrides())
    raise_problems([Problem(f"model.{name}", why) for name, why in problems(config)])
    return config
