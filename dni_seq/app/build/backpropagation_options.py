"""The options of truncated BPTT except the window length: recomputed activations, gradients over earlier windows, traces."""

from __future__ import annotations

from dataclasses import dataclass

from dni_seq.app.build.credit_options import GROUP
from dni_seq.app.runs.options import at_least, option, share
from dni_seq.models.cells import TRACE_DECAY, TRACES, checked_decay


@dataclass(frozen=True)
class BackpropagationOptions:
    """The options of truncated BPTT except the window length, whose default depends on the command."""

    checkpoint_every: int | None = option(
        None,
        "compute the activations of this many steps at a time again in the backward pass: long windows in little memory",
        group=GROUP,
        check=at_least(1),
        shown="keep all activations",
    )
    backward_steps: int | None = option(
        None,
        "k2: propagate a window's losses back over the last k2 steps, a multiple of --bptt (k1); with --synthesizer none",
        group=GROUP,
        check=at_least(1),
        shown="--bptt",
    )

    traces: str | None = option(
        None,
        "credit from before the window for the recurrent parameters: exact for mingru and lru, approximate for lstm and gru",
        group=GROUP,
        choices=TRACES,
        shown="none",
    )
    trace_decay: float | None = option(
        None,
        "--traces factored: share of its running means that a step keeps, from 0, one step back, to below 1",
        group=GROUP,
        check=share,
        shown=f"{TRACE_DECAY:g}",
    )

    @property
    def decay_in_force(self) -> float | None:
        """α, the share of a running mean that factored traces keep at each step. None for other traces or no traces."""
        return checked_decay(self.traces, self.trace_decay) if self.traces == "factored" else None

    def backward_windows(self, bptt: int) -> int:
        """Returns the number of windows over which a window's losses are propagated back.

        Args:
            bptt: T, the window length in steps.

        Raises:
            ValueError: `backward_steps` is not a multiple of T.
        """
        steps = bptt if self.backward_steps is None else self.backward_steps
        if steps % bptt:
            raise ValueError(f"--backward-steps {steps} must be a multiple of --bptt {bptt}")
        return steps // bptt
