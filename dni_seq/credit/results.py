"""What a training step reports.

Legend: N = horizons.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dni_seq.credit.fidelity import StateFidelity


class Synthetic(NamedTuple):
    """What the synthesizer did in one step; tensors without a graph, N horizons.

    Attributes:
        loss: 0-d, the regression's loss, in normalised units where the synthesizer is `Normalized`; the mean loss of its
            own model where it learns ahead.
        gradient_norm: 0-d, norm of the synthesizer's gradient before clipping.
        injected_ratio: 0-d, c‖M‖ / ‖a‖: the norm of what was injected into the last state, or would have been at a quiet
            window, over that of the target of the first horizon at the first state; NaN where that horizon was not trained.
        cosine: [N], between message and target; NaN where nothing was regressed.
        r2: [N], 1 - squared error / squared target, over running sums of the latest windows.
        scale: [N], the share of each message that is injected: c times discount and reliability.
        fidelity: the latest comparison with exact gradients where this step made one, else None.
    """

    loss: Tensor
    gradient_norm: Tensor
    injected_ratio: Tensor
    cosine: Tensor
    r2: Tensor
    scale: Tensor
    fidelity: StateFidelity | None


class StepResult(NamedTuple):
    """What one call of `SequenceTrainer.step` returns; tensors without a graph.

    Attributes:
        loss: 0-d, the window's loss in the unit of `loss_fn` (nats for cross-entropy).
        outputs: the model's outputs.
        gradient_norm: 0-d, norm of the model's gradient before clipping, the synthetic part included.
        synthetic: what the synthesizer did; None without a synthesizer and at skipped steps.
        skipped: 0-d bool, True if the step was skipped because the loss or the gradient held a NaN or an infinity.
        events: messages for the user: that the step was skipped and where the first NaN was, or that the synthesizer was
            reset. On CUDA they arrive at a later step, when the counts are read.
    """

    loss: Tensor
    outputs: Any
    gradient_norm: Tensor
    synthetic: Synthetic | None
    skipped: Tensor
    events: tuple[str, ...] = ()
