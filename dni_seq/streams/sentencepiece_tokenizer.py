r"""SentencePiece tokenizer: word pieces that are learned from the text and can encode every text.

The encoding is lossless: no normalisation, spaces are kept, a newline is a token, and characters without a piece are encoded
as bytes. SentencePiece itself writes a space as U+2581 and confuses the two, so U+2581 in a text is escaped with a Unicode
noncharacter. Only lone surrogates are lost; they become "?".
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
"""Default size of the vocabulary; smaller if the text is too small for it."""

SEGMENT_CHARACTERS = 2000
"""Characters in a segment of text; the training sample is made of whole segments."""

SEGMENTS = 4000
"""Segments in the training sample (8 million characters), drawn from the first 2**26 characters (`sample`)."""

SAMPLE_SEED = 0
"""Seed of the sample; fixed, so that runs with different seeds have the same tokenizer."""

LONGEST = 1000
"""Longest part of a line, in characters; SentencePiece drops longer training lines. Cuts are before a space if possible."""

BLANK, ESCAPE = "\u2581", "\U0010fffe"


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer with a trained SentencePiece unigram model.

    Args:
        model: the serialized model.

    Raises:
        DataError: `model` is damaged or has no newline piece.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            size = self._processor.vocab_size()
        except RuntimeError as error:
            raise DataError(f"the SentencePiece model is damaged: {first_line(error)}") from error
        self._model = model
        self.vocabulary = tuple(self._processor.id_to_piece(index) for index in range(size))
        self._newline: int = self._processor.piece_to_id("\n")
        if self._newline == self.unknown_id:
            raise DataError("the SentencePiece model has no newline piece")

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> SentencePieceTokenizer:
        """Trains a tokenizer on a bounded sample of `documents`; the same text always gives the same tokenizer.

        Args:
            documents: the training text.
            vocab_size: exact size of the vocabulary. None for `VOCABULARY` entries, or fewer if the text is small.

        Raises:
            DataError: `vocab_size` is too small or too large for the text, or the text is empty.
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
        """Returns the ids [tokens] of pieces and newlines, int32; no token is unknown."""
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
        # The last line has no newline after it.
        return np.fromiter(chain.from_iterable(encoded), np.int32)[:-1]

    def decode(self, ids: Any) -> str:
        """Returns the text of `ids`.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        text: str = self._processor.decode(self.checked(ids))
        if ESCAPE not in text:
            return text
        return re.sub(f"{ESCAPE}([01])", lambda found: (ESCAPE, BLANK)[int(found[1])], text)

    def content(self) -> dict[str, Any]:
        """Returns the serialized model in base 64."""
        return {"model": base64.b64encode(self._model).decode("ascii")}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> SentencePieceTokenizer:
        """Returns the tokenizer made from the content of a tokenizer file.

        Raises:
            DataError: the content is not that of a SentencePiece tokenizer.
        """
        try:
            return cls(base64.b64decode(content["model"], validate=True))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the SentencePiece model is damaged: {first_line(error)}") from error


def _segments(documents: Iterable[str]) -> list[str]:
    """Returns a uniform sample of the text's segments, in text order; all segments if they are at most `SEGMENTS`."""
    draw = random.Random(SAMPLE_SEED)
    kept: list[tuple[int, str]] = []
    for number, segment in enumerate(_running_segments(sample(documents))):
        if len(kept) < SEGMENTS:
            kept.append((number, segment))
        elif (place := draw.randrange(number + 1)) < SEGMENTS:
            kept[place] = (number, segment)
    return [segment for _, segment in sorted(kept)]


def _running_segments(texts: Iterable[str]) -> Iterator[str]:
    """Yields segments of the joined texts."""
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
    """Cuts a line before spaces into parts of at most `LONGEST` characters; returns [""] for an empty line."""
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
    """Escapes U+2581 and replaces lone surrogates, which UTF-8 cannot encode."""
    if BLANK in text or ESCAPE in text:
        text = text.replace(ESCAPE, ESCAPE + "0").replace(BLANK, ESCAPE + "1")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text


def _advice(error: RuntimeError, vocab_size: int) -> str:
    """Returns the message for an error of SentencePiece's trainer."""
    text = " ".join(str(error).split())
    if most := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", text):
        return f"--vocab-size {vocab_size} is too large for --tokenizer sentencepiece on this text: use {most[1]} or less"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return f"--vocab-size {vocab_size} is too small for --tokenizer sentencepiece on this text: use {least[1]} or more"
    if "sentences_.empty()" in text:
        return "there is no text to train a SentencePiece tokenizer on: give a text with more than blank lines"
    return f"SentencePiece cannot be trained on this text ({first_line(error)}): change the text, or use another --tokenizer"
