"""NonFinitePolicy: counts the windows that were skipped for a NaN or an infinity, and stops a run that skips too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dni_seq.core.nonfinite import NonFiniteError, SkipCounter, first_nonfinite
from dni_seq.credit.replay import RecordedWindow
from dni_seq.distributed.data_parallel import DataParallel


class NonFinitePolicy:
    """Counts skipped windows, and raises after too many in a row.

    Args:
        limit: windows in a row that may be skipped before an error.

    Raises:
        ValueError: the limit is below 1.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"skip_limit must be 1 or more, got {limit}")
        self.limit = limit
        self._counter = SkipCounter()
        self._reported = 0

    @property
    def total(self) -> int:
        """Windows skipped so far; waits for a GPU."""
        return self._counter.total

    def count(self, good: Tensor) -> None:
        """Counts one window, where `good` (0-d bool) is; nothing waits for a GPU."""
        self._counter.add(good)

    def count_skipped(self, skipped: Tensor, steps: int, where: str) -> None:
        """Counts a window that was skipped here.

        Args:
            skipped: 0-d bool.
            steps: windows so far, this one included.
            where: the diagnosis.

        Raises:
            NonFiniteError: it is one too many.
        """
        self._counter.add(~skipped)
        self._reported = self._counter.total
        self._check_row(steps, where)

    def read_counts(self, steps: int, diagnose: Callable[[], str]) -> tuple[str, ...]:
        """Reads every `limit` windows what a GPU has counted; returns what to tell the user.

        Raises:
            NonFiniteError: too many windows in a row were skipped.
        """
        if steps % self.limit:
            return ()
        if self._counter.in_a_row >= self.limit:
            self._check_row(steps, diagnose())
        if self._counter.total <= self._reported:
            return ()
        count, self._reported = self._counter.total - self._reported, self._counter.total
        return (f"{count} of the last {self.limit} steps left out for a NaN or an infinity",)

    def _check_row(self, steps: int, where: str) -> None:
        row = self._counter.in_a_row
        if row >= self.limit:
            raise NonFiniteError(
                f"{row} windows in a row were left out, from step {steps - row + 1} on, for a NaN or an infinity; it "
                f"appeared first in {where}. Parameters are those before that step; a smaller learning rate or clip may help"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
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
    parallel: DataParallel | None,
) -> str:
    """Returns where the first NaN or infinity of a window is, in the order of computation, and on which of several ranks."""
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
    found = first_nonfinite(named)
    return found[1] if parallel is None else parallel.first(*found)


def dense(gradient: Tensor | None) -> Tensor | None:
    """Returns the same gradient, a row-sparse one with all its rows."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
