"""CountsOnHost: a count that is saved as a buffer and read without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from dni_seq.core import nonfinite


class CountsOnHost(nn.Module):
    """Base class of modules that count their calls in a buffer, and whose next call depends on the count.

    On the CPU the count is read from the buffer. On another device the host keeps the count as a number, because reading the
    buffer would wait for the device. This number is read from the buffer at the first call, after loading and after
    `reread_counts`; it is written to the buffer at each call and before saving. On a GPU a call in a step that is skipped
    counts too, because only the device knows that the step was skipped.

    Attributes:
        COUNTER: name of the buffer, int64 and 0-d, which a subclass registers.
    """

    COUNTER: ClassVar[str]

    _on_host: int | None = None
    """The count, if the buffer is not on the CPU; None if the count must be read from the buffer."""

    @property
    def _counter(self) -> Tensor:
        return self.get_buffer(self.COUNTER)

    def _count(self) -> int:
        """Returns the number of calls so far."""
        if nonfinite.readable_without_sync(self._counter):
            return int(self._counter)
        if self._on_host is None:
            self._on_host = int(self._counter)
        return self._on_host

    def _count_call(self) -> int:
        """Counts one call; returns the number of calls so far, this call included."""
        count = self._count() + 1
        self._counter.fill_(count)
        self._on_host = None if nonfinite.readable_without_sync(self._counter) else count
        return count

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # On a GPU a skipped step may have put an older count into the buffer. On the CPU the buffer holds the count.
        if self._on_host is not None and not nonfinite.readable_without_sync(self._counter):
            self._counter.fill_(self._on_host)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._on_host = None
        super()._load_from_state_dict(*arguments)


def reread_counts(modules: Iterable[nn.Module]) -> None:
    """Makes the modules and their submodules read their counts from their buffers again, after the buffers were restored."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, CountsOnHost):
                part._on_host = None
