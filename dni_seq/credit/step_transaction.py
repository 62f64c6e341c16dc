"""StepTransaction: makes a training step atomic."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from dni_seq.core.nonfinite import NonFiniteError
from dni_seq.core.snapshot import RNGState, TensorSnapshot, TrainingSnapshot
from dni_seq.credit.nonfinite_policy import NonFinitePolicy
from dni_seq.credit.step_gradients import StepGradients
from dni_seq.credit.synthetic_gradient import SyntheticCredit


class StepTransaction:
    """A context manager that undoes a training step if it raises an exception.

    Buffers, synthetic credit, counters and the random state are restored, and gradients are cleared. After a
    `NonFiniteError` nothing is restored, because the step was skipped and its changes are undone already.

    Args:
        device: the device of the inputs, whose random state is restored besides the CPU's.
        buffers: the snapshot of the model's buffers.
        credit: the trainer's synthetic credit, or None.
        policy: the trainer's counters of skipped steps.
        gradients: clears all gradients, or marks them as gradients of a step.
        full: a copy of all parameters, buffers and optimizer states for the trainer's first step, at which an optimizer may
            turn out to be unable to step. None for later steps.
    """

    def __init__(
        self,
        device: torch.device,
        buffers: TensorSnapshot,
        credit: SyntheticCredit | None,
        policy: NonFinitePolicy,
        gradients: StepGradients,
        full: TrainingSnapshot | None,
    ) -> None:
        self._device = device
        self._buffers = buffers
        self._credit = credit
        self._policy = policy
        self._gradients = gradients
        self._full = full

    def __enter__(self) -> StepTransaction:
        self._randomness = RNGState.now(self._device)
        self._buffers.keep()
        self._counts = self._policy.snapshot()
        self._gradients_before = self._gradients.snapshot()
        self._credit_before: dict[str, Any] = {} if self._credit is None else self._credit.begin_step()
        return self

    def undo(self) -> None:
        """Undoes what a step has changed before its optimizers run, for a step that is skipped."""
        self._buffers.restore()
        if self._credit is not None:
            self._credit.undo(self._credit_before)
        self._gradients.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, NonFiniteError):
            self._gradients.mark()
            return
        self.undo()
        self._policy.restore(self._counts)
        self._gradients.restore(self._gradients_before)
        if self._full is not None:
            self._full.restore()
        self._randomness.restore()
