"""StateHeads and StateSynthesizer: regress messages for recurrent states by gradient descent.

Legend: B = lanes, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dni_seq.core.states import State
from dni_seq.synthesizers.packed import Outputs, PackedSynthesizer
from dni_seq.synthesizers.state_mlp import StateNetwork


class StateHeads(PackedSynthesizer):
    """Predicts one message for each horizon of a recurrent state, trained by gradient descent on normalised targets.

    The network is a perceptron over the whole state of a lane (`StateNetwork`) with one linear head for each horizon. LSTM
    cells are bounded by tanh, and targets are divided by a running root mean square. Messages have the state's shapes and
    dtypes.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2; the heads, the normalisation and the bound are ours.

    Args:
        example: a state of the model, such as `model.initial_state(1)`. Its values and its number of lanes do not matter.
        horizons: N, number of messages.
        cells: which leaves are LSTM cell states, such as `LSTM_CELLS`. False for none.
        decay: factor of the old value in the running mean of squared targets. The first 1 / (1 - decay) updates form a
            plain mean instead.
        limit: the largest absolute value in a message, in units of the running root mean square of its targets. None for
            no limit.
        hidden: sizes of the hidden layers. Default: (256,).
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in [L, B, H], 0 in [B, H].
        encoder: module that encodes the context, such as `LookaheadEncoder`. Default: None, for no context.
        future: function `S -> FutureModel`, where S is the width of a lane's packed state; its features are given to the
            heads beside those of the hidden layers. Default: None.

    Raises:
        ValueError: `horizons` or `limit` is not positive.
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

    def _outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Computes one message for each of the N horizons, in units of the targets' running root mean square.

        Args:
            bounded: packed states [B, S], with tanh applied to LSTM cells.
            gate: [B, S], 1 - tanh² at LSTM cells and 1 elsewhere; messages are multiplied by it.
            context: the input of the encoder and the future model, such as a `Lookahead`; None without them.

        Returns:
            `Outputs` with messages [B, N, S], and the future model's loss or None.
        """
        found, loss = self.network.packed(bounded, context)
        return Outputs(found * gate[:, None], None, loss)


class StateSynthesizer(StateHeads):
    """Predicts one message for a recurrent state: the gradient of all later losses, with a bootstrapped target.

    The target at s_k is a_k + γ J_kᵀ M(s_{k+1}), where a_k is the gradient of window k's loss with respect to s_k,
    J_k = ∂s_{k+1}/∂s_k, M is this synthesizer's message and γ is the trainer's `discount`.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2.1; the discount γ is ours.

    Args:
        example: a state of the model, such as `model.initial_state(1)`.
        **settings: `cells`, `decay`, `limit`, `hidden`, `batch_dim`, `encoder` and `future`; see `StateHeads`.

    Raises:
        ValueError: `limit` is not positive.
    """

    def __init__(self, example: State, **settings: Any) -> None:
        super().__init__(example, 1, **settings)
