"""The slow, obviously right versions that the fast code is held to, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.core import states


def reset(state: Any, ends: Tensor, initial: Any, batch_dim: Any) -> Any:
    """Lanes that end get the initial state, leaf by leaf, lane by lane, without a graph across the reset."""
    fresh = []
    for leaf, start, dim in zip(
        states.flatten(state),
        states.flatten(initial),
        states.broadcast_to_leaves(batch_dim, state, "batch_dim"),
        strict=True,
    ):
        lanes = [(b if end else a) for a, b, end in zip(leaf.unbind(dim), start.unbind(dim), ends.tolist(), strict=True)]
        fresh.append(torch.stack(lanes, dim))
    return states.unflatten(state, fresh)


def full_bptt(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    windows: Iterable[dni.Window],
    initial: Any,
    batch_dim: Any,
) -> dict[str, Tensor]:
    """Gradients of the sum of all windows' losses, through one graph over all of them."""
    state, total = initial, 0.0
    for window in windows:
        outputs, state = model(window.inputs, state)
        total = total + loss_fn(outputs, window.targets)
        state = reset(state, window.ends, initial, batch_dim)
    found = torch.autograd.grad(total, list(model.parameters()))
    return {name: gradient for (name, _), gradient in zip(model.named_parameters(), found, strict=True)}


def truncated_bptt(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    windows: Iterable[dni.Window],
    state: Any,
    clip: float | None = None,
) -> list[tuple[float, dict[str, Tensor]]]:
    """The plain PyTorch loop: loss and gradients, as they are when the optimizer steps, of every window."""
    history = []
    for window in windows:
        state = states.detach(state)
        optimizer.zero_grad()
        outputs, state = model(window.inputs, state)
        loss = loss_fn(outputs, window.targets)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        history.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    return history


def backward_over(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    windows: list[dni.Window],
    count: int,
    initial: Any,
    batch_dim: Any,
) -> list[dict[str, Tensor]]:
    """With frozen parameters: each window's gradient through one graph over it and the count - 1 windows before."""
    starts = [initial]
    for window in windows:
        last = states.detach(model(window.inputs, starts[-1])[1])
        starts.append(reset(last, window.ends, initial, batch_dim))
    found = []
    for k in range(len(windows)):
        first = max(k - count + 1, 0)
        state = starts[first]
        for window in windows[first : k + 1]:
            outputs, state = model(window.inputs, state)
            state = reset(state, window.ends, initial, batch_dim)
        gradients = torch.autograd.grad(loss_fn(outputs, windows[k].targets), list(model.parameters()))
        found.append({name: g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)})
    return found


def min_gru(cell: Any, inputs: Tensor, state: Tensor) -> Tensor:
    """A minGRU step by step: states [T, B, H]."""
    (wz, wh), (bz, bh) = cell.gates.weight.chunk(2), cell.gates.bias.chunk(2)
    states_ = []
    for x in inputs:
        z = torch.sigmoid(x @ wz.T + bz)
        state = (1 - z) * state + z * (x @ wh.T + bh)
        states_.append(state)
    return torch.stack(states_)


def lru(cell: Any, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """An LRU step by step in complex numbers: outputs [T, B, D] and the last state, real parts first."""
    b, c = (torch.complex(*m.chunk(2, d)) for m, d in ((cell.into, 0), (cell.out, 1)))
    eigenvalues = torch.exp(-torch.exp(cell.nu) + 1j * torch.exp(cell.theta))
    x = torch.complex(*state.chunk(2, -1))
    outputs = []
    for u in inputs:
        x = eigenvalues * x + torch.exp(cell.gamma) * (u.to(b.dtype) @ b.T)
        outputs.append((x @ c.T).real + cell.skip * u)
    return torch.stack(outputs), torch.cat([x.real, x.imag], -1)


class Oracle(nn.Module):
    """The exact gradient of all that is ahead: the context holds every step to come, one graph runs over all of them.

    With `summed` losses. A lane whose sequence ends has no valid step ahead and contributes nothing.
    """

    def __init__(self, model: nn.Module, unreduced: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = lambda inputs, state: model(inputs, state)
        self.unreduced = unreduced

    def forward(self, trigger: Any, context: dni.Lookahead) -> Any:
        with torch.enable_grad():
            state = start = states.map_floating(lambda t: t.detach().requires_grad_(), trigger)
            total = torch.zeros((), dtype=torch.float64)
            for x, y, counts in zip(context.inputs, context.targets, context.valid, strict=True):
                outputs, state = self.call(x[None], state)
                total = total + torch.where(counts, self.unreduced(outputs, y[None])[0], 0).sum()
            leaves = states.floating(start)
            if not total.requires_grad:
                return states.map_floating(torch.zeros_like, trigger)
            return states.with_floating(trigger, list(torch.autograd.grad(total, leaves)))


def future_messages(heads: dni.FutureGradient, state: Any, ahead: dni.Lookahead, weight: float) -> list[Any]:
    """A `FutureGradient`'s messages: its model's losses at each horizon's steps, differentiated by the state."""
    model, horizons = heads.model, heads.network.horizons
    part = model.steps // horizons
    found = []
    for n in range(horizons):
        leaves = [leaf.detach().requires_grad_() for leaf in states.floating(state)]
        flat = heads.packing.pack(leaves)
        cell = torch.zeros(flat.shape[1], dtype=torch.bool)
        for span in heads.cells:
            cell[span] = True
        bounded = torch.where(cell, flat.tanh(), flat)
        counts = torch.zeros_like(ahead.valid)
        counts[n * part : (n + 1) * part] = True
        loss = model.loss(bounded, ahead._replace(mask=ahead.counts & counts)) * ahead.valid.numel()
        found.append(states.with_floating(state, list(torch.autograd.grad(loss * weight, leaves))))
    return found


def future_features(model: dni.FutureModel, flat: Tensor, ahead: dni.Lookahead) -> Tensor:
    """A future model's features lane by lane, step by step: the gradient of its losses with respect to W s, by autograd."""
    rows = []
    for lane in range(len(flat)):
        both = [(flat[lane] @ layer.weight.T + layer.bias).detach() for layer in model.from_state]
        reached = [one[: model.units].clone().requires_grad_() for one in both]
        loss = flat.new_zeros(())
        for step in range(model.steps):
            if not ahead.valid[step, lane] or (ahead.mask is not None and not ahead.mask[step, lane]):
                continue
            pieces = []
            for before in range(model.seen - 1, -1, -1):
                there = step - before >= 0 and bool(ahead.valid[step - before, lane])
                encoded = model.inputs(ahead.inputs[max(step - before, 0), lane])
                pieces.append(encoded if there else torch.zeros_like(encoded))
            part = step // (model.steps // model.parts)
            hidden = torch.tanh(reached[part] + model.from_inputs(torch.cat(pieces)) + model.from_step[step, 0])
            outputs = (model.output(hidden) + both[part][model.units :])[None, None]
            loss = loss + model.loss_fn(outputs, ahead.targets[step, lane][None, None]).sum()
        found = torch.autograd.grad(loss, reached, allow_unused=True) if loss.requires_grad else [None] * len(reached)
        rows.append(torch.cat([torch.zeros_like(r) if g is None else g for r, g in zip(reached, found, strict=True)]))
    return torch.stack(rows).detach()


def snap1(step: Callable[..., Any], inputs: Tensor, state: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """SnAp-1 from dense Jacobians, one lane: for each tensor of the state and each weight, [units, *weight]."""
    count, units = len(state), state[0].shape[-1]
    traces = [torch.zeros(units, *weight.shape, dtype=weight.dtype) for _ in state for weight in weights]
    for x in inputs:

        def tensors(*given: Tensor, x: Tensor = x) -> tuple[Tensor, ...]:
            return tuple(leaf[0] for leaf in step(x[None], given[:count], given[count:]).state)

        jacobians: Any = torch.autograd.functional.jacobian(tensors, (*state, *weights))
        moved = []
        for s in range(count):
            for p, weight in enumerate(weights):
                total = jacobians[s][count + p].clone()
                for other in range(count):
                    total += torch.einsum("uv,v...->u...", jacobians[s][other][:, 0], traces[other * len(weights) + p])
                mask = torch.zeros(units, len(weight), *(1 for _ in weight.shape[1:]), dtype=weight.dtype)
                for u in range(units):
                    mask[u, u::units] = 1  # the rows of unit u in every gate
                moved.append(total * mask)
        traces, state = moved, [leaf.detach() for leaf in step(x[None], state, weights).state]
    return traces


def uoro(
    step: Callable[..., Any],
    inputs: Tensor,
    state: Tensor,
    weights: list[Tensor],
    loss: Callable[[Tensor, int], Tensor],
    draws: int,
    generator: torch.Generator,
    traced: bool = True,
) -> Tensor:
    """Tallec and Ollivier 2017, arXiv 1702.05043: `draws` estimates of the gradient of the losses of all steps, [draws, P].

    One lane; the state is one tensor [1, S]. Without its trace the estimator holds the last step's own derivative alone.
    """
    size, count = state.shape[-1], sum(weight.numel() for weight in weights)
    sketch_s, sketch_w = (torch.zeros(draws, n, dtype=state.dtype) for n in (size, count))
    total = torch.zeros(draws, count, dtype=state.dtype)
    for t, x in enumerate(inputs):

        def run(s: Tensor, *given: Tensor, x: Tensor = x) -> Tensor:
            return step(x[None], (s,), given).state[0][0]

        jacobians: Any = torch.autograd.functional.jacobian(run, (state, *weights))
        of_state, of_weights = jacobians[0][:, 0], torch.cat([j.flatten(1) for j in jacobians[1:]], 1)
        signs = torch.randint(0, 2, (draws, size), generator=generator).to(state) * 2 - 1
        moved, new = sketch_s @ of_state.T * float(traced), signs @ of_weights
        tiny = 1e-30
        keep = (sketch_w.norm(dim=1) / (moved.norm(dim=1) + tiny) + tiny).sqrt()[:, None]
        add = (new.norm(dim=1) / signs.norm(dim=1)).sqrt()[:, None]
        sketch_s = keep * moved + add * signs
        sketch_w = sketch_w / keep * float(traced) + new / add
        state = run(state, *weights)[None].detach().requires_grad_()
        (arrived,) = torch.autograd.grad(loss(state, t), state)
        total += (sketch_s @ arrived[0])[:, None] * sketch_w
        state = state.detach()
    return total


def gated_past_losses(predictor: Any, flat: Tensor, inputs: list[list[Tensor]]) -> Tensor:
    """The sum of a `GatedPast`'s losses, lane by lane and step by step.

    Args:
        predictor: its weights.
        flat: packed states [B, S].
        inputs: for each lane its inputs since the start of its sequence, the oldest first.
    """
    total = flat.new_zeros(())
    for lane, history in enumerate(inputs):
        read = torch.tanh(predictor.read.weight @ flat[lane] + predictor.read.bias)
        for ago, value in enumerate(reversed(history[-predictor.past_steps :])):
            outputs = predictor.output.weight @ (read * predictor.gate[ago, 0]) + predictor.output.bias
            total = total + predictor.loss_fn(outputs[None, None], value[None, None])[0, 0]
    return total


def gated_future_losses(predictor: Any, flat: Tensor, inputs: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """The sum of a `GatedFuture`'s losses, lane by lane and step by step, with the GRU's equations written out.

    Args:
        predictor: its weights.
        flat: packed states [B, S].
        inputs: [m, B, ...].
        targets: [m, B, ...].
        counts: [m, B] bool; here every step exists.
    """
    total = flat.new_zeros(())
    gru = predictor.context
    for lane in range(flat.shape[0]):
        read = torch.tanh(predictor.read.weight @ flat[lane] + predictor.read.bias)
        memory = flat.new_zeros(gru.hidden_size)
        for step in range(len(inputs)):
            encoded = predictor.inputs(inputs[step : step + 1, lane : lane + 1])[0, 0]
            from_input = (gru.weight_ih_l0 @ encoded + gru.bias_ih_l0).chunk(3)
            from_memory = (gru.weight_hh_l0 @ memory + gru.bias_hh_l0).chunk(3)
            reset, update = (torch.sigmoid(a + b) for a, b in zip(from_input[:2], from_memory[:2], strict=True))
            memory = (1 - update) * torch.tanh(from_input[2] + reset * from_memory[2]) + update * memory
            gate = torch.tanh(predictor.gate.weight @ memory + predictor.gate_bias[step, 0])
            outputs = predictor.output.weight @ (read * gate) + predictor.output.bias
            loss = predictor.loss_fn(outputs[None, None], targets[step : step + 1, lane : lane + 1])[0, 0]
            total = total + torch.where(counts[step, lane], loss, 0)
    return total
