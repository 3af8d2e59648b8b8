"""Tokenizers: round trips, the end-of-document token, loading what others saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import EOD_TOKEN, Tokenizer, token_dtype, train_bpe

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
