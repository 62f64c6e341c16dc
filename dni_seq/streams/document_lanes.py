"""B lanes of whole documents: a lane ends with its document and then gets the next unread document.

In a lane a window never crosses the end of a document: the steps after the end are padding, where the mask is False. A
document of one token has nothing to predict and is skipped. Memory holds B documents of at most `LONGEST_DOCUMENT` tokens,
and the documents that are prefetched.

Legend: T = window length in steps, B = lanes, m = lookahead in steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dni_seq.core.windows import Lookahead, Window
from dni_seq.streams.documents import DataError, Documents, Position, Reader
from dni_seq.streams.lanes import Lanes, longest_window
from dni_seq.streams.prefetch import Prefetcher, StoppableReader
from dni_seq.streams.token_streams import (
    LONGEST_DOCUMENT,
    TextStats,
    TokenizedDocument,
    check_same,
    checksum,
    tokenized_documents,
    too_short,
)
from dni_seq.streams.tokenization import Tokenizer

MOST_LANES = 1 << 20
"""Largest number of lanes; each lane has its own document."""


@dataclass
class _DocumentQueue:
    """The document that a lane is reading.

    Attributes:
        document: tokens of the document.
        number: place of the document in the order of assignment to lanes. Document 0 is the first one of the epoch or, after
            `seek`, the oldest document that was in a lane at the restored position.
        at: number of tokens already read.
    """

    document: TokenizedDocument
    number: int
    at: int = 0

    @property
    def left(self) -> int:
        """Number of steps left to predict."""
        return len(self.document.ids) - 1 - self.at


class DocumentLanes(Lanes):
    """Lanes that end with each document; a thread reads and tokenizes the next documents.

    Raises:
        DataError: no document has two or more tokens, or there are more than `MOST_LANES` lanes.
    """

    length = None

    def __init__(self, documents: Documents, tokenizer: Tokenizer, count: int) -> None:
        if count > MOST_LANES:
            raise DataError(f"{count} lanes of documents are too many: lower --batch-size (lanes) to {MOST_LANES} or less")
        self._documents, self._tokenizer, self._count = documents, tokenizer, count
        self._stats = TextStats()
        self._lanes: list[_DocumentQueue | None] = []
        self._next: TokenizedDocument | None = None
        self.rewind(0)
        self._read_first()
        if self._next is None:
            raise too_short(documents.name, count, 2)

    @property
    def stats(self) -> TextStats:
        """Counts over all documents read in all epochs, including the next document to assign."""
        return self._stats if self._next is None else self._next.stats

    def count_anew(self) -> None:
        """Forgets the counts."""
        self._stats = TextStats()

    def window(self, steps: int, lookahead: int) -> tuple[Window, bool]:
        """Returns the next window and whether the epoch ends with it.

        The window is no longer than the longest rest of a document in a lane. Lanes without a document are masked, and
        their `ends` is True.
        """
        self._read_first()
        self._deal_all()
        lanes = self._lanes
        steps = min(steps, max(dealt.left for dealt in lanes if dealt))
        tokens = np.zeros((steps + lookahead + 1, self._count), np.int64)
        seen = np.zeros(self._count, np.int64)  # number of steps to predict in `tokens`, for each lane
        for lane, dealt in enumerate(lanes):
            if dealt is not None:
                shown = dealt.document.ids[dealt.at : dealt.at + steps + lookahead + 1]
                tokens[: len(shown), lane], seen[lane] = shown, len(shown) - 1
        ends = np.array([dealt is None or dealt.left <= steps for dealt in lanes])
        for lane, dealt in enumerate(lanes):
            if dealt is not None:
                dealt.at += steps
                if ends[lane]:
                    lanes[lane] = None
        last = self._next is None and all(ends)
        return _window(tokens, seen, ends, steps, lookahead), last

    def steps(self, limit: int) -> int:
        """Returns the largest number of steps that a document can have in a window, at most `limit`."""
        return min(limit, LONGEST_DOCUMENT, longest_window(self._count))

    def rewind(self, epoch: int) -> None:
        """Moves to the start of an epoch."""
        reader = self._documents.in_epoch(epoch).read()
        self._start = {"documents": reader.position(), "tally": list(self._stats)}
        self._begin(self._reading(reader, self._stats))

    def position(self) -> Position:
        """Returns where the oldest document in a lane starts, how many documents were assigned since, and the lanes' places.

        The place of a lane is its document, counted from the oldest one, and the number of tokens read; None if it is empty.
        """
        live = [dealt for dealt in self._lanes if dealt is not None]
        oldest = min(live, key=lambda dealt: dealt.number, default=None)
        if oldest is not None:
            mark, first = oldest.document.mark, oldest.number
        else:
            mark, first = (self._start if self._next is None else self._next.mark), self._number
        return {
            **mark,
            "dealt": self._number - first,
            "lanes": [None if dealt is None else [dealt.number - first, dealt.at] for dealt in self._lanes],
            "checksum": _checksum(live),
        }

    def seek(self, position: Position, epoch: int) -> None:
        """Reads the documents again from the oldest one, and resumes in each lane."""
        lanes, number, saved = position["lanes"], position["dealt"], position["checksum"]
        start = {"documents": position["documents"], "tally": position["tally"]}
        reader = self._documents.in_epoch(epoch).read(start["documents"])
        stats = TextStats(*start["tally"])
        documents = self._reading(reader, stats)
        wanted = {place[0] for place in lanes if place is not None}
        found: dict[int, TokenizedDocument] = {}
        for index in range(number):
            document = next(documents, None)
            if document is None:
                raise DataError(
                    f"{self._documents.name} has changed since the position was saved: resume with the same data"
                )
            stats = document.stats
            if index in wanted:
                found[index] = document
        dealt = [None if place is None else _DocumentQueue(found[place[0]], *place) for place in lanes]
        check_same(self._documents.name, saved, _checksum([each for each in dealt if each is not None]))
        self._start, self._stats = start, stats
        self._begin(documents)
        self._lanes, self._number = dealt, number

    def _reading(self, reader: Reader, stats: TextStats) -> Iterator[TokenizedDocument]:
        """Returns an iterator over the tokenized documents of `reader`, which a thread prefetches."""
        source = StoppableReader(reader)
        batches = Prefetcher(tokenized_documents(source, self._tokenizer, stats), source)
        return (document for batch in batches for document in batch)

    def _begin(self, documents: Iterator[TokenizedDocument]) -> None:
        """Empties the lanes and sets their source; nothing is read before the next window, because reading may fail."""
        self._source, self._next, self._number = documents, None, 0
        self._lanes = [None] * self._count
        self._begun = False

    def _read_first(self) -> None:
        """Reads the first document to assign if it is not read yet."""
        if not self._begun:
            self._next = next(self._source, None)
            self._begun = True

    def _deal_all(self) -> None:
        """Assigns the next document to each empty lane until no document is left."""
        for lane, dealt in enumerate(self._lanes):
            if dealt is not None or self._next is None:
                continue
            document = self._next
            following = next(self._source, None)
            self._lanes[lane] = _DocumentQueue(document, self._number)
            self._next, self._stats = following, document.stats
            self._number += 1


def _window(tokens: np.ndarray, seen: np.ndarray, ends: np.ndarray, steps: int, m: int) -> Window:
    """Returns the window of tokens [steps + m + 1, B]; `seen` [B] is the number of steps to predict in each lane."""
    ids = torch.from_numpy(tokens)
    counted = torch.arange(steps + m)[:, None] < torch.from_numpy(seen)
    inputs, targets = ids[:-1], ids[1:]
    mask = counted[:steps]
    return Window(
        inputs=inputs[:steps],
        targets=targets[:steps],
        mask=None if mask.all() else mask,
        ends=torch.from_numpy(ends) if ends.any() else None,
        lookahead=Lookahead(inputs[steps:], targets[steps:], counted[steps:]) if m else None,
    )


def _checksum(live: list[_DocumentQueue]) -> int:
    """Returns a checksum of the documents in the lanes."""
    value = 0
    for dealt in live:
        value = checksum(dealt.document.ids, value)
    return value
