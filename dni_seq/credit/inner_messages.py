"""Messages at states inside a window: the gradients of a predictor's loss at the states after n, 2n, ... steps.

The message at the end of a window is credit from later steps. A message inside the window is the gradient of an auxiliary
objective, because the window's own graph already carries the credit of its steps. This message moves a state towards states
from which the predictor predicts the next m steps better. All states with a message are joined along the lanes, so that the
predictor runs once for each window.

Source: ours; Trinh et al. 2018, arXiv 1803.00144, add the losses of predictors at random places of a sequence. Here the
gradient is injected at a state, with the same weight as the message at the end of the window.

Legend: T = window length in steps, B = lanes, m = lookahead in steps, q = states with a message in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.windows import Context, Lookahead, Past, Surroundings


class InnerStates(NamedTuple):
    """States inside a window, with the synthesizer's context at each of them.

    Attributes:
        states: the states after n, 2n, ... steps, with their graph, without the window's last state.
        contexts: the context at each of these states.
    """

    states: list[State]
    contexts: list[Context]


def join(nests: Sequence[State], batch_dim: Any) -> State:
    """Returns one state that holds the lanes of all `nests`, without a graph.

    Leaves that are not floating-point tensors are those of the last nest.
    """
    last = nests[-1]
    dims = _dims(last, batch_dim)
    columns = zip(*(states.floating(nest) for nest in nests), strict=True)
    joined = [torch.cat([leaf.detach() for leaf in column], dim) for column, dim in zip(columns, dims, strict=True)]
    return states.with_floating(states.detach(last), joined)


def split(message: State, like: State, count: int, batch_dim: Any) -> list[State]:
    """Splits the message at `count` joined states; returns one message for each state, nested like `like`."""
    dims = _dims(like, batch_dim)
    parts = [leaf.chunk(count, dim) for leaf, dim in zip(states.floating(message), dims, strict=True)]
    return [states.with_floating(states.detach(like), list(leaves)) for leaves in zip(*parts, strict=True)]


def join_contexts(contexts: Sequence[Context]) -> Context:
    """Returns one context that holds the lanes of all `contexts`, which must be of one kind."""
    around = [context for context in contexts if isinstance(context, Surroundings)]
    if not around:
        return _join_lookaheads([context for context in contexts if isinstance(context, Lookahead)])
    past: Past = states.map_together(_side_by_side, [context.past for context in around], "the inputs")
    ahead = [context.lookahead for context in around if context.lookahead is not None]
    return Surroundings(past, _join_lookaheads(ahead) if ahead else None)


def _join_lookaheads(contexts: Sequence[Lookahead]) -> Lookahead:
    filled = [context._replace(mask=context.counts) for context in contexts]
    joined: Lookahead = states.map_together(_side_by_side, filled, "the lookahead")
    return joined


def _side_by_side(leaves: list[Tensor]) -> Tensor:
    return torch.cat(leaves, 1)


def _dims(state: State, batch_dim: Any) -> list[int]:
    dims = states.broadcast_to_leaves(batch_dim, state, "state_batch_dim")
    return [dim for dim, leaf in zip(dims, states.flatten(state), strict=True) if states.is_floating(leaf)]
