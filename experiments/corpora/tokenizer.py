"""Tokenizers: train a byte-level BPE, or load any `tokenizer.json` or Hugging Face folder.

Text is always encoded as text: a document that contains the characters `<|endofdoc|>` does not
end there, whatever kind of model the tokenizer is, and nothing (no begin-of-text token, no padding,
no truncation) is added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError, suggest
from motet.core.hashing import sha256_hex
from motet.core.parsing import parse_json
from motet.experiments.corpora.eos import configured_eos, configured_eos_id
from motet.experiments.corpora.unspellable import without_control_tokens

if TYPE_CHECKING:
    import tokenizers

EOD_TOKEN = "<|endofdoc|>"
LONGEST_WORD = 1000
"""Characters of a word that a tokenizer is trained on as a whole."""
_LONG_WORD = re.compile(
    "|".join(rf"{kind}{{{LONGEST_WORD}}}" for kind in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)
N_BYTE_TOKENS = 256  # a byte-level BPE starts from one token per byte
# What other tokenizers call the end of a document, in the order in which they are looked for.
COMMON_EOD_TOKENS = (EOD_TOKEN, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer:
    """Text to token ids and back; wraps one `tokenizers.Tokenizer` and remembers its exact
    bytes.
    """

    def __init__(
        self,
        json_bytes: bytes,
        eod_token: str | None = None,
        origin: str = "tokenizer",
        *,
        eod: int | None = None,
    ):
        """Make a tokenizer from the bytes of a `tokenizer.json`.

        The end-of-document token is the one with the id `eod`, or called `eod_token` (default: the
        first of `COMMON_EOD_TOKENS` in the vocabulary); `origin` names the file in errors. Raises
        `UserError` if the file or the token is unusable.
        """
        self._inner = _made(json_bytes, origin)
        self._origin = origin
        self.json_bytes = json_bytes
        self.sha256 = sha256_hex(json_bytes)
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocabulary_size: int = max(vocabulary.values()) + 1
        if eod is not None:
            eod_token = _token_of(eod, vocabulary, origin)
        self.eod_token: str = _find_eod_token(vocabulary, eod_token, origin)
        self.eod: int = vocabulary[self.eod_token]
        self._encoder = _made(without_control_tokens(json_bytes, self.eod_token), origin)

    def ending_with(self, eod: int) -> Tokenizer:
        """Return this tokenizer with the id `eod` as its end-of-document token.

        Raises `UserError` if no token has that id.
        """
        if eod == self.eod:
            return self
        return Tokenizer(self.json_bytes, origin=self._origin, eod=eod)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, None if the vocabulary lacks it."""
        number: int | None = self._inner.token_to_id(token)
        return number

    @cached_property
    def spells_bytes(self) -> bool:
        """Whether any text has at most one token a byte, and one more for a space before it: a
        byte-level BPE to which nothing is added before it is cut. No byte is unknown to it.
        """
        made = parse_json(self.json_bytes)
        cut = made.get("pre_tokenizer") or {}
        parts = cut.get("pretokenizers", [cut])
        byte_level = any(part.get("type") == "ByteLevel" for part in parts)
        return byte_level and made["model"].get("type") == "BPE" and not made.get("normalizer")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token."""
        ids: list[int] = self._encoded([text])[0].ids
        self._check_end(text, self.eod in ids)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return each text's ids as a uint16 array (uint32 when the vocabulary needs it).

        Runs on the `tokenizers` library's own threads; skips its character offsets, which cost
        time and are not needed. Raises `UserError` if the tokenizer cannot encode a text.
        """
        dtype = token_dtype(self.vocabulary_size)
        batch = [
            np.fromiter(encoding.ids, dtype, count=len(encoding))
            for encoding in self._encoded(texts)
        ]
        for text, ids in zip(texts, batch, strict=True):
            self._check_end(text, bool((ids == self.eod).any()))
        return batch

    def encode_with_ends(
        self, texts: Sequence[str]
    ) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Return each text's ids and, for every token, the character at which it ends
        (exclusive).
        """
        batch = [
            (
                np.asarray(encoding.ids, dtype=np.int64),
                np.asarray([end for _, end in encoding.offsets], dtype=np.int64),
            )
            for encoding in self._encoded(texts, offsets=True)
        ]
        for text, (ids, _) in zip(texts, batch, strict=True):
            self._check_end(text, bool((ids == self.eod).any()))
        return batch

    def _encoded(self, texts: Sequence[str], offsets: bool = False) -> list[Any]:
        """Return the library's encodings of `texts`, or raise `UserError`."""
        encode = self._encoder.encode_batch
        if not offsets:
            encode = getattr(self._encoder, "encode_batch_fast", encode)
        try:
            return list(encode(list(texts), add_special_tokens=False))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{self._origin} cannot encode a text: {error}") from error

    def _check_end(self, text: str, ends: bool) -> None:
        """Refuse a tokenizer that uses the end-of-document token for text."""
        if ends:
            raise UserError(
                f"{self._origin} uses its end-of-document token {self.eod_token!r} for text that "
                f"it does not know, as in {text[:40]!r}; name another with eod_token"
            )

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        """Return the text of `ids`; special tokens are written out, broken UTF-8 becomes U+FFFD."""
        text: str = self._inner.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def save(self, path: str | Path) -> Path:
        """Write the exact `tokenizer.json`, and beside it a `tokenizer_config.json` that names eod.

        `path` is the file, or a folder (made if missing). Returns the file's path. The folder
        loads with `transformers.AutoTokenizer`.
        """
        path = Path(path)
        if path.suffix != ".json":
            path = path / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.json_bytes)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eod_token}
        (path.parent / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        return path

    @classmethod
    def load(
        cls, path: str | Path, eod_token: str | None = None, *, eod: int | None = None
    ) -> Tokenizer:
        """Load a `tokenizer.json`, or a Hugging Face folder that holds one (or can be made one).

        The end-of-document token is `eod` (an id) or `eod_token`, else the `eos_token` of the
        folder's `tokenizer_config.json`, else of its `special_tokens_map.json`, else the
        `eos_token_id` of its `generation_config.json` or `config.json`, else the first of
        `COMMON_EOD_TOKENS`. Raises `UserError` naming the path.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"tokenizer {path} does not exist; give a tokenizer.json or its folder")
        file = path / "tokenizer.json" if path.is_dir() else path
        json_bytes = file.read_bytes() if file.exists() else _convert_slow_tokenizer(path)
        if eod is None and eod_token is None:
            eod_token = configured_eos(file.parent)
            eod = configured_eos_id(file.parent) if eod_token is None else None
        return cls(json_bytes, eod_token, str(file), eod=eod)


def train_bpe(
    texts: Iterable[str], vocabulary_size: int, reserved_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer) whose token 0 is `<|endofdoc|>`.

    `vocabulary_size` counts the eod token, `reserved_tokens` (ids 1, 2, ...), 256 bytes and the
    merges; a small sample of text may give fewer. The same texts in the same order give the same
    bytes; words longer than `LONGEST_WORD` are cut. Method: Sennrich et al. 2016
    (arXiv:1508.07909); bytes as in Radford et al. 2019.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special_tokens = [EOD_TOKEN, *reserved_tokens]
    fewest = smallest_vocabulary(len(reserved_tokens))
    if vocabulary_size < fewest:
        raise UserError(
            f"vocabulary_size={vocabulary_size} is too small: {N_BYTE_TOKENS} bytes and "
            f"{len(special_tokens)} special tokens need at least {fewest}"
        )
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((part for text in texts for part in short_words(text)), trainer)
    return Tokenizer(inner.to_str().encode(), EOD_TOKEN)


def short_words(text: str) -> list[str]:
    """Return text in parts, cut where one word (a run of letters, of digits, of other signs, or of
    spaces) is longer than anyone's: training on a word takes time with the square of its length.
    """
    if len(text) < LONGEST_WORD:
        return [text]
    ends = [match.end() for match in _LONG_WORD.finditer(text)]
    return [text[a:b] for a, b in pairwise([0, *ends, len(text)]) if a < b]


def smallest_vocabulary(n_reserved_tokens: int = 0) -> int:
    """Return the fewest tokens that a byte-level BPE can have: the bytes, eod and the reserved."""
    return N_BYTE_TOKENS + 1 + n_reserved_tokens


def vocabulary_of(path: Path) -> dict[int, str]:
    """Return the tokens of a `tokenizer.json` by id; `UserError` if it is none."""
    vocabulary = _made(path.read_bytes(), str(path)).get_vocab(with_added_tokens=True)
    return {number: token for token, number in vocabulary.items()}


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """Return the little-endian dtype that holds ids below `vocabulary_size`: uint16 or uint32."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def _made(json_bytes: bytes, origin: str) -> tokenizers.Tokenizer:
    """Return the library's tokenizer, which adds, cuts and fills nothing."""
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_buffer(json_bytes)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{origin} is not a tokenizer.json: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


def _token_of(eod: int, vocabulary: dict[str, int], origin: str) -> str:
    """Return the token with an id, or raise `UserError`."""
    for token, number in vocabulary.items():
        if number == eod:
            return token
    raise UserError(
        f"eod={eod} is no token of {origin}, which has {len(vocabulary):,} with ids up to "
        f"{max(vocabulary.values())}"
    )


def _find_eod_token(vocabulary: dict[str, int], wanted: str | None, origin: str) -> str:
    """Return the end-of-document token, or raise `UserError` saying how to name one."""
    if wanted is not None:
        if wanted in vocabulary:
            return wanted
        hint = suggest(wanted, (token for token in vocabulary if token.startswith("<")))
        raise UserError(f"eod_token={wanted!r} is not in the vocabulary of {origin}{hint}")
    for token in COMMON_EOD_TOKENS:
        if token in vocabulary:
            return token
    raise UserError(
        f"{origin} has none of the usual end-of-document tokens ({', '.join(COMMON_EOD_TOKENS)}); "
        "name one of its tokens with eod_token"
    )


def _convert_slow_tokenizer(folder: Path) -> bytes:
    """Return the `tokenizer.json` bytes of a folder that has only vocabulary and merge files."""
    problem = f"tokenizer {folder} holds no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"{problem}; converting it needs `pip install transformers`") from error
    try:
        fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        json_text: str = fast.backend_tokenizer.to_str()
    except Exception as error:  # whatever a foreign folder makes transformers raise
        raise UserError(f"{problem}, and transformers cannot convert it: {error}") from error
    return json_text.encode()
