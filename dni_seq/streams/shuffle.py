"""Shuffles documents in a new order for each epoch; a resumed run gets the same order.

Documents are read in blocks. Each block is permuted with its own random numbers, which depend on the seed, the epoch and the
block's number. A position is the start of a block and an index in it; moving there reads the block again.
"""

from __future__ import annotations

import numpy as np

from dni_seq.streams.documents import Documents, Piece, Position, Reader

BLOCK_DOCUMENTS = 10_000
"""Documents in a block of a streamed text."""

HELD_DOCUMENTS = 1_000_000
"""Documents in a block of a text that is held in memory, usually the whole text; bounds the memory for many short lines."""

BLOCK_CHARACTERS = 1 << 24
"""Characters after which a block of a streamed text ends early, with the document that reaches them."""


class ShuffledDocuments(Documents):
    """Documents in a random order that changes with each epoch.

    A text that is held in memory is shuffled in blocks of 1,000,000 documents, a streamed text in blocks of 10,000 documents
    or 2**24 characters, whichever comes first.

    Args:
        documents: the documents in their own order.
        seed: random seed; seed and epoch together determine the order.
        epoch: the epoch whose order is used, counted from 0.
    """

    def __init__(self, documents: Documents, seed: int, epoch: int = 0) -> None:
        super().__init__(documents.name, small=documents.small)
        self._documents, self._seed, self._epoch = documents, seed, epoch

    def in_epoch(self, epoch: int) -> Documents:
        """Returns the same documents in the order of `epoch`."""
        return ShuffledDocuments(self._documents, self._seed, epoch)

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader that starts at `position`; for None, at the start of the epoch that was given at construction.

        A position contains its epoch. The reader continues in the order of that epoch, even if this object has another one.
        """
        if position is None:
            return _ShuffledReader(self._documents.read(), self.small, self._seed, self._epoch, 0, 0)
        reader = self._documents.read(position["block"])
        return _ShuffledReader(reader, self.small, self._seed, position["epoch"], position["number"], position["taken"])


class _ShuffledReader(Reader):
    """Reads one block at a time and returns its pieces in the new order."""

    def __init__(self, reader: Reader, whole: bool, seed: int, epoch: int, number: int, taken: int) -> None:
        self._reader, self._whole = reader, whole
        self._seed, self._epoch, self._number, self._taken = seed, epoch, number, taken
        self._start = reader.position()
        self._pieces: list[Piece] | None = None

    def __next__(self) -> Piece:
        if self._pieces is None:
            self._pieces = self._read_block(self._number)
        if self._taken >= len(self._pieces):
            start = self._reader.position()
            following = self._read_block(self._number + 1)
            if not following:
                raise StopIteration
            self._start, self._pieces, self._taken = start, following, 0
            self._number += 1
        self._taken += 1
        return self._pieces[self._taken - 1]

    def position(self) -> Position:
        return {"block": self._start, "number": self._number, "taken": self._taken, "epoch": self._epoch}

    def _read_block(self, number: int) -> list[Piece]:
        """Reads and permutes the documents of block `number`; returns their pieces, an empty list at the end of the text."""
        block: list[list[Piece]] = [[]]
        most, characters = HELD_DOCUMENTS if self._whole else BLOCK_DOCUMENTS, 0
        for piece in self._reader:
            block[-1].append(piece)
            characters += len(piece.text)
            if not piece.ends:
                continue
            if len(block) >= most or (not self._whole and characters >= BLOCK_CHARACTERS):
                break
            block.append([])
        documents = [document for document in block if document]
        order = np.random.default_rng([self._seed, self._epoch, number]).permutation(len(documents))
        return [piece for index in order for piece in documents[index]]
