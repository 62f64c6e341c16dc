"""Tokenizers: ids and back, vocabularies, files."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from dni_seq.streams import CharTokenizer, DataError, WordTokenizer, load_tokenizer, train_tokenizer
from dni_seq.streams import tokenization as tokens

LINES = ["the cat saw the dog\n", "a dog saw\n", "\n", "the end\n"]


def test_words_are_ordered_by_frequency_then_alphabet() -> None:
    tokenizer = train_tokenizer("word", LINES)
    assert tokenizer.vocabulary == ("<unk>", "<eos>", "the", "dog", "saw", "a", "cat", "end")
    assert tokenizer.encode("the dog\n\nend").tolist() == [2, 3, 1, 1, 7]


def test_characters_are_ordered_by_frequency_then_alphabet() -> None:
    tokenizer = train_tokenizer("char", ["bca\n", "ab\n", "a"])
    assert tokenizer.vocabulary == ("\ufffd", "a", "\n", "b", "c")
    assert tokenizer.encode("cab\n").tolist() == [4, 1, 3, 2]


@pytest.mark.parametrize("kind", ["word", "char"])
def test_order_of_documents_does_not_matter(kind: str) -> None:
    # Reversed, because a Counter keeps the order of first sight, which a stable sort would let through.
    assert train_tokenizer(kind, LINES).vocabulary == train_tokenizer(kind, LINES[::-1]).vocabulary


@pytest.mark.parametrize("kind", ["word", "char"])
def test_decode_inverts_encode(kind: str) -> None:
    tokenizer = train_tokenizer(kind, LINES)
    text = "".join(LINES)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.from_numpy(ids)) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.decode([]) == ""


def test_characters_survive_whatever_they_are() -> None:
    rng = random.Random(0)
    points = [0, 9, 13, 0x301, 0x5D0, 0x2028, 0xFEFF, 0x1F600, 0x10FFFF, *(rng.randrange(0xD800) for _ in range(500))]
    text = "".join(map(chr, points)) + "\ud800" + string.printable  # a lone surrogate too
    tokenizer = train_tokenizer("char", [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_words_and_characters_get_the_unknown_id() -> None:
    words, characters = train_tokenizer("word", LINES), train_tokenizer("char", LINES)
    assert words.lookup("the bird saw <unk>").tolist() == [2, -1, 4, 0]
    assert words.decode(words.encode("the bird")) == "the <unk>"
    # Both below and above the largest known code point.
    assert characters.lookup("z!é\U0010ffff").tolist() == [-1, -1, -1, -1]
    assert characters.decode(characters.encode("cat!é")) == "cat\ufffd\ufffd"


def test_the_text_s_own_unknown_word_is_the_unknown_token() -> None:
    tokenizer = train_tokenizer("word", ["a <unk> b\n"])
    assert tokenizer.vocabulary == ("<unk>", "<eos>", "a", "b")
    assert tokenizer.lookup("<unk>").tolist() == [tokenizer.unknown_id]


@pytest.mark.parametrize(("kind", "size", "last"), [("word", 4, "dog"), ("char", 5, "t")])
def test_vocabulary_size_is_a_limit(kind: str, size: int, last: str) -> None:
    text = LINES if kind == "word" else ["tttt", "e  eaadd", "\n\n\n\n\n\n   "]
    tokenizer = train_tokenizer(kind, text, size)
    assert tokenizer.vocabulary_size == size
    assert last in tokenizer.vocabulary
    assert train_tokenizer(kind, text, 10_000).vocabulary == train_tokenizer(kind, text).vocabulary


@pytest.mark.parametrize(("kind", "size"), [("word", 2), ("char", 1), ("word", 0), ("char", -5)])
def test_too_small_a_vocabulary_is_refused(kind: str, size: int) -> None:
    with pytest.raises(DataError, match="--vocab-size"):
        train_tokenizer(kind, LINES, size)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_vocabulary_is_made_of_a_bounded_sample(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SAMPLE_CHARACTERS", 6)

    def endless():
        yield "a b\n"
        while True:
            yield "c d\n"

    vocabulary = train_tokenizer(kind, endless()).vocabulary
    assert "c" in vocabulary
    assert "d" not in vocabulary


@pytest.mark.parametrize("kind", ["byte", ""])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="use word, char or sentencepiece"):
        train_tokenizer(kind, LINES)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_tokenizer_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(kind, [*LINES, "é \U0001f600 \ud800\n"])
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer)
    assert loaded.vocabulary == tokenizer.vocabulary
    assert loaded.encode("the é").tolist() == tokenizer.encode("the é").tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def garbage() -> dict[str, bytes]:
    def content(**changes: object) -> bytes:
        good = {"format": tokens.FORMAT, "kind": "word", "vocabulary": ["<unk>", "<eos>", "a"]}
        return json.dumps(good | changes).encode()

    return {
        "empty": b"",
        "binary": bytes(range(256)),
        "cut off": content()[:-5],
        "deep": b"[" * 100_000,
        "a number": b"1",
        "a list": b"[]",
        "another format": content(format="dni_seq tokenizer 2"),
        "another kind": content(kind="byte"),
        "kind of a list": content(kind=["word"]),
        "no vocabulary": content(vocabulary=None),
        "numbers": content(vocabulary=[1, 2]),
        "nothing in it": content(vocabulary=[]),
        "no unknown": content(vocabulary=["a", "<eos>"]),
        "doubled": content(vocabulary=["<unk>", "<eos>", "a", "a"]),
        "long characters": content(kind="char", vocabulary=["\ufffd", "ab"]),
        "empty character": content(kind="char", vocabulary=["\ufffd", ""]),
    }


@pytest.mark.parametrize("case", garbage())
def test_garbage_is_refused_with_the_file_s_name(case: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(garbage()[case])
    with pytest.raises(DataError, match=r"tokenizer\.json") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("tokenizer", [WordTokenizer.train(LINES), CharTokenizer.train(LINES)])
@pytest.mark.parametrize("wrong", [-1, 1000])
def test_ids_out_of_range_are_refused(tokenizer: WordTokenizer | CharTokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=str(wrong)):
        tokenizer.decode([0, wrong])
