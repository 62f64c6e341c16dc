"""Replays recorded windows: computes exact gradients over several windows, and λ-targets.

A recorded window holds the inputs and the first state of a window, never a graph. A replay runs the model with its current
parameters. A replay does not change the parameters' gradients, the model's buffers or the random state. λ-targets keep the
graph of one window at a time; exact gradients keep one graph over all replayed windows.

Source of λ-targets: Pemberton and Costa 2024, "BP(λ): Online Learning via Synthetic Gradients", arXiv 2401.07044. We
compute the forward view, which equals their eligibility traces for frozen parameters, by one backward sweep over the
recorded windows. Eligibility traces would hold B · D · P numbers, where D is the number of elements of one lane's state and
P the number of the synthesizer's parameters.

Legend: B = lanes, N = horizons, K = windows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.vjp import without_parameter_gradients
from dni_seq.core.windows import Lookahead, Nest, Past, Surroundings, Window
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.synthesizers.base import match_message
from dni_seq.synthesizers.target_rule import TargetRule, combine


class RecordedWindow(NamedTuple):
    """A recorded training window and the state it started from, so that it can be run again.

    Attributes:
        inputs: [T, B, ...], the model's inputs, a tensor or a nest of tensors.
        targets: [T, B, ...], the targets of the loss, a tensor or a nest of tensors.
        mask: [T, B] bool, True for steps that count in the loss; None if all count.
        ends: [B] bool, True for lanes whose sequence ends with this window; None if no sequence ends.
        start: the state that the window started from, detached from its graph; None if the model chose the state itself.
        context: the synthesizer's context at that state, or None.
    """

    inputs: Nest
    targets: Nest
    mask: Tensor | None
    ends: Tensor | None
    start: State
    context: Any


def exact_gradients(
    runner: WindowRunner, windows: Sequence[RecordedWindow], horizons: int | None = None, discount: float = 1.0
) -> list[list[Tensor]]:
    """Returns the gradients of the windows' losses with respect to the first state of the first window.

    A lane's gradient is zero for windows after the end of its sequence. One graph runs over all windows, and each gradient
    needs one backward pass.

    Args:
        runner: runs the model, whose parameters are excluded from the graph.
        windows: consecutive windows.
        horizons: number of gradients. The last of them is that of all remaining windows, whose losses have the weights 1, γ,
            γ², ... None for one gradient for each window.
        discount: γ, used with `horizons`.

    Returns:
        One list for each gradient, with the raw gradients of the state's floating-point leaves.
    """
    separate = len(windows) if horizons is None else horizons - 1
    with _unrolled(runner, windows) as (leaves, losses):
        found = [_gradient([loss], leaves, [None], keep=True) for loss in losses[:separate]]
        after = losses[separate:]
        if after:
            weights: list[Tensor | None] = [loss.new_full((), discount**n) for n, loss in enumerate(after)]
            found.append(_gradient(after, leaves, weights, keep=False))
        return found


@contextmanager
def _unrolled(runner: WindowRunner, windows: Sequence[RecordedWindow]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yields the leaves of the first state, and the losses of all windows, computed from it in one graph."""
    with without_parameter_gradients(runner.model), torch.enable_grad():
        start = states.map_floating(lambda leaf: leaf.detach().requires_grad_(), windows[0].start)
        yield states.floating(start), unrolled_losses(runner, windows, start)


def unrolled_losses(runner: WindowRunner, windows: Sequence[Window | RecordedWindow], state: State | None) -> list[Tensor]:
    """Returns the losses of consecutive windows, computed from `state` in one graph. A learned initial state is in it."""
    losses = []
    for window in windows:
        outputs, last = runner.run(window.inputs, state)
        losses.append(runner.loss(outputs, window.targets, window.mask))
        state = runner.reset(last, window.ends, detached=False)
    return losses


def lambda_targets(
    runner: WindowRunner,
    windows: Sequence[RecordedWindow],
    last_messages: list[State],
    rule: TargetRule,
    predict: Callable[[RecordedWindow], list[State]],
    lam: float,
) -> list[list[State]]:
    """Returns the λ-targets at the first state of every window, computed by one backward sweep.

    G_i(s_k) = local_i a_k + J_kᵀ Σ_j bootstrap_ij [(1 - λ) M_j(s_{k+1}) + λ G_j(s_{k+1})]

    G_i is the target of horizon i; the other symbols are those of `TargetRule`. At the last state of the last window, G_j is
    the message M_j.

    Args:
        runner: runs the model.
        windows: K consecutive windows, oldest first.
        last_messages: the synthesizer's messages at the last state of the last window; in lanes that
            ended they count as zero.
        rule: the coefficients of targets.
        predict: returns the messages at a window's first state.
        lam: λ. With 0 the result is the bootstrapped target, with 1 that of BPTT over the K windows plus the messages after
            them.

    Returns:
        For each window, oldest first, one target for each of the N horizons.
    """
    messages, targets = last_messages, last_messages
    found: list[list[State]] = []
    for window in reversed(windows):
        mixed = [_mix(m, g, lam) for m, g in zip(messages, targets, strict=True)]
        if window.ends is not None:
            mixed = [states.reset_lanes(state, window.ends, None, runner.state_batch_dim) for state in mixed]
        targets = _targets(runner, window, mixed, rule)
        messages = predict(window)
        found.append(targets)
    return found[::-1]


def _targets(runner: WindowRunner, window: RecordedWindow, next_messages: list[State], rule: TargetRule) -> list[State]:
    """Returns one target for each horizon at one window's first state; the window's graph is freed afterwards."""
    targets = []
    with without_parameter_gradients(runner.model), torch.enable_grad():
        start = states.map_floating(lambda leaf: leaf.detach().requires_grad_(), window.start)
        outputs, last = runner.run(window.inputs, start)
        loss = runner.loss(outputs, window.targets, window.mask)
        for own, shares in zip(rule.local, rule.bootstrap, strict=True):
            roots: list[Tensor] = [loss] if own else []
            gradients: list[Tensor | None] = [loss.new_full((), own)] if own else []
            if any(shares):
                roots += states.floating(last)
                gradients += combine([match_message(message, last) for message in next_messages], shares)
            found = _gradient(roots, states.floating(start), gradients, keep=True)
            targets.append(states.with_floating(window.start, found))
    return targets


def map_recorded(function: Callable[[Tensor, int], Tensor], window: RecordedWindow, runner: WindowRunner) -> RecordedWindow:
    """Returns the window with `function(tensor, dim)` applied to all tensors; `dim` is the dimension of the lanes."""
    mask, ends, context = window.mask, window.ends, window.context
    if isinstance(context, (Lookahead, Surroundings)):
        context = context.map(lambda tensor: function(tensor, 1))
    return RecordedWindow(
        states.map_tensors(lambda tensor: function(tensor, runner.batch_dim), window.inputs),
        states.map_tensors(lambda tensor: function(tensor, runner.batch_dim), window.targets),
        None if mask is None else function(mask, 1),
        None if ends is None else function(ends, 0),
        None if window.start is None else states.map_lanes(function, window.start, runner.state_batch_dim),
        context,
    )


def gather_lanes(window: RecordedWindow, runner: WindowRunner) -> RecordedWindow:
    """Returns the window with the lanes of all ranks; a collective call."""
    return map_recorded(runner.parallel.all, window, runner)


def own_lanes(window: RecordedWindow, runner: WindowRunner) -> RecordedWindow:
    """Returns this rank's lanes of a window with the lanes of all ranks."""
    return map_recorded(runner.parallel.own, window, runner)


def recorded(window: RecordedWindow) -> RecordedWindow:
    """Returns a copy of a window that a checkpoint can hold.

    Raises:
        ValueError: inputs or targets are nested in containers that `torch.load(weights_only=True)` does not load.
    """
    check_loadable(window.inputs, "inputs")
    check_loadable(window.targets, "targets")
    copied: RecordedWindow = states.clone(window)
    return copied


def check_loadable(nest: Nest, name: str) -> None:
    """Raises a ValueError if inputs or targets are in containers that `torch.load(weights_only=True)` does not load."""
    if (kind := _foreign_container(nest)) is not None:
        raise ValueError(f"{name} in a {kind.__name__} cannot be recorded for a replay: use a dict or a tuple")


def _foreign_container(nest: Nest) -> type | None:
    """Returns the type of a container in `nest` other than tuple, list, dict and OrderedDict, or None."""
    if isinstance(nest, Tensor):
        return None
    if type(nest) not in (tuple, list, dict, OrderedDict):
        return type(nest)
    entries = nest.values() if isinstance(nest, dict) else nest
    return next(filter(None, map(_foreign_container, entries)), None)


def _mix(message: State, target: State, lam: float) -> State:
    pairs = zip(states.floating(message), states.floating(match_message(target, message)), strict=True)
    return states.with_floating(message, [torch.lerp(m, g, lam) for m, g in pairs])


def _gradient(roots: list[Tensor], leaves: list[Tensor], gradients: list[Tensor | None], *, keep: bool) -> list[Tensor]:
    pairs = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if root.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        [root for root, _ in pairs], leaves, [gradient for _, gradient in pairs], retain_graph=keep, allow_unused=True
    )
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def pack(window: RecordedWindow) -> dict[str, Any]:
    """Returns a window as a dict of tensors and lists of tensors, which `torch.load(weights_only=True)` can load."""
    return {
        **{name: getattr(window, name) for name in ("inputs", "targets", "mask", "ends")},
        "start": None if window.start is None else states.saved_leaves(window.start),
        "start_paths": states.key_paths(window.start),
        **_packed_context(window.context),
    }


def _packed_context(context: Any) -> dict[str, Any]:
    if not isinstance(context, Surroundings):
        return {"context": None if context is None else list(context)}
    ahead = context.lookahead
    return {"context": None if ahead is None else list(ahead), "past": list(context.past)}


def unpack(saved: dict[str, Any], like: State) -> RecordedWindow:
    """Returns the window that `pack` converted; its state is nested like `like`."""
    fields = {name: saved[name] for name in ("inputs", "targets", "mask", "ends")}
    leaves = saved["start"]
    start = None if leaves is None else states.from_saved(leaves, saved.get("start_paths"), like)
    context: Any = None if saved["context"] is None else Lookahead(*saved["context"])
    if "past" in saved:
        context = Surroundings(Past(*saved["past"]), context)
    return RecordedWindow(**fields, start=start, context=context)
