"""Documents as token ids: one continuous sequence of tokens, or document by document, with positions and counts."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dni_seq.streams.documents import DataError, Position, Reader
from dni_seq.streams.tokenization import Tokenizer

PIECE = 1 << 16
"""Characters of joined documents that are tokenized at once: one call for many short lines is faster than many calls."""

LONGEST_DOCUMENT = 1 << 20
"""Largest number of tokens in a document if lanes end with documents. Longer documents are cut, to fit in memory."""

Ids = npt.NDArray[Any]


class TextStats(NamedTuple):
    """Counts over the text read so far.

    Attributes:
        tokens: number of tokens.
        characters: number of characters.
        unknown: number of tokens that are not in the vocabulary.
        words: number of words between whitespace plus number of newlines, as a word tokenizer counts them.
    """

    tokens: int = 0
    characters: int = 0
    unknown: int = 0
    words: int = 0


def compact(tokenizer: Tokenizer) -> type[np.uint16] | type[np.int32]:
    """Returns np.uint16 if it holds all ids of the tokenizer, else np.int32."""
    return np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.int32


def checksum(ids: Ids, before: int = 0) -> int:
    """Returns a CRC-32 checksum of token ids, continued from the checksum `before`."""
    return zlib.crc32(ids.tobytes(), before)


def too_short(name: str, lanes: int, least: int) -> DataError:
    """Returns the error for a text with fewer than `least` tokens; a lane needs one token to read and one to predict."""
    return DataError(
        f"{name} is too short: {lanes} lanes need {least} tokens or more; give more text, or lower --batch-size (lanes)"
    )


def check_same(name: str, saved: int | None, found: int | None) -> None:
    """Raises a DataError if the checksum of the text has changed since a position was saved.

    Raises:
        DataError: the checksums differ.
    """
    if saved != found:
        raise DataError(
            f"{name} or its tokenizer has changed since the position was saved: resume with the same text and tokenizer"
        )


def tokenize(text: str, tokenizer: Tokenizer, stats: TextStats) -> tuple[Ids, TextStats]:
    """Returns the ids of a text's tokens, and the counts after it."""
    ids = tokenizer.lookup(text)
    words = len(ids) if tokenizer.kind == "word" else len(text.split()) + text.count("\n")
    after = TextStats(
        stats.tokens + len(ids),
        stats.characters + len(text),
        stats.unknown + int(np.count_nonzero(ids < 0)),
        stats.words + words,
    )
    return np.maximum(ids, tokenizer.unknown_id).astype(compact(tokenizer)), after


class TokenRun:
    """Reads the tokens of documents as one continuous sequence, part by part.

    Args:
        reader: reads the documents.
        tokenizer: converts the text of the documents to ids.
        stats: counts over the text before the reader's position.
    """

    def __init__(self, reader: Reader, tokenizer: Tokenizer, stats: TextStats) -> None:
        self.stats = stats
        self._reader, self._tokenizer = reader, tokenizer
        self._piece: Ids = np.zeros(0, compact(tokenizer))
        self._taken = 0
        self._piece_start = self._here()

    def take(self, count: int | None) -> Ids:
        """Returns the next `count` tokens, or all remaining tokens if `count` is None or fewer remain."""
        parts = [self._piece[:0]]
        missing = sys.maxsize if count is None else count
        while missing > 0 and (self._taken < len(self._piece) or self._read_piece()):
            parts.append(self._piece[self._taken : self._taken + missing])
            self._taken += len(parts[-1])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def mark(self) -> Position:
        """Returns the position of the next token: a position in the documents, its counts, and tokens to skip after it."""
        if self._taken == len(self._piece):
            return {**self._here(), "skip": 0}
        return {**self._piece_start, "skip": self._taken}

    def _here(self) -> Position:
        """Returns the position of the reader and the counts there."""
        return {"documents": self._reader.position(), "tally": list(self.stats)}

    def _read_piece(self) -> bool:
        """Tokenizes the next documents; returns False at the end of the text."""
        self._piece_start = self._here()
        texts, characters = [], 0
        for text, _ in self._reader:
            texts.append(text)
            characters += len(text)
            if characters >= PIECE:
                break
        if not texts:
            return False
        self._piece, self.stats = tokenize("".join(texts), self._tokenizer, self.stats)
        self._taken = 0
        return True


class TokenizedDocument(NamedTuple):
    """The tokens of one document.

    Attributes:
        ids: [tokens], two or more.
        mark: position of the document and the counts there.
        stats: counts after the document.
    """

    ids: Ids
    mark: Position
    stats: TextStats


def tokenized_documents(reader: Reader, tokenizer: Tokenizer, stats: TextStats) -> Iterator[list[TokenizedDocument]]:
    """Yields the documents of two or more tokens, in lists of about `PIECE` characters.

    A document of more than `LONGEST_DOCUMENT` tokens is cut into several.
    """
    batch: list[TokenizedDocument] = []
    parts: list[Ids] = []
    mark, characters = {}, 0
    while True:
        if not parts:
            mark = {"documents": reader.position(), "tally": list(stats)}
        piece = next(reader, None)
        if piece is None:
            break
        ids, stats = tokenize(piece.text, tokenizer, stats)
        parts.append(ids)
        characters += len(piece.text)
        if piece.ends or sum(map(len, parts)) >= LONGEST_DOCUMENT:
            document = np.concatenate(parts)
            parts = []
            if len(document) >= 2:
                batch.append(TokenizedDocument(document, mark, stats))
        if characters >= PIECE and batch:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
