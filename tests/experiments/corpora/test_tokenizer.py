"""Tokenizers: round trips, the end-of-document token, loading what others saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import (
    EOD_TOKEN,
    LONGEST_WORD,
    Tokenizer,
    short_words,
    token_dtype,
    train_bpe,
)

TEXTS = ["def add(left, right):\n    return left + right\n" * 3, "Grüße aus Köln, 東京 🙂\n" * 3]
TOKENIZER = train_bpe(TEXTS, 300)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_decoding_gives_back_any_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.text(), max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_batch_encodes_like_single_texts(texts: list[str]) -> None:
    batch = TOKENIZER.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [TOKENIZER.encode(text) for text in texts]
    assert all(ids.dtype == np.uint16 for ids in batch)


def test_text_that_spells_the_eod_token_does_not_end_the_document() -> None:
    ids = TOKENIZER.encode(f"before {EOD_TOKEN} after")
    assert TOKENIZER.eod not in ids
    assert TOKENIZER.decode(ids) == f"before {EOD_TOKEN} after"


SPELLED = "</s>"


def spelling_tokenizer(kind: str, added: str) -> bytes:
    """A tokenizer.json whose vocabulary holds `</s>` as any other piece; `added` is "" or says how
    it is added besides.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers

    letters = ["a", "b", "<", "/", "s", ">"]
    pieces = ["[UNK]", SPELLED, *letters, "</", "s>", "bb", "##b"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("b", "b")]
    made: dict[str, Any] = {
        "bpe": lambda: models.BPE(ids, merges, unk_token="[UNK]"),
        "bpe-words": lambda: models.BPE(ids, merges[-1:], unk_token="[UNK]", ignore_merges=True),
        "unigram": lambda: models.Unigram([(p, -float(len(ids))) for p in pieces], unk_id=0),
        "words": lambda: models.WordLevel(ids, unk_token="[UNK]"),
        "wordpiece": lambda: models.WordPiece(ids, unk_token="[UNK]"),
    }
    inner = tokenizers.Tokenizer(made[kind]())
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if added:
        special = added == "special"
        token = tokenizers.AddedToken(SPELLED, special=special, normalized=not special)
        inner.add_special_tokens([token]) if special else inner.add_tokens([token])
        inner.add_tokens(["  "])  # its id follows, and stays
    return inner.to_str().encode()


@pytest.mark.parametrize("added", ["", "special", "plain"])
@pytest.mark.parametrize("kind", ["bpe", "bpe-words", "unigram", "words", "wordpiece"])
def test_no_text_ends_a_document_whatever_the_model_and_however_the_token_is_added(
    kind: str, added: str
) -> None:
    import tokenizers

    content = spelling_tokenizer(kind, added)
    theirs = tokenizers.Tokenizer.from_buffer(content)
    assert 1 in theirs.encode(f"a {SPELLED} bb").ids  # what happens without care
    ours = Tokenizer(content)
    assert (ours.eod, ours.eod_token) == (1, SPELLED)
    for text in (SPELLED, f"a {SPELLED} bb", f"a{SPELLED}{SPELLED}bb", f"bb {SPELLED * 30}"):
        (batch,), ((ids, _),) = ours.encode_batch([text]), ours.encode_with_ends([text])
        assert ours.encode(text) == batch.tolist() == ids.tolist()
        assert 1 not in batch.tolist()
    assert ours.encode("a bb a  b") == theirs.encode("a bb a  b").ids
    assert ours.decode([2, 1]) == theirs.decode([2, 1], skip_special_tokens=False)


def test_no_text_spells_another_control_token_that_the_model_knows() -> None:
    content = json.loads(spelling_tokenizer("unigram", "special"))
    content["model"]["vocab"].append(["<s>", -1.0])
    entry = content["added_tokens"][0]
    content["added_tokens"].append({**entry, "id": 12, "content": "<s>"})
    assert 12 not in Tokenizer(json.dumps(content).encode()).encode("a <s> b")


def test_a_tokenizer_whose_unknown_text_ends_documents_is_refused() -> None:
    content = json.loads(spelling_tokenizer("words", ""))
    content["model"]["unk_token"] = SPELLED
    tokenizer = Tokenizer(json.dumps(content).encode())
    assert tokenizer.encode("a bb") == [2, 10]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match=r"'</s>' for text that it does not know, as in 'a zz'"):
            encode("a zz")
    content["model"]["unk_token"] = "[NONE]"
    with pytest.raises(UserError, match="cannot encode a text"):
        Tokenizer(json.dumps(content).encode()).encode("a zz")


def test_a_tokenizer_ends_documents_with_the_id_that_is_asked_for(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300, reserved_tokens=["<|doc_end|>"])
    other = tokenizer.ending_with(1)
    assert (other.eod, other.eod_token) == (1, "<|doc_end|>")
    assert 1 not in other.encode("a<|doc_end|>b")
    assert Tokenizer.load(other.save(tmp_path)).eod == 1  # the files beside it name it too
    assert Tokenizer.load(tmp_path, eod=0).eod == 0
    with pytest.raises(UserError, match=r"eod=300 is no token of .*with ids up to 299"):
        tokenizer.ending_with(300)


def test_training_on_the_same_texts_gives_the_same_bytes_in_another_process() -> None:
    code = (
        "from motet.experiments.corpora.tokenizer import train_bpe\n"
        f"print(train_bpe({TEXTS!r}, 300).sha256)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == TOKENIZER.sha256


def test_reserved_tokens_follow_the_eod_token() -> None:
    tokenizer = train_bpe(TEXTS, 300, reserved_tokens=["<|user|>", "<|model|>"])
    assert tokenizer.eod == 0
    assert tokenizer.decode([0, 1, 2]) == f"{EOD_TOKEN}<|user|><|model|>"


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"vocabulary_size=200 is too small.*at least 257"):
        train_bpe(TEXTS, 200)


def test_a_saved_tokenizer_loads_with_the_same_digest_from_file_and_folder(tmp_path: Path) -> None:
    file = TOKENIZER.save(tmp_path)
    for path in (file, tmp_path):
        loaded = Tokenizer.load(path)
        assert (loaded.sha256, loaded.eod) == (TOKENIZER.sha256, TOKENIZER.eod)
        assert loaded.vocabulary_size == TOKENIZER.vocabulary_size


def test_a_saved_folder_loads_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == TOKENIZER.eod
    assert theirs(TEXTS[1], add_special_tokens=False)["input_ids"] == TOKENIZER.encode(TEXTS[1])


def test_the_eos_token_of_a_hugging_face_folder_is_found(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300, reserved_tokens=["<odd-end>"])
    tokenizer.save(tmp_path)
    config = {"eos_token": {"content": "<odd-end>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eod == 1
    assert Tokenizer.load(tmp_path, eod_token=EOD_TOKEN).eod == 0


def test_the_end_of_document_is_the_one_that_the_folders_files_name(tmp_path: Path) -> None:
    reserved = ["<|endoftext|>", "<|doc_end|>"]
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(TEXTS, 300, reserved).json_bytes)
    assert Tokenizer.load(tmp_path).eod_token == EOD_TOKEN  # nothing names one

    def named(file: str, content: object) -> str:
        (tmp_path / file).write_text(json.dumps(content))
        return Tokenizer.load(tmp_path / "tokenizer.json").eod_token

    assert named("config.json", {"eos_token_id": [1, 2]}) == "<|endoftext|>"
    assert named("generation_config.json", {"eos_token_id": 2}) == "<|doc_end|>"
    assert named("special_tokens_map.json", {"eos_token": "<|endoftext|>"}) == "<|endoftext|>"
    wrapped = {"eos_token": {"content": "<|doc_end|>", "special": True}}
    assert named("special_tokens_map.json", wrapped) == "<|doc_end|>"
    assert named("tokenizer_config.json", {"eos_token": None}) == "<|doc_end|>"
    assert named("tokenizer_config.json", {"eos_token": "<|endoftext|>"}) == "<|endoftext|>"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token":')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"special_tokens_map.json is damaged .*eod_token"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path, "<|doc_end|>").eod == 2


def test_post_processing_padding_and_truncation_of_a_loaded_tokenizer_are_ignored() -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_buffer(TOKENIZER.json_bytes)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOD_TOKEN} $A", special_tokens=[(EOD_TOKEN, 0)]
    )
    inner.enable_truncation(max_length=2)
    inner.enable_padding(length=64)
    loaded = Tokenizer(inner.to_str().encode())
    assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "is not a tokenizer.json"), ("no json", "is not a tokenizer.json")],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"{file} {message}"):
        Tokenizer.load(file)


def test_a_missing_tokenizer_and_an_unknown_eod_token_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"eod_token='<\|endofdok\|>'.*did you mean"):
        Tokenizer.load(TOKENIZER.save(tmp_path), eod_token="<|endofdok|>")


def test_ids_take_two_bytes_up_to_65536_tokens() -> None:
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


@pytest.mark.parametrize("word", ["a" * 400_000, "1" * 400_000, "-" * 400_000, " " * 400_000])
def test_a_tokenizer_is_trained_on_a_word_of_any_length_in_parts(word: str) -> None:
    parts = short_words(f"before {word} after")
    assert "".join(parts) == f"before {word} after"
    assert max(map(len, parts)) <= LONGEST_WORD + len("before  after")
    plain = "one two, three 456 -- and so on\n" * 200
    assert short_words(plain) == [plain], "what people write is left as it is"
    made = train_bpe([f"before {word} after"], 300)  # minutes, if it were taken as one word
    assert made.decode(made.encode(word)) == word
