"""Documents as token ids: as one run of tokens, or document by document, with positions and a tally."""

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
"""Characters after which joined documents are tokenized; one call for many short lines is much faster."""

LONGEST_DOCUMENT = 1 << 20
"""Tokens after which, where documents are kept apart, a document is cut into several, so that it can be held."""

Ids = npt.NDArray[Any]


class TextStats(NamedTuple):
    """What has been read of a text.

    Attributes:
        tokens: their number.
        characters: the characters they stand for.
        unknown: how many of the tokens were not in the vocabulary.
        words: words between blanks, and line ends, as a word tokenizer counts them.
    """

    tokens: int = 0
    characters: int = 0
    unknown: int = 0
    words: int = 0


def compact(tokenizer: Tokenizer) -> type[np.uint16] | type[np.int32]:
    """The smallest of the two types that holds the tokenizer's ids."""
    return np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.int32


def checksum(ids: Ids, before: int = 0) -> int:
    """Tells one text's tokens from another's."""
    return zlib.crc32(ids.tobytes(), before)


def too_short(name: str, lanes: int, least: int) -> DataError:
    """A lane needs one token to read and one to predict."""
    return DataError(
        f"{name} is too short: {lanes} lanes need {least} tokens or more; give more text or fewer lanes (--batch-size)"
    )


def check_same(name: str, saved: int | None, found: int | None) -> None:
    """A position means nothing in another text.

    Raises:
        DataError: the checksums differ.
    """
    if saved != found:
        raise DataError(f"{name} or its tokenizer has changed since the position was saved: resume with the same data")


def tokenize(text: str, tokenizer: Tokenizer, stats: TextStats) -> tuple[Ids, TextStats]:
    """The ids of a text's tokens, and the tally behind it."""
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
    """The tokens of documents as one run, read part by part.

    Args:
        reader: the documents.
        tokenizer: makes their tokens.
        tally: of what is before them.
    """

    def __init__(self, reader: Reader, tokenizer: Tokenizer, stats: TextStats) -> None:
        self.stats = stats
        self._reader, self._tokenizer = reader, tokenizer
        self._piece: Ids = np.zeros(0, compact(tokenizer))
        self._taken = 0
        self._piece_start = self._here()

    def take(self, count: int | None) -> Ids:
        """The next `count` tokens, or all that are left where it is None or they are fewer."""
        parts = [self._piece[:0]]
        missing = sys.maxsize if count is None else count
        while missing > 0 and (self._taken < len(self._piece) or self._read_piece()):
            parts.append(self._piece[self._taken : self._taken + missing])
            self._taken += len(parts[-1])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def mark(self) -> Position:
        """Where the next token is: a position of the documents, the tokens to skip behind it, the tally there."""
        if self._taken == len(self._piece):
            return {**self._here(), "skip": 0}
        return {**self._piece_start, "skip": self._taken}

    def _here(self) -> Position:
        """Where the reader is."""
        return {"documents": self._reader.position(), "tally": list(self.stats)}

    def _read_piece(self) -> bool:
        """Tokenize the next documents; False at the end."""
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
        mark: where the document is: a position of the documents and the tally there.
        tally: behind it.
    """

    ids: Ids
    mark: Position
    stats: TextStats


def tokenized_documents(reader: Reader, tokenizer: Tokenizer, stats: TextStats) -> Iterator[list[TokenizedDocument]]:
    """The documents in which there is something to predict, in lists of about `PIECE` characters.

    A document of more than `LONGEST_DOCUMENT` tokens becomes several.
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
