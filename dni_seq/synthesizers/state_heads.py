"""Heads on a shared perceptron that regress messages for recurrent states.

Legend: B = lanes, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dni_seq.core.states import State
from dni_seq.synthesizers.packed import Outputs, PackedSynthesizer
from dni_seq.synthesizers.state_mlp import StateNetwork


class StateHeads(PackedSynthesizer):
    """Messages by horizon for a recurrent state, learned by gradient descent: a `StateNetwork`, bounded and normalised.

    Args:
        example: a state of the model, such as `model.initial_state(1)`.
        horizons: N, number of messages.
        cells, decay, limit: see `PackedSynthesizer`.
        hidden, batch_dim, encoder, future: see `StateTrunk`.
    """

    def __init__(
        self,
        example: State,
        horizons: int = 1,
        *,
        cells: Any = False,
        decay: float = 0.99,
        limit: float | None = None,
        **network: Any,
    ) -> None:
        super().__init__(StateNetwork(example, horizons, **network), example, cells, decay, limit)

    def outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Those of the network's heads."""
        found, loss = self.network.packed(bounded, context)
        return Outputs(found * gate[:, None], None, loss)


class StateSynthesizer(StateHeads):
    """One synthesizer for a recurrent state, its target bootstrapped: a_k + γ J_kᵀ M(s_{k+1}).

    Args:
        example, cells, hidden, batch_dim, encoder, future, decay, limit: see `StateHeads`.
    """

    def __init__(self, example: State, **settings: Any) -> None:
        super().__init__(example, 1, **settings)
