"""Tokenizers in which no text spells a control token.

A `tokenizer.json` gives control tokens in two ways that `encode_special_tokens` does not close:
an added token without `special` is cut out of every text, and a token of the model's own vocabulary
(Unigram, WordLevel, WordPiece; BPE by its merges or `ignore_merges`) is found like any other piece.
So the tokenizer that encodes has other names for these tokens, which no text holds. Their ids, and
those of all other tokens, stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from motet.core.hashing import sha256_hex
from motet.core.parsing import parse_json


def without_control_tokens(json_bytes: bytes, eod_token: str) -> bytes:
    """Return the `tokenizer.json` that encodes as `json_bytes` does, except control tokens.

    Control tokens are `eod_token` and every added token that is marked `special`; a text that
    spells one is encoded like other text. The model's token for unknown text stays, unless it is
    `eod_token`.
    """
    content = parse_json(json_bytes)
    model, added = content["model"], content.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special")}
    hidden = (special - {_unknown(model)}) | {eod_token}
    mark = sha256_hex(json_bytes)[:16]
    # A noncharacter of Unicode at both ends: no text that anybody wrote has such a name in it.
    names = {
        token: f"\U0010fffe{mark}.{number}\U0010fffe"
        for number, token in enumerate(sorted(hidden - {""}))
    }
    for token in added:
        if token["content"] in names:
            # The name must reach the library as it is, not changed by the normalizer.
            token.update(content=names[token["content"]], normalized=False)
    _rename(model, names)
    return json.dumps(content).encode()


def _unknown(model: Mapping[str, Any]) -> str | None:
    """Return the model's token for unknown text, if it has one."""
    vocabulary, unknown = model.get("vocab"), model.get("unk_id")
    if isinstance(vocabulary, list) and unknown is not None:
        return str(vocabulary[unknown][0])
    return model.get("unk_token")


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give tokens of the model's vocabulary other names; merges that use them go."""
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [piece, score], and the place is the id
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(token, token): id for token, id in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [merge for merge in model["merges"] if not _uses(merge, prefix, names)]


def _uses(merge: str | list[str], prefix: int, names: Mapping[str, str]) -> bool:
    """Return whether a merge has a renamed token on either side, or makes one."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right[prefix:] in names
