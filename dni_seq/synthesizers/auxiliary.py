"""AuxiliaryTask: trains the RNN to predict the synthetic gradient at the end of a window.

Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.base import (
    mean_squared,
)
from dni_seq.synthesizers.normalization import Normalized, RunningRMS
from dni_seq.synthesizers.state_mlp import StateNetwork


class AuxiliaryTask(nn.Module):
    """Predicts the synthetic gradient at a window's last state from the state after the window's first step.

    The prediction's loss is backpropagated into the RNN. The RNN thus learns to hold, early in a window, what predicts the
    gradient at the window's last state. The task reads no lookahead, because the RNN does not read one either.

    Source: the auxiliary task of Jaderberg et al. 2017, section 3.1 ("DNI + Aux"). We differ in one point: the target is
    divided by its running root mean square, so that the weight of the task does not depend on the gradient's scale.

    Args:
        example: a state of the model, such as `model.initial_state(1)`. Its values and its number of lanes do not matter.
        hidden: sizes of the hidden layers.
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in [L, B, H], 0 in [B, H].
        decay: factor of the old value in the running mean of squared targets. The first 1 / (1 - decay) updates form a
            plain mean instead.
    """

    def __init__(
        self, example: State, *, hidden: Sequence[int] = (256,), batch_dim: Any = None, decay: float = 0.99
    ) -> None:
        super().__init__()
        self.network = StateNetwork(example, 1, hidden=hidden, batch_dim=batch_dim)
        self.rms = RunningRMS(decay)

    def forward(self, state: State, message: Sequence[Tensor]) -> Tensor:
        """Updates the running mean square with `message`, and computes the task's loss.

        Args:
            state: the state after the window's first step, attached to its graph.
            message: the floating-point leaves of the gradient that is injected at the window's last state, in the order of
                `state`.

        Returns:
            0-d, the mean squared error of the prediction in units of the running root mean square of `message`.
        """
        prediction = self.network.packing.leaves(self.network(state))
        message = self.network.packing.leaves(states.with_floating(state, message))
        self.rms.update(list(message), list(message))
        scales = self.rms.scales() or []
        normal = [m / scale.clamp_min(Normalized.tiny) for m, scale in zip(message, scales, strict=True)]
        return mean_squared([prediction], [normal]).loss
