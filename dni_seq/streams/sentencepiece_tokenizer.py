r"""SentencePiece: pieces of words, learned from the text, that can spell every text.

Lossless: no normalisation, blanks kept, a newline is a token, and what the pieces cannot spell is spelled in bytes.
SentencePiece itself writes a blank as U+2581 and so confuses the two; texts that hold U+2581 are escaped by a character
that Unicode reserves from use.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from dni_seq.streams.documents import DataError, first_line
from dni_seq.streams.tokenization import Ids, Tokenizer, sample

VOCABULARY = 8000
"""Entries of the vocabulary where nobody asks for another number; fewer where the text is too small for so many."""

SEGMENT_CHARACTERS = 2000
"""Characters of running text that the training sample takes or leaves as one."""

SEGMENTS = 4000
"""Segments in the training sample, 8 million characters; drawn from the first 64 Mi characters (`sample`)."""

SAMPLE_SEED = 0
"""The draw is the same in all runs, so that runs that differ in their seed share a tokenizer."""

LONGEST = 1000
"""Characters after which a line is cut, before a blank where there is one: SentencePiece drops longer training lines."""

BLANK, ESCAPE = "\u2581", "\U0010fffe"


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model, of its unigram kind.

    Args:
        model: the model's bytes.

    Raises:
        DataError: they are not a model's.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            size = self._processor.vocab_size()
        except RuntimeError as error:
            raise DataError(f"its SentencePiece model is damaged: {first_line(error)}") from error
        self._model = model
        self.vocabulary = tuple(self._processor.id_to_piece(index) for index in range(size))
        self._newline: int = self._processor.piece_to_id("\n")
        if self._newline == self.unknown_id:
            raise DataError("its SentencePiece model has no newline")

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> SentencePieceTokenizer:
        """The tokenizer of a bounded sample of `documents`, the same in every run on the same text.

        Raises:
            DataError: `vocab_size` does not suit the text, or there is no text.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        lines = (part for segment in _segments(documents) for line in segment.split("\n") for part in _parts(line) if part)
        try:
            SentencePieceTrainer.train(
                sentence_iterator=map(_escaped, lines),
                model_writer=model,
                vocab_size=vocab_size or VOCABULARY,
                hard_vocab_limit=vocab_size is not None,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                unk_id=cls.unknown_id,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise DataError(_advice(error, vocab_size or VOCABULARY)) from error
        return cls(model.getvalue())

    def lookup(self, text: str) -> Ids:
        """The ids of pieces and line ends; nothing is unknown; [tokens]."""
        parts: list[str] = []
        ends: list[bool] = []
        for line in _escaped(text).split("\n"):
            cut = _parts(line)
            parts += cut
            ends += [False] * (len(cut) - 1) + [True]
        encoded = self._processor.encode(parts, num_threads=1)
        newline = [self._newline]
        for ids, end in zip(encoded, ends, strict=True):
            if end:
                ids += newline
        # The last line has no newline behind it.
        return np.fromiter(chain.from_iterable(encoded), np.int32)[:-1]

    def decode(self, ids: Any) -> str:
        """The text of `ids`."""
        text: str = self._processor.decode(self.checked(ids))
        if ESCAPE not in text:
            return text
        return re.sub(f"{ESCAPE}([01])", lambda found: (ESCAPE, BLANK)[int(found[1])], text)

    def content(self) -> dict[str, Any]:
        """The model, in base 64."""
        return {"model": base64.b64encode(self._model).decode("ascii")}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> SentencePieceTokenizer:
        """The tokenizer of a file's content.

        Raises:
            DataError: it is not a tokenizer's.
        """
        try:
            return cls(base64.b64decode(content["model"], validate=True))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"its SentencePiece model is damaged: {first_line(error)}") from error


def _segments(documents: Iterable[str]) -> list[str]:
    """A uniform sample of the text's segments, in the order of the text; all of them where they are few."""
    draw = random.Random(SAMPLE_SEED)
    kept: list[tuple[int, str]] = []
    for number, segment in enumerate(_running_segments(sample(documents))):
        if len(kept) < SEGMENTS:
            kept.append((number, segment))
        elif (place := draw.randrange(number + 1)) < SEGMENTS:
            kept[place] = (number, segment)
    return [segment for _, segment in sorted(kept)]


def _running_segments(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined, and cut again into segments."""
    held: list[str] = []
    length = 0
    for text in texts:
        for start in range(0, len(text), SEGMENT_CHARACTERS):
            held.append(text[start : start + SEGMENT_CHARACTERS])
            length += len(held[-1])
            if length >= SEGMENT_CHARACTERS:
                yield "".join(held)
                held, length = [], 0
    if held:
        yield "".join(held)


def _parts(line: str) -> list[str]:
    """A line cut before blanks into parts that are not too long; [""] for an empty line."""
    if len(line) <= LONGEST:
        return [line]
    parts, start = [], 0
    while len(line) - start > LONGEST:
        blank = line.rfind(" ", start + 1, start + LONGEST)
        stop = blank if blank > 0 else start + LONGEST
        parts.append(line[start:stop])
        start = stop
    return [*parts, line[start:]]


def _escaped(text: str) -> str:
    """The text without U+2581 and lone surrogates, which have no UTF-8."""
    if BLANK in text or ESCAPE in text:
        text = text.replace(ESCAPE, ESCAPE + "0").replace(BLANK, ESCAPE + "1")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text


def _advice(error: RuntimeError, vocab_size: int) -> str:
    """What to do about an error of SentencePiece's trainer."""
    text = " ".join(str(error).split())
    if most := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", text):
        return (
            f"--vocab-size {vocab_size} is more than this text gives with --tokenizer sentencepiece: use at most {most[1]}"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return f"--vocab-size {vocab_size} is too small for --tokenizer sentencepiece on this text: use {least[1]} or more"
    if "sentences_.empty()" in text:
        return "there is no text to train a SentencePiece tokenizer on: give one with more than blank lines"
    return f"SentencePiece cannot be trained on this text: {first_line(error)}"
