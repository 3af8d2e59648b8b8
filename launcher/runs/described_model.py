"""The model that settings describe, before anything is built: reads no more than a manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.listed import SMALL_BYTES, refuse_altered
from motet.launcher.config.sections import RunSettings

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
        return imported_model(settings), True
    from motet.models.config import preset

    size = vocabulary_size(settings)
    overrides = settings.model.overrides() | {"vocabulary_size": size or UNKNOWN_VOCABULARY}
    return preset(settings.model.preset, **overrides), size is not None


def imported_model(settings: RunSettings) -> ModelConfig:
    """The sizes of the Hugging Face model that `model.from_hf` names, with what is set beside it.

    Raises:
        UserError: the folder has no config.json or weights that can be read, the sizes do not fit
            together, the corpus has ids that the model lacks, or is another tokenizer's.
    """
    from motet.models.config import problems
    from motet.models.hf_files import config_of_folder

    section = settings.model
    assert section.from_hf is not None
    begins = config_of_folder(Path(section.from_hf))
    # Where it grows, what is set beside it says into what; heads keep their channels.
    kept = {"head_dim": begins.head_width} if section.overrides() else {}
    config = replace(begins, **{**kept, **section.overrides()})
    raise_problems([Problem(f"model.{name}", why) for name, why in problems(config)])
    _check_corpora(settings, section.from_hf, config.vocabulary_size)
    return config


def _check_corpora(settings: RunSettings, folder: str, size: int) -> None:
    """Refuse corpora whose ids mean nothing, or something else, to a model of `size` tokens."""
    from motet.experiments.corpora.corpus import Corpus

    for number, entry in enumerate(settings.data.corpora):
        try:
            corpus = Corpus.open(Path(entry.path))
        except UserError:
            continue  # a plan needs no corpus, and training says what is wrong with it
        where = f"data.corpora[{number}].path={entry.path}"
        if corpus.vocabulary_size > size:
            raise UserError(
                f"{where}: its tokenizer has {corpus.vocabulary_size:,} tokens, more than the "
                f"{size:,} that the model in model.from_hf={folder} knows; prepare it with the "
                "model's tokenizer, or enlarge the model first (transformers: "
                "model.resize_token_embeddings)"
            )
        if corpus.tokenizer_path is not None and not settings.model.another_tokenizer:
            _check_tokenizer(where, corpus.tokenizer_path, folder)


def _check_tokenizer(where: str, path: Path, folder: str) -> None:
    """Refuse a tokenizer in which an id is another token than in the model's folder."""
    from motet.experiments.corpora.tokenizer import vocabulary_of

    theirs = Path(folder) / "tokenizer.json"
    if not theirs.exists() or theirs.read_bytes() == path.read_bytes():
        return
    ours, known = vocabulary_of(path), vocabulary_of(theirs)
    other = [number for number, token in ours.items() if known.get(number, token) != token]
    if other:
        first = min(other)
        raise UserError(
            f"{where}: its tokenizer is not that of model.from_hf={folder}: {len(other):,} of "
            f"{len(ours):,} ids are other tokens (id {first} is {ours[first]!r}, there "
            f"{known[first]!r}); prepare it with the model's tokenizer, or set "
            "model.another_tokenizer=true"
        )


def check_weights(settings: RunSettings, values: bool = True) -> None:
    """Refuse imported weights that are missing, cut short or not finite.

    Args:
        values: read all of them; else whether the files hold what they promise.
    """
    from motet.models.hf_files import check_finite, stored_tensors

    if settings.model.from_hf:
        folder = Path(settings.model.from_hf)
        most = None if values else SMALL_BYTES
        refuse_altered(folder, "model.from_hf", "export it again, or name another", most)
        found = stored_tensors(folder)
        if values:
            check_finite(found)
