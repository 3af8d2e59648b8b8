"""Passages of a corpus as items of an experiment: some tokens of a document, drawn by chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.corpora.tokenizer import Tokenizer

DRAWS_PER_PASSAGE = 200


def passages(
    corpus: Corpus, tokenizer: Tokenizer, count: int, n_tokens: int, seed: int
) -> Iterator[dict[str, str | int]]:
    """Yield rows {id, text, document, position}: passages of about `n_tokens` tokens that share no
    token, are whole words of one document, and are found again by their own tokens.

    Args:
        count: how many.
        n_tokens: of each, before its ends are cut to whole words.
        seed: of the draw.

    Raises:
        UserError: the corpus has too few such passages.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    taken: list[tuple[int, int]] = []
    for _ in range(DRAWS_PER_PASSAGE * count):
        if len(taken) == count:
            return
        start = int(generator.integers(0, max(1, corpus.n_tokens - n_tokens)))
        document = corpus.document_at(start)
        if start + n_tokens >= corpus.document_span(document)[1]:
            continue
        if any(start < stop and begin < start + n_tokens for begin, stop in taken):
            continue
        text = _whole_words(corpus, tokenizer, start, n_tokens)
        if text is None:
            continue
        number = len(taken)
        taken.append((start, start + n_tokens))
        yield {"id": f"passage-{number:05d}", "text": text, "document": document, "position": start}
    if len(taken) < count:
        raise UserError(
            f"{corpus.path}: has {len(taken)} passages of {n_tokens} tokens within documents, not "
            f"{count}; ask for fewer, or for shorter ones"
        )


def searched_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
    """The tokens of each text after its first word, which is made of other tokens at the beginning
    of a document than after a space; none for a text of one word.
    """
    return tokenizer.encode_batch([text[max(text.find(" "), 0) :] for text in texts])


def _whole_words(corpus: Corpus, tokenizer: Tokenizer, start: int, n_tokens: int) -> str | None:
    """The whole words of some tokens, None where their tokens are not those of the corpus."""
    tokens = corpus.read(start, n_tokens)
    if (tokens == corpus.eod).any():
        return None
    words = tokenizer.decode(tokens).split(" ")[1:-1]
    text = " ".join(words).strip()
    if len(words) < 2 or "\ufffd" in text:
        return None
    again = searched_tokens(tokenizer, [text])[0]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), max(1, len(again)))
    return text if len(again) and (windows == again).all(axis=1).any() else None
