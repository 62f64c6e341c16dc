"""B continuous lanes of token ids, in memory or streamed.

A text of N tokens is cut into B lanes of n = N // B tokens: lane b holds tokens [b n, (b + 1) n). `HeldLanes` cuts the
whole text so. `StreamedLanes` reads the text in blocks of B times `RUN` tokens, cuts each block so, and joins the blocks'
lanes end to end: every lane is a sequence of runs of text, and memory is that of two blocks. Both leave out the fewer
than B tokens that remain at the end.

Legend: B = lanes, n = tokens in a lane.
"""

from __future__ import annotations

import sys
import zlib
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dni_seq.streams.documents import DataError, Documents, Position, Reader
from dni_seq.streams.tokens import Tokenizer

RUN = 1 << 14
"""Tokens of running text that a lane takes out of each streamed block."""

PIECE = 1 << 16
"""Characters after which joined documents are tokenized; one call for many short lines is much faster."""

Ids = npt.NDArray[Any]


class Tally(NamedTuple):
    """What has been read of a text.

    Attributes:
        tokens: their number.
        characters: the characters they stand for.
        unknown: how many of the tokens were not in the vocabulary.
    """

    tokens: int = 0
    characters: int = 0
    unknown: int = 0


class Lanes(ABC):
    """B lanes of one epoch, read from the front.

    Attributes:
        count: B.
        length: n, the tokens in a lane, or None where it is not known before the end.
    """

    count: int
    length: int | None

    @property
    @abstractmethod
    def tally(self) -> Tally:
        """What has been read from the documents so far; a streamed text is counted again in each epoch."""

    @abstractmethod
    def peek(self, tokens: int) -> Ids:
        """The next `tokens` (2 or more) tokens of every lane, or what is left of the epoch; [at most tokens, B].

        Raises:
            DataError: fewer than 2 are left, which happens only where the whole text has fewer.
        """

    @abstractmethod
    def advance(self, tokens: int) -> None:
        """Move on by `tokens`, no more than `peek` has shown."""

    @abstractmethod
    def rewind(self) -> None:
        """Go back to the start of the text."""

    @abstractmethod
    def position(self) -> Position:
        """Where the lanes stand; JSON can hold it."""

    @abstractmethod
    def seek(self, position: Position) -> None:
        """Go to a position of lanes over the same text, with the same tokenizer and B.

        Raises:
            DataError: the text or the tokenizer is another one.
        """


class HeldLanes(Lanes):
    """Lanes of a finite text, held as uint16 or int32 ids.

    Raises:
        DataError: the text has fewer than two tokens a lane.
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer, count: int) -> None:
        self.count, self._name = count, documents.name
        run = _TokenRun(documents.read(), tokenizer, Tally())
        ids = run.take(None)
        self._tally = run.tally
        self.length = len(ids) // count
        if self.length < 2:
            raise _too_short(self._name, count)
        # Time-major, so that a window is one piece of memory.
        self._ids = np.ascontiguousarray(ids[: self.length * count].reshape(count, self.length).T)
        self._checksum = _checksum(self._ids)
        self._at = 0

    @property
    def tally(self) -> Tally:
        """What the whole text holds."""
        return self._tally

    def peek(self, tokens: int) -> Ids:
        """The next tokens; a view."""
        return self._ids[self._at : self._at + tokens]

    def advance(self, tokens: int) -> None:
        """Move on by `tokens`."""
        self._at += tokens

    def rewind(self) -> None:
        """Go back to the start of the text."""
        self._at = 0

    def position(self) -> Position:
        """Tokens passed in each lane, and the text's checksum."""
        return {"at": self._at, "checksum": self._checksum}

    def seek(self, position: Position) -> None:
        """Go to a position in the same text."""
        _check_same(self._name, position, self._checksum)
        self._at = position["at"]


class _Block(NamedTuple):
    """A block in the buffer: where its text starts, its checksum, and its length in tokens a lane."""

    mark: Position
    checksum: int
    length: int


class StreamedLanes(Lanes):
    """Lanes of a text that is too large to hold or has no end.

    Memory is that of two blocks and of the longest document.

    Raises:
        DataError: the text has fewer than two tokens a lane.
    """

    length = None
    _run: _TokenRun
    _start: Position  # of the text that `_run` was to read when the buffer was empty
    _buffer: Ids  # [tokens, B]
    _blocks: deque[_Block]
    _at: int

    def __init__(self, documents: Documents, tokenizer: Tokenizer, count: int) -> None:
        self.count = count
        self._documents, self._tokenizer = documents, tokenizer
        self._restart(_TokenRun(documents.read(), tokenizer, Tally()))
        self.peek(2)

    @property
    def tally(self) -> Tally:
        """What has been read of the text, in all epochs."""
        return self._run.tally

    def peek(self, tokens: int) -> Ids:
        """The next tokens; a view."""
        while len(self._buffer) - self._at < tokens and self._read_block():
            pass
        shown = self._buffer[self._at : self._at + tokens]
        if len(shown) < 2:
            raise _too_short(self._documents.name, self.count)
        return shown

    def advance(self, tokens: int) -> None:
        """Move on by `tokens`, and drop blocks that are behind."""
        self._at += tokens
        while len(self._blocks) > 1 and self._at >= self._blocks[0].length:
            length = self._blocks.popleft().length
            self._buffer, self._at = self._buffer[length:], self._at - length

    def rewind(self) -> None:
        """Read the text again from its start."""
        self._restart(_TokenRun(self._documents.read(), self._tokenizer, self.tally))

    def position(self) -> Position:
        """Where the first block of the buffer starts, and how far its lanes have been read."""
        if not self._blocks:
            return {**self._start, "at": self._at, "checksum": None}
        block = self._blocks[0]
        return {**block.mark, "at": self._at, "checksum": block.checksum}

    def seek(self, position: Position) -> None:
        """Read the block of a position again, and go on in it."""
        documents = self._documents.read(position["documents"])
        run = _TokenRun(documents, self._tokenizer, Tally(*position["tally"]))
        run.take(position["skip"])
        self._restart(run)
        if position["checksum"] is not None:
            checksum = self._blocks[0].checksum if self._read_block() else None
            _check_same(self._documents.name, position, checksum)
        self._at = position["at"]

    def _restart(self, run: _TokenRun) -> None:
        """Read from `run` into an empty buffer."""
        self._run, self._start = run, run.mark()
        self._buffer = np.zeros((0, self.count), _compact(self._tokenizer))
        self._blocks = deque()
        self._at = 0

    def _read_block(self) -> bool:
        """Add a block to the buffer; False at the end of the text."""
        mark = self._run.mark()
        ids = self._run.take(self.count * RUN)
        length = len(ids) // self.count
        if length == 0:
            return False
        lanes = ids[: length * self.count].reshape(self.count, length).T
        self._blocks.append(_Block(mark, _checksum(ids), length))
        self._buffer = np.concatenate([self._buffer, lanes])
        return True


class _TokenRun:
    """The tokens of documents as one run, read piece by piece."""

    def __init__(self, reader: Reader, tokenizer: Tokenizer, tally: Tally) -> None:
        self.tally = tally
        self._reader, self._tokenizer = reader, tokenizer
        self._piece: Ids = np.zeros(0, _compact(tokenizer))
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
        return {"documents": self._reader.position(), "tally": list(self.tally)}

    def _read_piece(self) -> bool:
        """Tokenize the next documents; False at the end."""
        self._piece_start = self._here()
        texts, characters = [], 0
        for text in self._reader:
            texts.append(text)
            characters += len(text)
            if characters >= PIECE:
                break
        if not texts:
            return False
        ids = self._tokenizer.lookup("".join(texts))
        tokens, seen, unknown = self.tally
        self.tally = Tally(tokens + len(ids), seen + characters, unknown + int(np.count_nonzero(ids < 0)))
        self._piece = np.maximum(ids, self._tokenizer.unknown_id).astype(self._piece.dtype)
        self._taken = 0
        return True


def open_lanes(documents: Documents, tokenizer: Tokenizer, count: int) -> Lanes:
    """B = `count` lanes, held in memory where the documents are small, else streamed.

    Raises:
        DataError: the text has fewer than two tokens a lane.
    """
    return (HeldLanes if documents.small else StreamedLanes)(documents, tokenizer, count)


def _compact(tokenizer: Tokenizer) -> type[np.uint16] | type[np.int32]:
    """The smallest of the two types that holds the tokenizer's ids."""
    return np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.int32


def _checksum(ids: Ids) -> int:
    """Tells one text's tokens from another's."""
    return zlib.crc32(ids.tobytes())


def _too_short(name: str, lanes: int) -> DataError:
    """A lane needs one token to read and one to predict."""
    return DataError(
        f"{name} is too short: {lanes} lanes need {2 * lanes} tokens or more; give more text or fewer lanes (--batch-size)"
    )


def _check_same(name: str, position: Position, checksum: int | None) -> None:
    """A position means nothing in another text."""
    if position["checksum"] != checksum:
        raise DataError(f"{name} or its tokenizer has changed since the position was saved: resume with the same data")
