"""TargetRule: the linear rule that gives a synthesizer's targets and the gradient that is injected.

Window k runs from state s_k to s_{k+1}; a_k is the gradient of its loss with respect to s_k, J_k = ∂s_{k+1}/∂s_k, and
M_j(s) is the message of horizon j. Every rule of this library has one form:

    target of horizon i at s_k   =  local_i · a_k  +  J_kᵀ Σ_j bootstrap_ij · M_j(s_{k+1})
    injected at s_{k+1}          =  Σ_j injection_j · M_j(s_{k+1})

Each target costs at most one vector-Jacobian product to the state.

Source: the bootstrapped target is from Jaderberg et al. 2017, arXiv 1608.05343, section 2.1. In the paper the injected share
and the discount are one number; here they are two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State


class TargetRule(NamedTuple):
    """Holds the coefficients of the targets of N horizons and of the injected gradient.

        target of horizon i at s_k   =  local_i · a_k  +  J_kᵀ Σ_j bootstrap_ij · M_j(s_{k+1})
        injected at s_{k+1}          =  Σ_j injection_j · M_j(s_{k+1})

    s_k is the first state of window k and s_{k+1} its last, a_k is the gradient of the window's loss with respect to s_k,
    J_k = ∂s_{k+1}/∂s_k, and M_j(s) is the message of horizon j.

    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2.1, written for several horizons.

    Attributes:
        local: [N], the coefficient of a_k in each target.
        bootstrap: [N, N]; `bootstrap[i][j]` is the coefficient of the message of horizon j in the target of horizon i.
        injection: [N], the coefficient of each message in the injected gradient.
        active: [N], whether each horizon is trained at this window. Targets of the others are not computed.
        skip_injection: True to inject nothing at s_{k+1} in this window. The gradient that the backward pass brings to s_k
            is then a_k, the target of the first horizon, so this target needs no further vector-Jacobian product.
        self_supervised: True if the synthesizer learns from the lookahead's inputs and targets. The targets above then
            serve only to evaluate its messages.
    """

    local: Sequence[float]
    bootstrap: Sequence[Sequence[float]]
    injection: Sequence[float]
    active: Sequence[bool]
    skip_injection: bool = False
    self_supervised: bool = False


def bootstrapped(scale: float, discount: float) -> TargetRule:
    """Returns the rule of one message for all later windows: target a_k + discount · J_kᵀ M(s_{k+1}), injected scale · M."""
    return TargetRule(local=[1.0], bootstrap=[[discount]], injection=[scale], active=[True])


def increments(scale: float, discount: float, shares: Sequence[float], tail: bool) -> TargetRule:
    """Returns the rule of one horizon for each of the next windows; with `tail`, the last is for all later windows.

    The sum of the first n exact messages is the exact gradient of the next n windows' losses.

    Args:
        scale: c, the share of the messages that is injected.
        discount: γ; horizon n is injected with γ^(n-1), and the tail's target holds γ times its own next message.
        shares: [N], a factor for each horizon in the injected gradient, besides c and the power of γ.
        tail: whether the last horizon is a tail.
    """
    count = len(shares)
    bootstrap = [[1.0 if j == i - 1 else 0.0 for j in range(count)] for i in range(count)]
    if tail:
        bootstrap[-1][-1] = discount
    return TargetRule(
        local=[1.0] + [0.0] * (count - 1),
        bootstrap=bootstrap,
        injection=[scale * discount**n * share for n, share in enumerate(shares)],
        active=[True] * count,
    )


def rule_of(synthesizer: nn.Module, scale: float, discount: float) -> TargetRule:
    """Returns `synthesizer.target_rule(scale, discount)` if the synthesizer has this method, else the bootstrapped rule."""
    own_rule: Callable[[float, float], TargetRule] | None = getattr(synthesizer, "target_rule", None)
    return bootstrapped(scale, discount) if own_rule is None else own_rule(scale, discount)


def combine(messages: list[State], weights: Sequence[float]) -> list[Tensor]:
    """Computes the weighted sum of the messages, Σ_j weights_j · messages_j, for each floating-point leaf.

    The messages must have their keys in one order, as after `match_message`.
    """
    columns = zip(*(states.floating(message) for message in messages), strict=True)
    return [_weighted_sum(list(column), weights) for column in columns]


def _weighted_sum(leaves: list[Tensor], weights: Sequence[float]) -> Tensor:
    terms = [leaf if weight == 1 else leaf * weight for leaf, weight in zip(leaves, weights, strict=True) if weight != 0]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0] if terms else torch.zeros_like(leaves[0])


def drawn(choices: int, count: int) -> int:
    """Returns a pseudo-random number from 0 to `choices` - 1, seeded by `count`; the global random state is not used."""
    return int(torch.randint(choices, (), generator=torch.Generator().manual_seed(count)))
