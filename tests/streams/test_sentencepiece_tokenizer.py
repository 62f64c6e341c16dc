"""SentencePiece: lossless on any text, the same in every run, saved in one file, errors in one line."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest

from dni_seq.streams import DataError, WindowStream, load_tokenizer, open_corpus, train_tokenizer
from dni_seq.streams import sentencepiece_tokenizer as subwords
from dni_seq.streams import tokenization as tokens
from dni_seq.streams.documents import ListedDocuments
from dni_seq.streams.sentencepiece_tokenizer import BLANK, ESCAPE, LONGEST, SentencePieceTokenizer

LINES = [f"the cat number {i} saw  the dog, and\tthe end of {'many ' * (i % 4)}words\n" for i in range(300)]
TOKENIZER = SentencePieceTokenizer.train(LINES, 300)


def test_every_text_comes_back() -> None:
    draw = random.Random(0)
    special = [*f" \n\r{BLANK}{ESCAPE}01\0<>", "the ", "  "]
    for size in range(400):
        # Any code point but surrogates.
        points = (point + 0x800 * (point >= 0xD800) for point in (draw.randrange(0x10F800) for _ in range(size % 80)))
        text = "".join(draw.choice((chr(point), draw.choice(special))) for point in points)
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
        assert (TOKENIZER.lookup(text) > 0).all()


@pytest.mark.parametrize("text", ["<unk> <s> </s> <0x0A>", "a" * (3 * LONGEST), "word " * LONGEST, "\n\n", "", " x \r\n y "])
def test_special_texts_come_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_lone_surrogates_are_replaced() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"


def test_long_lines_are_cut_without_an_effect() -> None:
    line = "the cat saw the dog and " * 200
    whole = TOKENIZER._processor.encode(line)
    assert TOKENIZER.encode(line).tolist() == whole


def test_it_is_the_same_in_every_run_and_after_saving(tmp_path: Path) -> None:
    again = SentencePieceTokenizer.train(LINES, 300)
    assert again.vocabulary == TOKENIZER.vocabulary
    again.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.kind == "sentencepiece"
    assert loaded.vocabulary_size == 300
    text = "".join(LINES) + "\U0001f600"
    assert loaded.encode(text).tolist() == TOKENIZER.encode(text).tolist()


def test_the_sample_is_bounded_and_drawn_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subwords, "SEGMENTS", 30)
    monkeypatch.setattr(subwords, "SEGMENT_CHARACTERS", 100)
    monkeypatch.setattr(tokens, "SAMPLE_CHARACTERS", 50_000)

    def endless():
        number = 0
        while True:
            yield f"{number:09d}\n"
            number += 1

    segments = subwords._segments(endless())
    assert [len(segment) for segment in segments] == [100] * 30
    assert segments == sorted(segments)
    assert segments == subwords._segments(endless())
    firsts = [int(segment[:9]) for segment in segments]
    # 30 uniform draws out of 5,000 lines all miss a given third once in 100,000 times.
    assert min(firsts) < 1700
    assert 3300 < max(firsts) < 5000


@pytest.mark.parametrize(
    ("lines", "size", "complaint"),
    [
        (LINES, 100_000, "--vocab-size 100000 is too large .* use [0-9]+ or less"),
        (LINES, 3, "--vocab-size 3 is too small .* [0-9]+ or more"),
        (["\n", "\n"], None, "no text to train"),
    ],
)
def test_what_does_not_work_is_one_line(lines: list[str], size: int | None, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        train_tokenizer("sentencepiece", lines, size)
    assert "\n" not in str(caught.value)


def test_without_a_size_a_small_text_gives_what_it_can() -> None:
    assert 270 < train_tokenizer("sentencepiece", LINES).vocabulary_size < 8000


@pytest.mark.parametrize("model", [None, 3, "?", base64.b64encode(b"not a model").decode(), ""])
def test_damaged_files_are_refused(model: object, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"format": tokens.FORMAT, "kind": "sentencepiece", "model": model}))
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer file") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_bits_and_words_are_comparable_between_tokenizers() -> None:
    documents = ListedDocuments("test", [line.removesuffix("\n") for line in LINES])
    characters, words = sum(map(len, LINES)), sum(len(line.split()) + 1 for line in LINES)
    for kind in ("word", "char", "sentencepiece"):
        stream = WindowStream(documents, train_tokenizer(kind, documents), lanes=2, bptt=50)
        total = len(train_tokenizer(kind, documents).encode("".join(LINES)))
        assert stream.characters_per_token == characters / total
        assert stream.words_per_token == words / total
    assert WindowStream(documents, train_tokenizer("word", documents), lanes=1, bptt=9).words_per_token == 1


def test_the_embedded_corpus_is_spelled_in_fewer_tokens_than_characters() -> None:
    corpus = open_corpus()
    tokenizer = train_tokenizer("sentencepiece", corpus.train, 2000)
    stream = WindowStream(corpus.valid, tokenizer, lanes=2, bptt=50)
    assert 2 < stream.characters_per_token < 6
    text = "".join(corpus.valid)
    assert tokenizer.decode(tokenizer.encode(text)) == text
