"""NonFinitePolicy: counts windows that were skipped because of a NaN or an infinity; too many in a row are an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dni_seq.core.nonfinite import NonFiniteError, SkipCounter, first_nonfinite
from dni_seq.core.snapshot import Restorable
from dni_seq.credit.replay import RecordedWindow
from dni_seq.distributed.data_parallel import DataParallel


class NonFinitePolicy(Restorable):
    """Counts skipped windows, and raises a NonFiniteError after too many in a row.

    Args:
        limit: number of windows skipped in a row at which a NonFiniteError is raised.

    Raises:
        ValueError: the limit is below 1.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._counter = SkipCounter()
        self._reported = 0

    @property
    def limit(self) -> int:
        """Number of windows skipped in a row at which a NonFiniteError is raised."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"skip_limit must be 1 or more, got {limit}")
        self._limit = limit

    @property
    def total(self) -> int:
        """Number of windows skipped so far; reading it waits for a GPU."""
        return self._counter.total

    def count(self, good: Tensor) -> None:
        """Counts one window on the device of `good` (0-d bool), without waiting for a GPU."""
        self._counter.add(good)

    def count_skipped(self, skipped: Tensor, steps: int, where: str) -> None:
        """Counts a window that the host has skipped.

        Args:
            skipped: 0-d bool.
            steps: number of windows so far, this one included.
            where: the text that `diagnose` has returned.

        Raises:
            NonFiniteError: `limit` windows in a row were skipped.
        """
        self._counter.add(~skipped)
        self._reported = self._counter.total
        self._check_row(steps, where)

    def read_counts(self, steps: int, diagnose: Callable[[], str]) -> tuple[str, ...]:
        """Reads the counts from the GPU every `limit` windows; returns messages for the user.

        Raises:
            NonFiniteError: at least `limit` windows in a row were skipped.
        """
        if steps % self.limit:
            return ()
        if self._counter.in_a_row >= self.limit:
            self._check_row(steps, diagnose())
        if self._counter.total <= self._reported:
            return ()
        count, self._reported = self._counter.total - self._reported, self._counter.total
        return (f"{count} of the last {self.limit} steps skipped because of a NaN or an infinity",)

    def _check_row(self, steps: int, where: str) -> None:
        row = self._counter.in_a_row
        if row >= self.limit:
            raise NonFiniteError(
                f"{row} windows in a row were skipped, from step {steps - row + 1} on; first NaN or infinity in {where}. "
                "The parameters are those before that step: try a smaller learning rate or clip"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts."""
        return self._counter.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._counter.load_state_dict(saved)
        self._reported = self._counter.total


def diagnose(
    model: nn.Module,
    auxiliary: nn.Module | None,
    window: RecordedWindow,
    outputs: Any,
    loss: Tensor,
    parallel: DataParallel,
) -> str:
    """Returns a text that names the first NaN or infinity of a window, in the order of computation, and the rank with it."""
    parts = [(name, module) for name, module in (("", model), ("auxiliary.", auxiliary)) if module is not None]
    named: list[tuple[str, Any]] = [
        ("the inputs", window.inputs),
        ("the state that the window starts from", window.start),
        *((f"the parameter {n}", p) for n, p in model.named_parameters()),
        *((f"the buffer {n}", b) for n, b in model.named_buffers()),
        ("the model's outputs", outputs),
        ("the targets", window.targets),
        ("the loss", loss),
        *((f"the parameter auxiliary.{n}", p) for pre, m in parts if pre for n, p in m.named_parameters()),
        *((f"the gradient of {pre}{n}", dense(p.grad)) for pre, m in parts for n, p in m.named_parameters()),
    ]
    return parallel.first(*first_nonfinite(named))


def dense(gradient: Tensor | None) -> Tensor | None:
    """Returns the gradient, converted to a dense tensor if it is sparse."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
