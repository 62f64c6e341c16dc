"""Prefetches the items of an iterator in a thread."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from dni_seq.streams.documents import Piece, Position, Reader

Item = TypeVar("Item")

EXIT_SECONDS = 5.0
"""Longest time to wait for a thread to end."""


class StoppableReader(Reader):
    """A reader that any thread can stop early."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._stopped = False

    def __next__(self) -> Piece:
        if self._stopped:
            raise StopIteration
        return next(self._reader)

    def position(self) -> Position:
        """Returns the position of the wrapped reader."""
        return self._reader.position()

    def stop(self) -> None:
        """Stops the reader: it returns no more pieces."""
        self._stopped = True


class Prefetcher(Generic[Item]):
    """Iterates over the items of an iterator that runs in a thread, one item in advance.

    An error of the iterator is raised after the items that precede it, and again at each further call. The thread ends with
    the iterator, at `close`, or when this object is garbage collected.

    Args:
        items: the iterator.
        source: the reader behind `items`. It is stopped at `close`, so that the thread ends soon.
    """

    def __init__(self, items: Iterator[Item], source: StoppableReader) -> None:
        self._channel: _Channel[Item] = _Channel()
        # The thread must not hold `self`, because `self` would then never be garbage collected.
        thread = threading.Thread(target=_fill, args=(self._channel, items), name="dni_seq text", daemon=True)
        self._close = weakref.finalize(self, _end, self._channel, source, thread)
        thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return self._channel.get()

    def close(self) -> None:
        """Ends the thread; waits at most `EXIT_SECONDS`."""
        self._close()


class _Channel(Generic[Item]):
    """Passes items between two threads: holds at most one item, and the error or StopIteration that ended the iterator."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[Item] = deque()
        self._end: BaseException | None = None
        self._closed = False

    def put(self, item: Item) -> bool:
        """Waits for room and adds an item; returns False if the channel is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._items)
            self._items.append(item)
            self._changed.notify_all()
            return not self._closed

    def end(self, reason: BaseException) -> None:
        """Records that the iterator ended with `reason`."""
        with self._changed:
            self._end = reason
            self._changed.notify_all()

    def get(self) -> Item:
        """Waits for the next item and returns it; raises the reason if the iterator has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._end)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            assert self._end is not None
            raise self._end

    def close(self) -> None:
        """Closes the channel and drops its items."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _end(channel: _Channel[Item], source: StoppableReader, thread: threading.Thread) -> None:
    """Stops the thread, because an interpreter that exits while the thread runs may abort. Waits at most `EXIT_SECONDS`."""
    source.stop()
    channel.close()
    thread.join(EXIT_SECONDS)


def _fill(channel: _Channel[Item], items: Iterator[Item]) -> None:
    """Puts items into the channel until they end or the channel is closed."""
    try:
        for item in items:
            if not channel.put(item):
                return
    # Every error is raised again in the thread that takes the items.
    except BaseException as error:
        channel.end(error)
    else:
        channel.end(StopIteration())
