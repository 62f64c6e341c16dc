"""An iterator that runs ahead in a thread, so that whoever takes its items seldom waits."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from dni_seq.streams.documents import Piece, Position, Reader

Item = TypeVar("Item")

EXIT_SECONDS = 5.0
"""How long the end of a thread is waited for."""


class StoppableReader(Reader):
    """A reader that ends early once it is stopped, from any thread."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._stopped = False

    def __next__(self) -> Piece:
        if self._stopped:
            raise StopIteration
        return next(self._reader)

    def position(self) -> Position:
        """That of the reader."""
        return self._reader.position()

    def stop(self) -> None:
        """No more pieces."""
        self._stopped = True


class Prefetcher(Generic[Item]):
    """The items of an iterator, one of them made ahead by a thread of its own.

    What the iterator raises is raised behind the items before it, and again at each further call. The thread ends with the
    iterator, at `close`, and when nobody holds this object any more.

    Args:
        items: the iterator.
        source: what it reads from; stopped where the rest is not wanted, so that the thread ends soon.
    """

    def __init__(self, items: Iterator[Item], source: StoppableReader) -> None:
        self._channel: _Channel[Item] = _Channel()
        # The thread must not hold `self`, or nothing would ever end it.
        thread = threading.Thread(target=_fill, args=(self._channel, items), name="dni_seq text", daemon=True)
        self._close = weakref.finalize(self, _end, self._channel, source, thread)
        thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return self._channel.get()

    def close(self) -> None:
        """End the thread."""
        self._close()


class _Channel(Generic[Item]):
    """Holds at most one item, and then how the iterator ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[Item] = deque()
        self._end: BaseException | None = None
        self._closed = False

    def put(self, item: Item) -> bool:
        """Add an item once there is room; False where nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._items)
            self._items.append(item)
            self._changed.notify_all()
            return not self._closed

    def end(self, reason: BaseException) -> None:
        """No items come any more."""
        with self._changed:
            self._end = reason
            self._changed.notify_all()

    def get(self) -> Item:
        """The next item, once it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._end)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            assert self._end is not None
            raise self._end

    def close(self) -> None:
        """Nobody takes items any more."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _end(channel: _Channel[Item], source: StoppableReader, thread: threading.Thread) -> None:
    """Let the thread end; an interpreter that exits while it runs may abort. A source that hangs is left to itself."""
    source.stop()
    channel.close()
    thread.join(EXIT_SECONDS)


def _fill(channel: _Channel[Item], items: Iterator[Item]) -> None:
    """Hand over items until they end or nobody wants them."""
    try:
        for item in items:
            if not channel.put(item):
                return
    # Whatever it is belongs to the thread that takes the items.
    except BaseException as error:
        channel.end(error)
    else:
        channel.end(StopIteration())
