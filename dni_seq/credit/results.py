"""StepResult and Synthetic: the results of a training step. Each prints as one line of numbers and shapes.

Legend: N = horizons.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dni_seq.credit.fidelity import StateFidelity, in_short


class Synthetic(NamedTuple):
    """Measurements of the synthesizer in one step; tensors without a graph.

    N is the number of horizons. At a window without a regression, such as one that `regress_every` skips, `loss` is NaN and
    `cosine` holds one NaN instead of N numbers.

    Attributes:
        loss: 0-d, the loss that trains the synthesizer. For a self-supervised synthesizer this is the loss of its predictor.
            For all others it is the loss of the regression; see `Regression.loss` for the unit.
        gradient_norm: 0-d, norm of the synthesizer's gradient before clipping.
        injected_ratio: 0-d, norm of the injected gradient at the last state / norm of the first horizon's target at the
            first state. 0 if the message was rejected because it was not finite or far too large. NaN if the first horizon
            has no target at this window. At a window that skips injection, the numerator is the norm that would have been
            injected.
        cosine: [N], cosine between message and target; NaN for a horizon without a target.
        r2: [N], 1 - squared error / squared target, from running means over the latest windows.
        scale: [N], the factor of each message in the injected gradient: the trainer's `synthetic_scale` times the
            power of the discount for the horizon, the weight of the horizon and the automatic scale.
        fidelity: the comparison with exact gradients that this step made, or None.
    """

    loss: Tensor
    gradient_norm: Tensor
    injected_ratio: Tensor
    cosine: Tensor
    r2: Tensor
    scale: Tensor
    fidelity: StateFidelity | None

    def __repr__(self) -> str:
        numbers = [f"{name}={in_short(value)}" for name, value in self._asdict().items() if name != "fidelity"]
        return f"Synthetic({', '.join(numbers)}, fidelity={self.fidelity})"


class StepResult(NamedTuple):
    """The result of one `SequenceTrainer.step`; its tensors have no graph.

    Attributes:
        loss: 0-d, the window's loss in the unit of `loss_fn` (nats for cross-entropy).
        outputs: the model's outputs.
        gradient_norm: 0-d, norm of the model's gradient before clipping, the synthetic part included.
        synthetic: measurements of the synthesizer; None without a synthesizer, and at a skipped step on the CPU. If the step
            is skipped by the device, as on CUDA with a fused optimizer, the measurements are present.
        skipped: 0-d bool, True if the step was skipped because the loss or the gradient held a NaN or an infinity.
        events: messages for the user: that the step was skipped, with the place of the first NaN, or that the synthesizer
            diverged and was reset. On CUDA these messages come at a later step, because counts are read only every few
            steps.
    """

    loss: Tensor
    outputs: Any
    gradient_norm: Tensor
    synthetic: Synthetic | None
    skipped: Tensor
    events: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"StepResult(loss={in_short(self.loss)}, outputs={_shapes(self.outputs)}, "
            f"gradient_norm={in_short(self.gradient_norm)}, synthetic={self.synthetic}, skipped={bool(self.skipped)}, "
            f"events={self.events})"
        )


def _shapes(nest: Any) -> str:
    """Returns the shapes of the tensors in a nest as text, such as "([5, 20, 8], [20, 8])"."""
    if isinstance(nest, Tensor):
        return str(list(nest.shape))
    if isinstance(nest, dict):
        return "{" + ", ".join(f"{key!r}: {_shapes(value)}" for key, value in nest.items()) + "}"
    if isinstance(nest, (tuple, list)):
        return f"({', '.join(map(_shapes, nest))})"
    return type(nest).__name__
