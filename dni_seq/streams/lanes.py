"""B continuous lanes of token ids, in memory or streamed.

A text of N tokens is cut into B lanes of n = N // B tokens: lane b holds tokens [b n, (b + 1) n). `HeldLanes` cuts the
whole text this way. `StreamedLanes` reads the text in blocks of B equal passages, gives one passage to each lane, and joins
the passages of a lane end to end. Every lane is then a sequence of passages of the text, and memory holds four blocks. At
the end of the text both classes drop the tokens that do not fill all lanes equally, fewer than B.

Legend: T = window length in steps, B = lanes, n = tokens in a lane, m = lookahead in steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dni_seq.core.windows import Lookahead, Window
from dni_seq.streams.documents import Documents, Position, Reader
from dni_seq.streams.prefetch import Prefetcher, StoppableReader
from dni_seq.streams.token_streams import Ids, TextStats, TokenRun, check_same, checksum, compact, too_short
from dni_seq.streams.tokenization import Tokenizer

RUN = 1 << 14
"""Tokens of contiguous text that a lane takes from each streamed block. With more than BLOCK / RUN lanes, the number is
BLOCK // B, at least 1."""

BLOCK = 1 << 22
"""Largest number of tokens in a streamed block; with more lanes than this, a block has one token per lane."""


WINDOW = 1 << 26
"""Largest number of tokens in a window of a text that is not held in memory."""


def longest_window(lanes: int) -> int:
    """Returns the largest number of steps in a window of `lanes` lanes of a text that is not held in memory."""
    return max(1, WINDOW // lanes)


class Lanes(ABC):
    """B lanes of tokens that are read in order, epoch by epoch.

    Attributes:
        length: n, the number of tokens in a lane; None if it is not known before the end of the epoch.
    """

    length: int | None

    @property
    @abstractmethod
    def stats(self) -> TextStats:
        """Counts over the text read so far; a streamed text is counted again in each epoch."""

    def count_anew(self) -> None:  # noqa: B027 - text that is held in memory is counted once
        """Forgets the counts of text that is not held in memory; call `rewind` afterwards."""

    @abstractmethod
    def window(self, steps: int, lookahead: int) -> tuple[Window, bool]:
        """Returns the next window of at most `steps` steps, and whether the epoch ends with it.

        The window has a lookahead of `lookahead` steps if `lookahead` is above 0.

        Raises:
            DataError: the text cannot be read; the position does not change.
        """

    @abstractmethod
    def steps(self, limit: int) -> int:
        """Returns the number of steps left in a lane, at most `limit`; less if a longer window does not fit in memory.

        Raises:
            DataError: the text cannot be read; the position does not change.
        """

    @abstractmethod
    def rewind(self, epoch: int) -> None:
        """Moves to the start of an epoch, counted from 0."""

    @abstractmethod
    def position(self) -> Position:
        """Returns the position of the next window; JSON can hold it."""

    @abstractmethod
    def seek(self, position: Position, epoch: int) -> None:
        """Moves to a saved position in an epoch; text, tokenizer and B must be those with which it was saved.

        Raises:
            DataError: the text or the tokenizer differs; the lanes do not move.
        """


class RunningLanes(Lanes):
    """Lanes of equal length over continuous text: lanes do not end with documents."""

    @abstractmethod
    def peek(self, tokens: int) -> Ids:
        """Returns the next `tokens` (2 or more) tokens of every lane, or the rest of the epoch; [at most tokens, B].

        Raises:
            DataError: fewer than 2 tokens are left in a lane. This happens only if the whole text has fewer than 2 per lane.
        """

    @abstractmethod
    def advance(self, tokens: int) -> None:
        """Moves forward by `tokens` tokens in every lane, at most as many as `peek` has returned."""

    def steps(self, limit: int) -> int:
        """Returns the number of steps left in a lane, at most `limit`."""
        return min(limit, len(self.peek(limit + 1)) - 1)

    def window(self, steps: int, lookahead: int) -> tuple[Window, bool]:
        """Returns the next window and whether the epoch ends with it.

        The last window of an epoch holds the remaining steps, and all lanes end with it.
        """
        # One step after the window shows whether the epoch ends with it.
        tokens = self.peek(steps + max(lookahead, 1) + 1)
        ids = torch.from_numpy(tokens.astype(np.int64))  # [at most T + m + 1, B]
        left, lanes = len(ids) - 1, ids.shape[1]
        steps = min(steps, left)
        last = left == steps
        window = Window(
            inputs=ids[:steps],
            targets=ids[1 : steps + 1],
            ends=torch.ones(lanes, dtype=torch.bool) if last else None,
            lookahead=_look(ids[steps:], lookahead) if lookahead else None,
        )
        if not last:
            self.advance(steps)
        return window, last


class HeldLanes(RunningLanes):
    """Lanes of a finite text, held in memory as uint16 or int32 ids.

    Raises:
        DataError: the text has fewer than two tokens per lane.
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer, count: int) -> None:
        self._documents, self._tokenizer, self._count = documents, tokenizer, count
        self._ordered = documents.in_epoch(0)
        self._ids, self._stats = _hold(self._ordered, tokenizer, count)
        self.length = len(self._ids)
        self._checksum = checksum(self._ids)
        self._at = 0

    @property
    def stats(self) -> TextStats:
        """Counts over the whole text."""
        return self._stats

    def peek(self, tokens: int) -> Ids:
        """Returns the next tokens as a view."""
        return self._ids[self._at : self._at + tokens]

    def advance(self, tokens: int) -> None:
        """Moves forward by `tokens`."""
        self._at += tokens

    def rewind(self, epoch: int) -> None:
        """Moves to the start of an epoch's text; reads the text again if its order changes."""
        ordered = self._documents.in_epoch(epoch)
        if ordered is not self._ordered:
            self._ids, _ = _hold(ordered, self._tokenizer, self._count)
            self._ordered, self._checksum = ordered, checksum(self._ids)
        self._at = 0

    def position(self) -> Position:
        """Returns the number of tokens read in each lane, and the checksum of the text."""
        return {"at": self._at, "checksum": self._checksum}

    def seek(self, position: Position, epoch: int) -> None:
        """Moves to a position in the same text."""
        at, saved = position["at"], position["checksum"]
        ordered, ids = self._documents.in_epoch(epoch), self._ids
        if ordered is not self._ordered:
            ids, _ = _hold(ordered, self._tokenizer, self._count)
        check_same(self._documents.name, saved, checksum(ids))
        self._ordered, self._ids, self._checksum, self._at = ordered, ids, saved, at


def _hold(documents: Documents, tokenizer: Tokenizer, count: int) -> tuple[Ids, TextStats]:
    """Returns the lanes of a text, [n, B], and its counts."""
    run = TokenRun(documents.read(), tokenizer, TextStats())
    ids = run.take(None)
    length = len(ids) // count
    if length < 2:
        raise too_short(documents.name, count, 2 * count)
    # Time-major, so that a window is contiguous in memory.
    return np.ascontiguousarray(ids[: length * count].reshape(count, length).T), run.stats


class _TokenBlock(NamedTuple):
    """A block of a streamed text.

    Attributes:
        ids: [tokens per lane, B].
        checksum: checksum of the tokens read for the block.
        mark: position at which the block's text starts.
        stats: counts after the block.
    """

    ids: Ids
    checksum: int
    mark: Position
    stats: TextStats


class StreamedLanes(RunningLanes):
    """Lanes of a text that is too large for memory or endless; a thread reads and tokenizes the next block.

    Memory holds two blocks in use, two blocks that are being read, the longest piece of a document, and the buffers of the
    source.

    Raises:
        DataError: the text has fewer than two tokens per lane.
    """

    length = None
    _prefetched: Prefetcher[_TokenBlock]
    _start: Position  # where the text of the first block of `_prefetched` starts
    _buffer: Ids  # [tokens, B]
    _blocks: deque[_TokenBlock]
    _at: int

    def __init__(self, documents: Documents, tokenizer: Tokenizer, count: int) -> None:
        self._documents, self._tokenizer, self._count = documents, tokenizer, count
        self._stats = TextStats()
        self.rewind(0)
        self.peek(2)

    @property
    def stats(self) -> TextStats:
        """Counts over all blocks taken in all epochs."""
        return self._stats

    def count_anew(self) -> None:
        """Forgets the counts."""
        self._stats = TextStats()

    def peek(self, tokens: int) -> Ids:
        """Returns the next tokens as a view."""
        while len(self._buffer) - self._at < tokens and self._take_block():
            pass
        shown = self._buffer[self._at : self._at + tokens]
        if len(shown) < 2:
            raise too_short(self._documents.name, self._count, 2 * self._count)
        return shown

    def steps(self, limit: int) -> int:
        """Returns the number of steps left in a lane, at most `limit` and `longest_window`. Reads their blocks."""
        return super().steps(min(limit, longest_window(self._count)))

    def advance(self, tokens: int) -> None:
        """Moves forward by `tokens`, and drops blocks that are read to their end."""
        self._at += tokens
        while len(self._blocks) > 1 and self._at >= len(self._blocks[0].ids):
            length = len(self._blocks.popleft().ids)
            self._buffer, self._at = self._buffer[length:], self._at - length

    def rewind(self, epoch: int) -> None:
        """Starts reading an epoch's text from its start."""
        self._begin(*self._reading(self._documents.in_epoch(epoch).read(), self.stats, 0), self.stats)

    def position(self) -> Position:
        """Returns the start of the first block in the buffer, and the number of tokens read in its lanes."""
        if not self._blocks:
            return {**self._start, "at": self._at, "checksum": None}
        block = self._blocks[0]
        return {**block.mark, "at": self._at, "checksum": block.checksum}

    def seek(self, position: Position, epoch: int) -> None:
        """Reads the block of a position again, and resumes in it."""
        saved, at = position["checksum"], position["at"]
        reader = self._documents.in_epoch(epoch).read(position["documents"])
        stats = TextStats(*position["tally"])
        ahead, start = self._reading(reader, stats, position["skip"])
        block = None if saved is None else next(ahead, None)
        if saved is not None:
            check_same(self._documents.name, saved, block and block.checksum)
        self._begin(ahead, start, stats)
        if block is not None:
            self._add(block)
        self._at = at

    def _reading(self, reader: Reader, stats: TextStats, skip: int) -> tuple[Prefetcher[_TokenBlock], Position]:
        """Returns the blocks that a thread reads after skipping `skip` tokens, and the position at which they start."""
        source = StoppableReader(reader)
        run = TokenRun(source, self._tokenizer, stats)
        run.take(skip)
        start = run.mark()
        return Prefetcher(_blocks(run, self._count), source), start

    def _begin(self, ahead: Prefetcher[_TokenBlock], start: Position, stats: TextStats) -> None:
        """Empties the buffer and sets the source of its blocks."""
        self._prefetched, self._start, self._stats = ahead, start, stats
        self._buffer = np.zeros((0, self._count), compact(self._tokenizer))
        self._blocks = deque()
        self._at = 0

    def _take_block(self) -> bool:
        """Adds a block to the buffer; returns False at the end of the text."""
        block = next(self._prefetched, None)
        if block is not None:
            self._add(block)
        return block is not None

    def _add(self, block: _TokenBlock) -> None:
        self._blocks.append(block)
        self._buffer = np.concatenate([self._buffer, block.ids])
        self._stats = block.stats


def _blocks(run: TokenRun, count: int) -> Iterator[_TokenBlock]:
    """Yields the blocks of a text."""
    size = max(1, min(RUN, BLOCK // count)) * count
    while True:
        mark = run.mark()
        ids = run.take(size)
        length = len(ids) // count
        if length == 0:
            return
        lanes = ids[: length * count].reshape(count, length).T
        yield _TokenBlock(lanes, checksum(ids), mark, run.stats)


def _look(ids: Tensor, m: int) -> Lookahead:
    """Returns the lookahead of m steps from tokens [at most m + 1, B], the first of which is the lookahead's first input."""
    seen, lanes = len(ids) - 1, ids.shape[1]
    if seen >= m:
        return Lookahead(ids[:m], ids[1 : m + 1], torch.ones(m, lanes, dtype=torch.bool))
    inputs, targets = ids.new_zeros(2, m, lanes)
    inputs[:seen], targets[:seen] = ids[:seen], ids[1:]
    return Lookahead(inputs, targets, (torch.arange(m) < seen)[:, None].repeat(1, lanes))
