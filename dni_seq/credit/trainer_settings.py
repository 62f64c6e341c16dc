"""TrainerSettings: the settings of a trainer that may be changed between two steps, and its counters."""

from __future__ import annotations

import math

from dni_seq.credit.nonfinite_policy import NonFinitePolicy
from dni_seq.credit.step_gradients import StepGradients
from dni_seq.credit.stream_state import StreamState
from dni_seq.credit.synthetic_gradient import SyntheticCredit
from dni_seq.credit.window_runner import WindowRunner


class TrainerSettings:
    """The settings of a `SequenceTrainer` that may be changed between two steps, and its counters.

    Attributes:
        steps: number of windows so far, skipped ones included.
        runner: runs the model on a window.
        credit: manages the synthesizer; None without one.
    """

    steps: int
    runner: WindowRunner
    credit: SyntheticCredit | None
    _stream: StreamState
    _gradients: StepGradients
    _skip_policy: NonFinitePolicy

    @property
    def skip_limit(self) -> int:
        """Number of windows skipped in a row at which `step` raises a NonFiniteError. Default: 10."""
        return self._skip_policy.limit

    @skip_limit.setter
    def skip_limit(self, limit: int) -> None:
        self._skip_policy.limit = limit

    @property
    def accumulate(self) -> int:
        """n: the gradients of n windows are summed for one update of the model. Default: 1."""
        return self._gradients.windows_per_update

    @accumulate.setter
    def accumulate(self, windows: int) -> None:
        self._gradients.windows_per_update = windows

    @property
    def checkpoint_every(self) -> int | None:
        """Length in steps of the chunks whose activations are computed again in the backward pass; None to keep them all.

        Chunks save memory in long windows and cost one more forward pass. `loss_fn` must return unreduced losses [T, B], and
        windows must be time-major.
        Default: None.
        """
        return self.runner.checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"checkpoint_every must be 1 or more steps, or None, got {steps}")
        if steps is not None and self.runner.batch_dim != 1:
            raise ValueError("checkpoint_every needs time-major windows [T, B, ...]: use batch_dim=1")
        if steps is not None and self.credit is not None and self.credit.auxiliary is not None:
            raise ValueError("checkpoint_every does not work with an auxiliary task: remove one of them")
        if steps is not None and self.credit is not None and self.credit.settings.message_every is not None:
            raise ValueError("checkpoint_every does not work with message_every: remove one of them")
        self.runner.checkpoint_every = steps

    @property
    def backward_windows(self) -> int:
        """n: the loss of a window is propagated back through the last n windows. Default: 1.

        With windows of T steps this is truncated BPTT with k1 = T and k2 = n T, see `PastWindows`. Each step then runs the
        n - 1 windows before the newest one again. A trainer with a synthesizer accepts only n = 1.
        """
        return self._stream.past.count

    @backward_windows.setter
    def backward_windows(self, windows: int) -> None:
        if windows > 1 and self.credit is not None:
            raise ValueError(
                "backward_windows needs a trainer without a synthesizer, whose message would count a loss twice"
            )
        self._stream.past.count = windows

    @property
    def synthetic_scale(self) -> float | str | None:
        """c, the share of the message that is injected, or "auto"; None without a synthesizer.

        A number may be set between two steps, for example to lower c together with the learning rate. A checkpoint does not
        hold the number.
        """
        return None if self.credit is None else self.credit.settings.scale

    @synthetic_scale.setter
    def synthetic_scale(self, scale: float) -> None:
        if self.credit is None or self.credit.settings.scale == "auto":
            raise ValueError("synthetic_scale can be set for a trainer with a synthesizer whose scale is a number")
        if not 0 <= scale < math.inf:
            raise ValueError(f"synthetic_scale must be 0 or more, got {scale}")
        self.credit.settings = self.credit.settings._replace(scale=scale)

    @property
    def updates(self) -> int:
        """Number of updates of the model so far.

        If the device skips a step, as on CUDA with a fused optimizer, the host does not know this and counts the update too.
        """
        return self._gradients.updates

    @property
    def skipped(self) -> int:
        """Number of windows skipped so far because of a NaN or an infinity. Reading it synchronises with the GPU."""
        return self._skip_policy.total

    def skip_counts(self) -> dict[str, float]:
        """Returns two counts by TensorBoard key: skipped windows, and windows with a rejected message or regression.

        Without a synthesizer the second count is missing.
        """
        counts: dict[str, float] = {"train/skipped": self.skipped}
        if self.credit is not None:
            counts["synthetic/skipped"] = self.credit.monitor.total
        return counts
