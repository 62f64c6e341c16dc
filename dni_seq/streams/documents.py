"""Text as documents that are read in order, from any position.

A document is a text that ends with a newline, so joining documents never joins two words. A long document is read in
several pieces, so memory stays small.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

Position = dict[str, Any]
"""The position of a reader: a nest of dicts, lists, strings and integers that JSON can hold."""

LONGEST_PIECE = 1 << 17
"""Largest number of characters in a piece of a document; the cut is before a space or newline if there is one."""


_VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\u200b\ufeff]")
"""A character that is neither whitespace, a control character, a zero-width space nor a byte-order mark."""


class DataError(ValueError):
    """Raised if a text cannot be found, read or used; the message is one line that says what to change."""


class Piece(NamedTuple):
    """A part of a document, usually the whole document.

    Attributes:
        text: the characters; the last one is a newline if `ends` is True.
        ends: whether the document ends with this piece.
    """

    text: str
    ends: bool


class Reader(ABC):
    """An iterator over the pieces of documents whose position can be saved."""

    @property
    def skipped(self) -> int:
        """Number of rows that this reader has skipped because their text is null."""
        return 0

    def __iter__(self) -> Iterator[Piece]:
        return self

    @abstractmethod
    def __next__(self) -> Piece:
        """Returns the next piece.

        Raises:
            DataError: the source cannot be read.
        """

    @abstractmethod
    def position(self) -> Position:
        """Returns the position of the next piece; `Documents.read` resumes there."""


class Documents(ABC):
    """The documents of one split of a corpus, a base class. Iterating yields their text, a long document in several pieces.

    Readers are independent of each other.

    Attributes:
        name: name of the split in messages, such as "ptb/train".
        small: whether the text is finite and its token ids may be held in memory.
    """

    def __init__(self, name: str, *, small: bool) -> None:
        self.name = name
        self.small = small

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in self.read())

    @abstractmethod
    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader that starts at `position`, or at the first document if `position` is None.

        A reader yields pieces of text. `read(reader.position())` resumes at the next piece of `reader`.
        """

    def in_epoch(self, epoch: int) -> Documents:
        """Returns the documents in the order of an epoch, counted from 0. Only shuffled documents change their order."""
        return self


class WholeReader(Reader):
    """A reader over a source of whole documents; it cuts long documents into pieces."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._text: str | None = None
        self._before: Position = {}
        self._skipped = 0

    @property
    def skipped(self) -> int:
        """Number of rows that this reader has skipped because their text is null."""
        return self._skipped

    @abstractmethod
    def next_text(self) -> str:
        """Returns the next document; raises StopIteration after the last one."""

    @abstractmethod
    def here(self) -> Position:
        """Returns the position of the next document, without the entry "offset"."""

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
        """Returns the position of the current document and the number of characters read in it."""
        return {**(self.here() if self._text is None else self._before), "offset": self._offset}


def _cut(text: str, start: int) -> int:
    """Returns the end of the piece that starts at `start`.

    A piece has at most `LONGEST_PIECE` characters. If the rest of the text is longer, the piece ends before the last space
    or newline within this limit, or at the limit if there is none. The space or newline begins the next piece.
    """
    limit = start + LONGEST_PIECE
    if limit >= len(text):
        return len(text)
    at = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
    return limit if at < 0 else at


class ListedDocuments(Documents):
    """Documents that are held in memory, such as the embedded corpus."""

    def __init__(self, name: str, texts: Sequence[str]) -> None:
        super().__init__(name, small=True)
        self._texts = texts

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader; its position is the index of the next document and the characters read in it."""
        return _ListReader(self._texts, **(position or {"index": 0, "offset": 0}))


class _ListReader(WholeReader):
    """Reads a list of documents from an index."""

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
    """A contiguous part of other documents.

    Args:
        name: name of the part in messages.
        whole: the documents to take the part from.
        start: position in `whole` at which counting starts; None for the first document.
        skip: number of documents to skip after `start`.
        count: number of documents in the part; None for all documents that follow.
        small: as in `Documents`.
    """

    def __init__(
        self, name: str, whole: Documents, *, start: Position | None, skip: int = 0, count: int | None, small: bool
    ) -> None:
        super().__init__(name, small=small)
        self._whole, self._start, self._skip, self._count = whole, start, skip, count

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader over the part."""
        if position is not None:
            return _PartReader(self._whole.read(position["whole"]), position["left"])
        reader = self._whole.read(self._start)
        for _ in islice((piece for piece in reader if piece.ends), self._skip):
            pass
        return _PartReader(reader, self._count)


class _PartReader(Reader):
    """Reads a given number of documents."""

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


class CharactersOfDocuments(Documents):
    """The characters [start, stop) of a text. A newline is added at the end if there is none.

    Args:
        name: name of the part in messages.
        whole: the documents to take the part from.
        mark: a position in `whole` at or before `start`.
        passed: number of characters before `mark`.
        start: the first character of the part.
        stop: the first character after the part.
        small: as in `Documents`.
    """

    def __init__(
        self, name: str, whole: Documents, *, mark: Position, passed: int, start: int, stop: int, small: bool
    ) -> None:
        super().__init__(name, small=small)
        self._whole, self._mark, self._passed, self._start, self._stop = whole, mark, passed, start, stop

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader over the range."""
        position = position or {"passed": self._passed, "whole": self._mark}
        return _CharacterReader(self._whole.read(position["whole"]), position["passed"], self._start, self._stop)


class BytesOfDocuments(Documents):
    """The bytes [start, stop) of a text in UTF-8, which is how text8 and enwik8 are split.

    Bytes before `start` are read and dropped. A character that a border cuts belongs to neither side. A newline is added at
    the end if there is none.
    """

    def __init__(self, name: str, whole: Documents, *, start: int, stop: int, small: bool) -> None:
        super().__init__(name, small=small)
        self._whole, self.start, self.stop = whole, start, stop

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader over the range."""
        if position is None:
            return _ByteReader(self._whole.read(), 0, self.start, self.stop)
        return _ByteReader(self._whole.read(position["whole"]), position["passed"], self.start, self.stop)


Content = TypeVar("Content", str, bytes)


class _RangeReader(Reader, Generic[Content]):
    """Counts the units of pieces, such as characters, and returns the pieces, or parts of them, in a range of units."""

    def __init__(self, reader: Reader, passed: int, start: int, stop: int) -> None:
        self._reader, self._passed, self._start, self._stop = reader, passed, start, stop

    @abstractmethod
    def units(self, text: str) -> Content:
        """Returns the text as a sequence of units."""

    @abstractmethod
    def text(self, units: Content) -> str:
        """Returns the text of some units."""

    def __next__(self) -> Piece:
        while self._passed < self._stop:
            text, ends = next(self._reader)
            content = self.units(text)
            first, last = self._start - self._passed, self._stop - self._passed
            self._passed += len(content)
            if first <= 0 and last > len(content):
                return Piece(text, ends)
            if first < len(content):
                shown = self.text(content[max(first, 0) : last])
                return Piece(as_it_is(shown), True) if last <= len(content) else Piece(shown, ends)
        raise StopIteration

    def position(self) -> Position:
        return {"passed": self._passed, "whole": self._reader.position()}


class _CharacterReader(_RangeReader[str]):
    """Returns a range of characters."""

    def units(self, text: str) -> str:
        return text

    def text(self, units: str) -> str:
        return units


class _ByteReader(_RangeReader[bytes]):
    """Returns a range of bytes in UTF-8."""

    def units(self, text: str) -> bytes:
        return text.encode("utf-8", "surrogatepass")

    def text(self, units: bytes) -> str:
        return units.decode("utf-8", "ignore")


def check_visible(documents: Documents, advice: str) -> None:
    """Checks that a text has a visible character. Reads the text up to the first visible character.

    Raises:
        DataError: the text is empty, blank or of control characters, or cannot be read.
    """
    if not any(is_visible(text) for text in documents):
        raise DataError(f"{documents.name} has no visible character, only blanks or nothing: {advice}")


def is_visible(text: str) -> bool:
    """Returns whether a text has a visible character."""
    return _VISIBLE.search(text) is not None


def as_it_is(text: str) -> str:
    """Returns the text, and adds a newline at its end if there is none."""
    return text if text.endswith("\n") else text + "\n"


def stripped_line(text: str) -> str:
    """Returns a line without the whitespace around it, with a newline at its end."""
    return text.strip() + "\n"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
