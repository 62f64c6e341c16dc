"""What a synthesizer is trained towards, as a linear rule over its horizons.

Window k runs from state s_k to s_{k+1}; a_k is the gradient of its loss with respect to s_k, J_k = ∂s_{k+1}/∂s_k, and
M_j(s) is the message of horizon j. Every rule of this library has one form:

    target of horizon i at s_k   =  local_i · a_k  +  J_kᵀ Σ_j bootstrap_ij · M_j(s_{k+1})
    injected at s_{k+1}          =  Σ_j injection_j · M_j(s_{k+1})

so that each target costs at most one vector-Jacobian product to the state.

Source: the bootstrapped target is that of Jaderberg et al. 2017, arXiv 1608.05343, section 2.1. There the injected share and
the discount are one number; here they are two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State


class TargetRule(NamedTuple):
    """Coefficients of the targets of N horizons and of their injection.

    Attributes:
        local: [N], the share of the window's own gradient a_k in each target.
        bootstrap: [N][N], the share of each following message in each target.
        injection: [N], the share of each message in what is injected.
        active: [N], the horizons to train at this window; the others' targets are not computed.
        skip_injection: whether injection is skipped at this window. The gradient that arrives at the state is then the
            target, at no extra cost.
        self_supervised: whether the synthesizer learns from its context, at windows without targets too.
    """

    local: Sequence[float]
    bootstrap: Sequence[Sequence[float]]
    injection: Sequence[float]
    active: Sequence[bool]
    skip_injection: bool = False
    self_supervised: bool = False


def bootstrapped(scale: float, discount: float) -> TargetRule:
    """One horizon without end: target a_k + discount · J_kᵀ M(s_{k+1}), of which `scale` is injected."""
    return TargetRule(local=[1.0], bootstrap=[[discount]], injection=[scale], active=[True])


def increments(scale: float, discount: float, shares: Sequence[float], tail: bool) -> TargetRule:
    """One horizon for each window ahead, and a last one for all that is behind them where `tail` is set.

    Partial sums of exact messages are exact gradients of as many windows. `shares` weighs the horizons beside the discount.
    """
    count = len(shares)
    following = [[1.0 if j == i - 1 else 0.0 for j in range(count)] for i in range(count)]
    if tail:
        following[-1][-1] = discount
    return TargetRule(
        local=[1.0] + [0.0] * (count - 1),
        bootstrap=following,
        injection=[scale * discount**n * share for n, share in enumerate(shares)],
        active=[True] * count,
    )


def rule_of(synthesizer: nn.Module, scale: float, discount: float) -> TargetRule:
    """The rule of a synthesizer that brings its own as `target_rule(scale, discount)`, else the bootstrapped one."""
    own_rule: Callable[[float, float], TargetRule] | None = getattr(synthesizer, "target_rule", None)
    return bootstrapped(scale, discount) if own_rule is None else own_rule(scale, discount)


def combine(messages: list[State], weights: Sequence[float]) -> list[Tensor]:
    """Σ_j injection_j · messages_j, leaf by leaf, over the floating-point leaves."""
    columns = zip(*(states.floating(message) for message in messages), strict=True)
    return [_weighted_sum(list(column), weights) for column in columns]


def _weighted_sum(leaves: list[Tensor], weights: Sequence[float]) -> Tensor:
    terms = [leaf if weight == 1 else leaf * weight for leaf, weight in zip(leaves, weights, strict=True) if weight != 0]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0] if terms else torch.zeros_like(leaves[0])


def drawn(choices: int, count: int) -> int:
    """A number from 0 to `choices` - 1, drawn by a counter: it can be saved, and leaves the global random state alone."""
    return int(torch.randint(choices, (), generator=torch.Generator().manual_seed(count)))
