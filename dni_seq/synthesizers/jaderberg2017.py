"""Jaderberg2017Synthesizer: the published synthesizer for recurrent networks, as a baseline.

Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.1: one hidden layer, a last layer that starts at zero, raw
targets, and no bound for LSTM cells. The paper runs the RNN one step further, so that the gradient at the end of a window is
predicted after the RNN has read the next input. Here the next input is the synthesizer's context. With `synthetic_scale` and
`discount` both 0.1, messages are used as in the paper. More than one horizon is ours: it changes nothing else in the recipe.

Legend: B = lanes, H = hidden units, L = layers, E = width of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.states import State
from dni_seq.core.windows import Lookahead, first_tensor
from dni_seq.synthesizers.base import Recommended
from dni_seq.synthesizers.mlp import BasicSynthesizer


class NextInput(nn.Module):
    """Encodes the next step's input, not its target, as one vector per lane; zeros after the end of a sequence.

    Args:
        inputs: module from `Lookahead.inputs` [1, B, ...] to [1, B, E - 1]. It is registered as a submodule.
        features: E, the width of `inputs` plus one flag for whether there is a next step.
    """

    def __init__(self, inputs: nn.Module, features: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.features = features

    def forward(self, context: Any) -> Tensor:
        """Returns the code [B, E] of the first step of a `Lookahead`.

        Raises:
            ValueError: the context is not a `Lookahead` of at least one step.
        """
        if not isinstance(context, Lookahead) or not len(first_tensor(context.inputs)):
            raise ValueError(
                "NextInput needs the next step as context: pass windows through "
                "dni_seq.with_lookahead(windows, 1), and lookahead=window.lookahead to the trainer"
            )
        lookahead = context.span(0, 1)
        valid = lookahead.valid[0, :, None]
        encoded = self.inputs(lookahead.inputs)[0]
        return torch.cat([encoded * valid, valid.to(encoded.dtype)], dim=-1)


class Jaderberg2017Synthesizer(nn.Module):
    """Predicts the gradient of a layer's state; each horizon has a perceptron with one hidden layer.

    Leaves are concatenated along their last dimension, so the gradients of h and c of an LSTM layer are predicted together
    from both. All layers of a stacked state share the perceptron.

    Args:
        width: size of the last dimension, summed over all leaves, 2 H for an LSTM.
        hidden: units of the hidden layer. The paper uses as many as the RNN has.
        encoder: module from the context to [B, E] with an attribute `features` = E. None for no context.
        horizons: number of messages.
    """

    recommended = Recommended(synthetic_scale=0.1, discount=0.1)
    """The scale and the discount of the paper."""

    def __init__(self, width: int, *, hidden: int, encoder: nn.Module | None = None, horizons: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        seen = None if encoder is None else int(encoder.features)  # type: ignore[arg-type]
        self.networks = nn.ModuleList(
            BasicSynthesizer(width, n_hidden=1, hidden_dim=hidden, context_dim=seen) for _ in range(horizons)
        )

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns one raw message for each horizon."""
        seen = context if self.encoder is None else self.encoder(context)
        return [network(trigger, seen) for network in self.networks]

    def forward(self, trigger: State, context: Any = None) -> State:
        """Returns the message of a synthesizer with one horizon."""
        (message,) = self.predict(trigger, context)
        return message
