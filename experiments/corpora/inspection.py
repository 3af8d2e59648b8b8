"""What is in a corpus, as text."""

from __future__ import annotations

from dataclasses import dataclass

from motet.experiments.corpora.corpus import Corpus
from motet.experiments.corpora.eod_marks import END, TOLD
from motet.experiments.corpora.tokenizer import Tokenizer

TOKENS_SHOWN = 60


@dataclass(frozen=True)
class DocumentRow:
    """One document of a corpus."""

    ordinal: int
    id: str
    start: int  # position of its first token
    n_tokens: int  # its end-of-document token included
    text: str  # how it begins; its token ids when no tokenizer is known


@dataclass(frozen=True)
class Inspection:
    """Facts about a corpus and its first documents; `str` of it is for reading."""

    facts: list[tuple[str, str]]
    documents: list[DocumentRow]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        for row in self.documents:
            lines += ["", f"[{row.ordinal}] {row.id}  ({row.n_tokens:,} tokens from {row.start:,})"]
            lines += [f"    {line}" for line in row.text.splitlines()]
        return "\n".join(lines)


def inspect_corpus(corpus: Corpus, documents: int = 3, first: int = 0) -> Inspection:
    """Describe a corpus and `documents` of its documents, from ordinal `first` on."""
    tokenizer = load_tokenizer(corpus)
    stop = min(first + documents, corpus.n_documents)
    rows = [_row(corpus, ordinal, tokenizer) for ordinal in range(first, stop)]
    return Inspection(_facts(corpus), rows)


def load_tokenizer(corpus: Corpus) -> Tokenizer | None:
    """Return the corpus's own tokenizer, or None if it was indexed without one.

    It ends documents as the corpus does, whatever files beside the tokenizer say.

    Raises:
        UserError: it is not the one that the corpus was made with.
    """
    if corpus.tokenizer_path is None:
        return None
    corpus.check_tokenizer()
    return Tokenizer.load(corpus.tokenizer_path, eod=corpus.eod)


def _facts(corpus: Corpus) -> list[tuple[str, str]]:
    shards = corpus.manifest["shards"]
    n_bytes = sum(shard["n_bytes"] for shard in shards)
    ends = "every document ends with it" if corpus.eod_terminated else "not after every document"
    if corpus.eod_marks != END:
        ends = TOLD[corpus.eod_marks]
    return [
        ("corpus", str(corpus.path)),
        ("fingerprint", corpus.fingerprint),
        ("documents", f"{corpus.n_documents:,}"),
        ("tokens", f"{corpus.n_tokens:,}"),
        ("tokens per document", f"{corpus.n_tokens / corpus.n_documents:,.1f} on average"),
        ("shards", f"{len(shards)} ({n_bytes / 1e6:,.1f} MB of {corpus.dtype.name})"),
        ("vocabulary", f"{corpus.vocabulary_size:,} tokens"),
        ("end of document", f"{corpus.eod} {corpus.eod_token} ({ends})"),
        ("tokenizer", str(corpus.tokenizer_path or "not known")),
        *(("caution", caution) for caution in corpus.cautions),
    ]


def _row(corpus: Corpus, ordinal: int, tokenizer: Tokenizer | None) -> DocumentRow:
    start, stop = corpus.document_span(ordinal)
    ids = corpus.read(start, min(stop - start, TOKENS_SHOWN)).tolist()
    text = tokenizer.decode(ids) if tokenizer else " ".join(str(token) for token in ids)
    if stop - start > TOKENS_SHOWN:
        text += " ..."
    return DocumentRow(ordinal, corpus.document_id(ordinal), start, stop - start, text)
