"""The synthesizer for recurrent networks as it was published, to compare with.

Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.1: one hidden layer, a last layer that starts at zero, raw
targets, no bound for an LSTM's cells. There one more core is unrolled, so that a boundary's gradient is predicted after the
next input has been seen; here that input is the synthesizer's context. With `synthetic_scale` and `discount` both 0.1 a
message is consumed as there. More than one horizon is ours, so that horizons can be added to that recipe alone.

Legend: B = lanes, H = hidden units, L = layers, E = width of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.states import State
from dni_seq.core.windows import Lookahead
from dni_seq.synthesizers.mlp import BasicSynthesizer


class NextInput(nn.Module):
    """The input of the next step as one vector a lane, its target unseen; zeros behind the end of a sequence.

    Args:
        inputs: module from `Lookahead.inputs` [1, B, ...] to [1, B, F].
        features: E, F and one more for whether there is a next step.
    """

    def __init__(self, inputs: nn.Module, features: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.features = features

    def forward(self, context: Any) -> Tensor:
        """[B, E] for a `Lookahead` of one step or more."""
        if not isinstance(context, Lookahead) or not len(context.inputs):
            raise ValueError("NextInput needs the next step: pass windows through dni_seq.with_lookahead(windows, 1)")
        ahead = context.span(0, 1)
        valid = ahead.valid[0, :, None]
        encoded = self.inputs(ahead.inputs)[0]
        return torch.cat([encoded * valid, valid.to(encoded.dtype)], dim=-1)


class Jaderberg2017Synthesizer(nn.Module):
    """A perceptron with one hidden layer, for each message one, from a layer's state and the context to its gradient.

    Leaves are joined on their last dimension: h and c of an LSTM's layer are read, and their gradients predicted, together.

    Args:
        width: size of the last dimension over all leaves, 2 H for an LSTM.
        hidden: units of the hidden layer; there as many as the RNN has.
        encoder: of the context, with an attribute `features`; None for the state alone.
        horizons: number of messages.
    """

    def __init__(self, width: int, *, hidden: int, encoder: nn.Module | None = None, horizons: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        seen = None if encoder is None else int(encoder.features)  # type: ignore[arg-type]
        self.networks = nn.ModuleList(
            BasicSynthesizer(width, n_hidden=1, hidden_dim=hidden, context_dim=seen) for _ in range(horizons)
        )

    def predict(self, trigger: State, context: Any) -> list[State]:
        """One message for each horizon."""
        seen = context if self.encoder is None else self.encoder(context)
        return [network(trigger, seen) for network in self.networks]

    def forward(self, trigger: State, context: Any = None) -> State:
        """The message of a synthesizer of one horizon."""
        (message,) = self.predict(trigger, context)
        return message
