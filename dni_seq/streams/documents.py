"""Text as documents that are read in order, from any position.

A document is a piece of text that ends with a newline, so that joining documents never joins two words. A long document
is read in several pieces, so that one of any length takes little memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

Position = dict[str, Any]
"""Where a reader stands: a nest of dicts, lists, strings and integers that JSON can hold."""

LONGEST_PIECE = 1 << 17
"""Characters of a document after which it is cut, before a blank or line end where there is one."""


class DataError(ValueError):
    """Text that cannot be found, read or used; its message is one line that says what to change."""


class Piece(NamedTuple):
    """A part of a document, mostly the whole of it.

    Attributes:
        text: where `ends`, its last character is a newline.
        ends: whether the document ends with it.
    """

    text: str
    ends: bool


class Reader(ABC):
    """An iterator over the pieces of documents that knows where it stands."""

    def __iter__(self) -> Iterator[Piece]:
        return self

    @abstractmethod
    def __next__(self) -> Piece:
        """The next piece.

        Raises:
            DataError: the source failed.
        """

    @abstractmethod
    def position(self) -> Position:
        """The position of the next piece, to be given to `Documents.read`."""


class Documents(ABC):
    """The documents of one split; every reader is independent of the others. Iterating yields the pieces' texts.

    Attributes:
        name: what messages call them, such as "ptb/train".
        small: whether they are finite and their token ids may be held in memory.
    """

    def __init__(self, name: str, *, small: bool) -> None:
        self.name = name
        self.small = small

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in self.read())

    @abstractmethod
    def read(self, position: Position | None = None) -> Reader:
        """A reader that starts at `position`, or at the first document."""

    def in_epoch(self, epoch: int) -> Documents:
        """The documents in the order of an epoch, counted from 0; the same order in all of them unless shuffled."""
        return self


class WholeReader(Reader):
    """A reader over a source of whole documents, which it cuts where they are long."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._text: str | None = None
        self._before: Position = {}

    @abstractmethod
    def next_text(self) -> str:
        """The next document; StopIteration behind the last one."""

    @abstractmethod
    def here(self) -> Position:
        """The position of the next document, without an entry "offset"."""

    def __next__(self) -> Piece:
        if self._text is None:
            before = self.here()
            self._text, self._before = self.next_text(), before
        start, text = self._offset, self._text
        stop = _cut(text, start)
        if stop < len(text):
            self._offset = stop
            return Piece(text[start:stop], False)
        self._text, self._offset = None, 0
        return Piece(text[start:] if start else text, True)

    def position(self) -> Position:
        """That of the document, and the characters passed in it."""
        return {**(self.here() if self._text is None else self._before), "offset": self._offset}


def _cut(text: str, start: int) -> int:
    """Where the piece from `start` on ends: at a blank or newline, so that the next piece begins with it."""
    limit = start + LONGEST_PIECE
    if limit >= len(text):
        return len(text)
    at = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
    return limit if at < 0 else at


class ListedDocuments(Documents):
    """Documents that are at hand anyway, such as the embedded corpus."""

    def __init__(self, name: str, texts: Sequence[str]) -> None:
        super().__init__(name, small=True)
        self._texts = texts

    def read(self, position: Position | None = None) -> Reader:
        """A reader whose position is the index of the next document, and the characters passed in it."""
        return _ListReader(self._texts, **(position or {"index": 0, "offset": 0}))


class _ListReader(WholeReader):
    """Reads a list from an index on."""

    def __init__(self, texts: Sequence[str], index: int, offset: int) -> None:
        super().__init__(offset)
        self._texts, self._index = texts, index

    def next_text(self) -> str:
        if self._index >= len(self._texts):
            raise StopIteration
        self._index += 1
        return as_it_is(self._texts[self._index - 1])

    def here(self) -> Position:
        return {"index": self._index}


class PartOfDocuments(Documents):
    """A run of documents out of others.

    Args:
        name: what messages call it.
        whole: the others.
        start: position in `whole` at which the run begins, None for its start.
        skip: documents to pass behind `start`.
        count: how many documents the run has, None for all that follow.
        small: as in `Documents`.
    """

    def __init__(
        self, name: str, whole: Documents, *, start: Position | None, skip: int = 0, count: int | None, small: bool
    ) -> None:
        super().__init__(name, small=small)
        self._whole, self._start, self._skip, self._count = whole, start, skip, count

    def read(self, position: Position | None = None) -> Reader:
        """A reader over the part."""
        if position is not None:
            return _PartReader(self._whole.read(position["whole"]), position["left"])
        reader = self._whole.read(self._start)
        for _ in islice((piece for piece in reader if piece.ends), self._skip):
            pass
        return _PartReader(reader, self._count)


class _PartReader(Reader):
    """Reads a number of documents."""

    def __init__(self, reader: Reader, left: int | None) -> None:
        self._reader, self._left = reader, left

    def __next__(self) -> Piece:
        if self._left == 0:
            raise StopIteration
        piece = next(self._reader)
        if piece.ends and self._left is not None:
            self._left -= 1
        return piece

    def position(self) -> Position:
        return {"left": self._left, "whole": self._reader.position()}


class BytesOfDocuments(Documents):
    """The bytes [start, stop) of a text as UTF-8, as text8 and enwik8 are split; what is before them is read and dropped.

    A character that a border cuts belongs to neither side. The text ends with a newline of its own.
    """

    def __init__(self, name: str, whole: Documents, *, start: int, stop: int, small: bool) -> None:
        super().__init__(name, small=small)
        self._whole, self.start, self.stop = whole, start, stop

    def read(self, position: Position | None = None) -> Reader:
        """A reader over the range."""
        if position is None:
            return _BytesReader(self._whole.read(), 0, self.start, self.stop)
        return _BytesReader(self._whole.read(position["whole"]), position["passed"], self.start, self.stop)


class _BytesReader(Reader):
    """Counts the bytes of pieces, and shows those of a range."""

    def __init__(self, reader: Reader, passed: int, start: int, stop: int) -> None:
        self._reader, self._passed, self._start, self._stop = reader, passed, start, stop

    def __next__(self) -> Piece:
        while self._passed < self._stop:
            text, ends = next(self._reader)
            content = text.encode("utf-8", "surrogatepass")
            first, last = self._start - self._passed, self._stop - self._passed
            self._passed += len(content)
            if first <= 0 and last > len(content):
                return Piece(text, ends)
            if first < len(content):
                shown = content[max(first, 0) : last].decode("utf-8", "ignore")
                return Piece(as_it_is(shown), True) if last <= len(content) else Piece(shown, ends)
        raise StopIteration

    def position(self) -> Position:
        return {"passed": self._passed, "whole": self._reader.position()}


def as_it_is(text: str) -> str:
    """The text, with the newline that ends a document."""
    return text if text.endswith("\n") else text + "\n"


def stripped_line(text: str) -> str:
    """One line without the blanks around it, with its newline."""
    return text.strip() + "\n"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
