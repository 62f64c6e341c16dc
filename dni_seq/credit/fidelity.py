"""Compares synthetic gradients with exact gradients of the next windows, and parameter gradients with those of long BPTT.

A synthesizer's regression compares messages with bootstrapped targets, which may be wrong themselves. An R² of 0.5 against
such targets does not exclude that a message points in a wrong direction. The functions of this module replay the windows
after a state and compute exact gradients.

Legend: B = lanes, N = horizons, H = hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.snapshot import buffers_apart
from dni_seq.core.states import State
from dni_seq.credit.replay import RecordedWindow, exact_gradients
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.synthesizers.base import match_message


class Fidelity(NamedTuple):
    """Comparison of a prediction with the exact gradient. All values are 0-d tensors.

    `r2`, `norm_ratio` and `bias` are not finite if the exact gradient is zero.

    Attributes:
        cosine: cosine between prediction and exact gradient over all elements; 0 if either is zero.
        r2: 1 - squared error / squared exact gradient; 0 for a zero prediction.
        norm_ratio: norm of the prediction / norm of the exact gradient.
        bias: norm of the mean error over lanes / root mean square over lanes of the norm of the exact gradient.
        overlap: inner product of the exact gradient and the prediction.
        power: squared norm of the prediction.
        exact_power: squared norm of the exact gradient.
        slope: overlap / power, the factor that minimises the squared error of the prediction; 0 for a zero prediction.
    """

    cosine: Tensor
    r2: Tensor
    norm_ratio: Tensor
    bias: Tensor
    overlap: Tensor
    power: Tensor
    exact_power: Tensor
    slope: Tensor


def compare(prediction: Sequence[Tensor], exact: Sequence[Tensor], lane_dims: Sequence[int]) -> Fidelity:
    """Compares a prediction with the exact gradient.

    Args:
        prediction: tensors, such as the leaves of a state.
        exact: tensors of the same shapes.
        lane_dims: the dimension of the lanes in each tensor.
    """
    p = torch.cat([t.movedim(d, 0).flatten(1) for t, d in zip(prediction, lane_dims, strict=True)], dim=1).double()
    e = torch.cat([t.movedim(d, 0).flatten(1) for t, d in zip(exact, lane_dims, strict=True)], dim=1).double()  # [B, S]
    dot, pp, ee = (p * e).sum(), p.square().sum(), e.square().sum()
    zero = torch.zeros_like(dot)
    return Fidelity(
        cosine=torch.where((pp > 0) & (ee > 0), dot / (pp * ee).sqrt(), zero),
        r2=1 - (p - e).square().sum() / ee,
        norm_ratio=(pp / ee).sqrt(),
        bias=(p - e).mean(0).norm() / e.square().sum(1).mean().sqrt(),
        overlap=dot,
        power=pp,
        exact_power=ee,
        slope=torch.where(pp > 0, dot / pp, zero),
    )


class StateFidelity(NamedTuple):
    """Fidelity of the messages at one state.

    Attributes:
        horizons: [N], each message against the exact gradient that it predicts.
        total: the discounted sum of the messages against the discounted sum of the exact gradients.
        parts: fidelity of the total by (leaf index, layer index). A leaf without a dimension of layers has the index 0.
    """

    horizons: list[Fidelity]
    total: Fidelity
    parts: dict[tuple[int, int], Fidelity]

    def __repr__(self) -> str:
        cosine, r2 = ([getattr(horizon, name) for horizon in self.horizons] for name in ("cosine", "r2"))
        return f"StateFidelity(cosine={in_short(torch.stack(cosine))}, r2={in_short(torch.stack(r2))})"


def in_short(numbers: Tensor) -> str:
    """Returns a 0-d or 1-d tensor as text with four digits, such as "0.1234" or "[0.1234, nan]". Waits for a GPU."""
    if numbers.dim() == 0:
        return f"{float(numbers):.4g}"
    return f"[{', '.join(f'{number:.4g}' for number in numbers.tolist())}]"


def fidelity(
    runner: WindowRunner,
    windows: Sequence[RecordedWindow],
    messages: list[State],
    discount: float = 1.0,
    *,
    bootstrapped: bool = False,
) -> StateFidelity:
    """Measures how well messages match exact gradients: cosine, R², norm ratio, bias and slope.

    The messages were predicted at the state from which `windows[0]` starts. The exact gradients come from running the model
    over `windows` in one graph.

    Parameter gradients, buffers and the random state are left unchanged.

    Args:
        runner: runs the model.
        windows: the consecutive windows after that state, at least as many as there are messages.
        messages: one for each horizon, as `synthesizer.predict` returns them; message n stands for the n-th window.
        discount: γ; the n-th horizon, counted from 0, has the weight γ ** n in the total.
        bootstrapped: True if the last message predicts the discounted gradient of its own window and all later ones, as a
            message with a bootstrapped target does. False if it predicts the gradient of its own window only.

    Returns:
        The fidelity of each message, of their discounted sum, and of that sum by leaf and layer of the state.

    Raises:
        ValueError: there are fewer windows than horizons, or a message has other keys than the state.
    """
    if len(windows) < len(messages):
        raise ValueError(f"{len(messages)} horizons need at least as many windows, got {len(windows)}")
    all_dims = states.broadcast_to_leaves(runner.state_batch_dim, windows[0].start, "state_batch_dim")
    dims = [d for d, leaf in zip(all_dims, states.flatten(windows[0].start), strict=True) if states.is_floating(leaf)]
    heads = [states.floating(match_message(message, windows[0].start)) for message in messages]
    weights = [discount**n for n in range(len(heads))]
    if bootstrapped:
        truths = exact_gradients(runner, windows, len(heads), discount)
    else:
        truths = exact_gradients(runner, windows[: len(heads)])
    total, true_total = _sum(heads, weights), _sum(truths, weights)
    return StateFidelity(
        horizons=[compare(head, truth, dims) for head, truth in zip(heads, truths, strict=True)],
        total=compare(total, true_total, dims),
        parts=_parts(total, true_total, dims),
    )


def _sum(rows: list[list[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    return [torch.stack([w * t for w, t in zip(weights, column, strict=True)]).sum(0) for column in zip(*rows, strict=True)]


def _parts(total: list[Tensor], exact: list[Tensor], dims: list[int]) -> dict[tuple[int, int], Fidelity]:
    parts = {}
    for i, (p, e, d) in enumerate(zip(total, exact, dims, strict=True)):
        if p.dim() == 3 and d % 3 != 0:
            for layer in range(len(p)):
                parts[i, layer] = compare([p[layer]], [e[layer]], [d % 3 - 1])
        else:
            parts[i, 0] = compare([p], [e], [d])
    return parts


def cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Returns the cosine between two lists of tensors, such as parameter gradients of two methods; 0 if either is zero."""
    a = torch.cat([t.detach().reshape(-1) for t in first]).double()
    b = torch.cat([t.detach().reshape(-1) for t in second]).double()
    norms = a.norm() * b.norm()
    return torch.where(norms > 0, (a @ b) / norms, torch.zeros_like(norms))


def bptt_gradients(runner: WindowRunner, windows: Sequence[RecordedWindow]) -> list[Tensor]:
    """Returns the parameter gradients that the first window contributes to BPTT over all of `windows`.

    They are the gradient of the first window's loss, plus the gradient that the later losses send through the first window's
    last state. `cosine` compares them with the trainer's gradients. Parameters' `.grad` does not change.
    """
    parameters = [parameter for parameter in runner.model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(), buffers_apart(runner.model), torch.enable_grad():
        outputs, last = runner.run(windows[0].inputs, states.detach(windows[0].start))
        loss = runner.loss(outputs, windows[0].targets, windows[0].mask)
        roots: list[Tensor] = [loss]
        gradients: list[Tensor | None] = [None]
        if len(windows) > 1:
            state = runner.reset(last, windows[0].ends)
            after = [windows[1]._replace(start=states.detach(state)), *windows[2:]]
            roots += states.floating(state)
            gradients += exact_gradients(runner, after, 1)[0]
        pairs = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if root.requires_grad]
        found: Any = torch.autograd.grad(
            [root for root, _ in pairs], parameters, [gradient for _, gradient in pairs], allow_unused=True
        )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


class FidelityProbe:
    """Holds the messages predicted at a state, and the windows after it so far."""

    def __init__(self, messages: list[State] | None = None, windows: Sequence[RecordedWindow] = ()) -> None:
        self.messages = messages
        self.windows = list(windows)
