"""AuxiliaryTask: the network predicts the synthetic gradient at a later state, and that loss trains it too.

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
    """Predict the synthetic gradient of the window's last state from the state behind the window's first step.

    Its loss flows into the RNN, which so learns to know early where its state is going to matter.

    Source: the auxiliary task of Jaderberg et al. 2017, section 3.1 ("DNI + Aux"). We differ in the target's unit, its
    running root mean square, so that the weight of the task does not depend on the gradient's scale.

    Args:
        example: a state of the model.
        hidden, batch_dim: see `StateNetwork`; no lookahead, since the RNN has none.
        decay: of the running root mean square.
    """

    def __init__(self, example: State, *, hidden: Sequence[int] = (256,), batch_dim: Any = 1, decay: float = 0.99) -> None:
        super().__init__()
        self.network = StateNetwork(example, 1, hidden=hidden, batch_dim=batch_dim)
        self.rms = RunningRMS(decay)

    def forward(self, state: State, message: Sequence[Tensor]) -> Tensor:
        """Mean squared error of the prediction at `state`, in units of the running root mean square of `message`."""
        prediction = states.floating(self.network(state))
        self.rms.update(list(message), list(message))
        scales = self.rms.scales() or []
        normal = [m / scale.clamp_min(Normalized.tiny) for m, scale in zip(message, scales, strict=True)]
        return mean_squared([prediction], [normal]).loss
