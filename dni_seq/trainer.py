"""SequenceTrainer: truncated BPTT over a stream of windows, with or without synthetic gradients.

Source: Jaderberg et al. 2017, arXiv 1608.05343, sections 2.1 and 3.1. Truncated BPTT drops the effect of a window's last
state on all later losses; a synthesizer predicts it. We differ in that the injected share c (`synthetic_scale`) and the
discount γ (`discount`) are two numbers, in the normalised regression, and in that lanes end one by one.

Legend: T = window length in steps, B = lanes, H = hidden units, N = horizons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import states
from .deferred import GradientAccumulator, backward, defer_backward
from .interfaces import BackwardInterface, Exchange, synthesizer_context
from .states import State
from .windows import Lookahead

Reduction = Literal["mean", "lane-mean", "sum"]


class Model(Protocol):
    """What the trainer asks of a model: `model(inputs, state) -> (outputs, state)`."""

    def __call__(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Run T steps from `state`."""


class Synthetic(NamedTuple):
    """What the synthesizer did in one step; tensors without a graph, N horizons.

    Attributes:
        loss: 0-d, the regression's loss.
        gradient_norm: 0-d, norm of the synthesizer's gradient before clipping.
        injected_ratio: 0-d, c‖M‖ / ‖a‖: the norm of what was injected into the last state, over that of the target of the
            first horizon at the first state; NaN where that horizon was not trained.
        cosine: [N], between message and target; NaN where nothing was regressed.
        r2: [N], 1 - squared error / squared target, over running sums of the latest windows.
    """

    loss: Tensor
    gradient_norm: Tensor
    injected_ratio: Tensor
    cosine: Tensor
    r2: Tensor


class StepResult(NamedTuple):
    """What `SequenceTrainer.step` returns; tensors without a graph.

    Attributes:
        loss: 0-d, the window's loss, in the unit of `loss_fn` (nats a token for cross entropy).
        outputs: the model's outputs.
        gradient_norm: 0-d, norm of the model's gradient, synthetic part included, before clipping.
        synthetic: None without a synthesizer.
    """

    loss: Tensor
    outputs: Any
    gradient_norm: Tensor
    synthetic: Synthetic | None


def window_loss(losses: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """One scalar of a scalar or of unreduced losses [T, B].

    Args:
        losses: what `loss_fn` returned.
        mask: [T, B] bool, the steps that count, or None for all.
        reduction: "mean" over the steps that count, "lane-mean" for the sum over time and mean over lanes, or "sum".

    Raises:
        ValueError: a mask is given for a scalar, or has not the shape of the losses.
    """
    if losses.dim() == 0:
        if mask is not None:
            raise ValueError("mask needs a loss_fn that returns unreduced losses [T, B], this one returned a scalar")
        return losses
    if mask is not None:
        if mask.shape != losses.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the unreduced loss {tuple(losses.shape)}")
        losses = torch.where(mask, losses, 0)
    if reduction == "mean":
        return losses.mean() if mask is None else losses.sum() / mask.sum().clamp_min(1)
    return losses.sum() / losses.shape[1] if reduction == "lane-mean" else losses.sum()


class SequenceTrainer:
    """Train an RNN on a stream, one window a step, the hidden state carried from window to window.

    Args:
        model: `model(inputs, state) -> (outputs, state)`; a state is a tensor or any nest, None where a stream starts.
        optimizer: of the model's parameters.
        loss_fn: `loss_fn(outputs, targets)`, a scalar or unreduced losses [T, B].
        synthesizer: predicts the gradient that the future would send back to a window's last state, a raw gradient of the
            window's loss; None for plain truncated BPTT.
        synthesizer_optimizer: of the synthesizer's parameters; Adam with learning rate 1e-3 where it is None.
        synthetic_scale: c, the share of the synthetic gradient that is injected.
        discount: γ, how much of the message behind a window its target takes in.
        clip: largest norm of the model's gradient, None for no limit.
        synthesizer_clip: largest norm of the synthesizer's gradient, None for no limit.
        batch_dim: where the lanes lie in `inputs` and `targets`; windows are time-major, so 1.
        state_batch_dim: where the lanes lie in the state's leaves, an int or a nest shaped like the state (nn.LSTM: 1,
            nn.LSTMCell: 0).
        initial_state: the state in which sequences start: a nest, or a function of the number of lanes; else
            `model.initial_state(B)`, else None at first, and zeros where a lane ends.
        reduction: how unreduced losses become one number: see `window_loss`.
        autocast: dtype to run the model's forward in under `torch.autocast`, None for full precision.

    Raises:
        ValueError: a setting is out of its range, or a parameter is in both optimizers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Tensor], Tensor],
        *,
        synthesizer: nn.Module | None = None,
        synthesizer_optimizer: torch.optim.Optimizer | None = None,
        synthetic_scale: float = 0.1,
        discount: float = 0.9,
        clip: float | None = None,
        synthesizer_clip: float | None = 1.0,
        batch_dim: int = 1,
        state_batch_dim: Any = 1,
        initial_state: State | Callable[[int], State] | None = None,
        reduction: Reduction = "mean",
        autocast: torch.dtype | None = None,
    ) -> None:
        _check_settings(synthetic_scale, discount, clip, synthesizer_clip, reduction)
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.synthesizer = synthesizer
        self.synthesizer_optimizer = synthesizer_optimizer
        self.synthetic_scale = synthetic_scale
        self.discount = discount
        self.clip = clip
        self.synthesizer_clip = synthesizer_clip
        self.batch_dim = batch_dim
        self.state_batch_dim = state_batch_dim
        self.reduction: Reduction = reduction
        self.autocast = autocast
        self.state: State | None = None
        self.steps = 0
        self._initial_state = initial_state
        self._saved_leaves: list[Any] | None = None
        self._fidelity = RunningFidelity()
        self._interface: BackwardInterface | None = None
        if synthesizer is not None:
            self._interface = BackwardInterface(synthesizer)
            if synthesizer_optimizer is None and self._interface.learns:
                self.synthesizer_optimizer = torch.optim.Adam(synthesizer.parameters(), lr=1e-3)
        _check_apart(optimizer, self.synthesizer_optimizer)

    def step(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        ends: Tensor | None = None,
        mask: Tensor | None = None,
        lookahead: Lookahead | None = None,
    ) -> StepResult:
        """Train on one window and carry the hidden state on.

        Args:
            inputs: [T, B, ...], the model's inputs.
            targets: [T, B, ...], passed to `loss_fn`.
            ends: [B] bool, lanes whose sequence ends with this window: nothing is injected there, and the next window of
                the lane starts from the initial state.
            mask: [T, B] bool, steps that count in the loss; `loss_fn` must then return unreduced losses.
            lookahead: the steps behind the window, for a synthesizer that looks ahead (`dni_seq.with_lookahead`).

        Raises:
            ValueError: shapes do not agree; nothing has changed then.
        """
        self._check_window(inputs, targets, ends)
        lanes = inputs.shape[self.batch_dim]
        start = self._start(inputs, lanes)
        self._zero_gradients()
        with defer_backward() as scope:
            start = self._make_trigger(start, inputs, targets, mask, lookahead)
            with self._precision(inputs.device.type):
                outputs, last = self.model(inputs, start)
                loss = window_loss(self.loss_fn(outputs, targets), mask, self.reduction)
            backward(loss)
            exchange = self._inject(scope, last, ends, lookahead)
        gradient_norm = _clip(self.optimizer, self.clip)
        self.optimizer.step()
        synthetic = None if exchange is None else self._step_synthesizer(exchange)
        self.state = self._next_state(last, ends, lanes)
        self.steps += 1
        return StepResult(loss.detach(), states.detach(outputs), gradient_norm, synthetic)

    def reset(self) -> None:
        """Start all lanes anew: the next window begins in the initial state."""
        self.state = None
        self._saved_leaves = None

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as nests of dicts and lists of tensors and numbers."""
        leaves = self._saved_leaves
        if self.state is not None:
            leaves = states.flatten(self.state)
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, "state": leaves, "steps": self.steps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the hidden state's nest comes from the initial state.

        Raises:
            ValueError: it was saved by a trainer of other parts, with or without a synthesizer, say.
        """
        parts = self._parts()
        if set(saved) != {*parts, "state", "steps"}:
            raise ValueError(f"the saved trainer has parts {sorted(saved)}, this one {sorted({*parts, 'state', 'steps'})}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self.reset()
        self._saved_leaves = None if saved["state"] is None else list(saved["state"])
        self.steps = saved["steps"]

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.synthesizer is not None:
            parts |= {"synthesizer": self.synthesizer, "fidelity": self._fidelity}
        if self.synthesizer_optimizer is not None:
            parts["synthesizer_optimizer"] = self.synthesizer_optimizer
        return parts

    def initial_state(self, lanes: int) -> State | None:
        """The state in which `lanes` sequences start, None where the model is to choose it."""
        if callable(self._initial_state):
            return self._initial_state(lanes)
        if self._initial_state is not None:
            return self._initial_state
        of_model: Callable[[int], State] | None = getattr(self.model, "initial_state", None)
        return None if of_model is None else of_model(lanes)

    def _start(self, inputs: Tensor, lanes: int) -> State | None:
        if self._saved_leaves is not None:
            self.state = states.unflatten(self._nest(inputs, lanes), self._saved_leaves)
            self._saved_leaves = None
        return self.initial_state(lanes) if self.state is None else self.state

    @torch.no_grad()
    def _nest(self, inputs: Tensor, lanes: int) -> State:
        """A state of the right nest, for saved leaves to fill; without an initial state it takes a run of the model."""
        initial = self.initial_state(lanes)
        if initial is None:
            with torch.random.fork_rng(), self._precision(inputs.device.type):
                initial = self.model(inputs, None)[1]
        return initial

    def _make_trigger(
        self,
        start: State | None,
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        lookahead: Lookahead | None,
    ) -> State | None:
        if start is None:
            return None
        if self._interface is None:
            return states.detach(start)
        context = None if lookahead is None else ahead_of_window(inputs, targets, mask, lookahead)
        with synthesizer_context(context):
            return self._interface.make_trigger(start)

    def _inject(
        self, scope: GradientAccumulator, last: State, ends: Tensor | None, lookahead: Lookahead | None
    ) -> Exchange | None:
        if self._interface is None:
            return None
        with synthesizer_context(lookahead):
            self._interface.backward(
                last, self.synthetic_scale, discount=self.discount, ends=ends, batch_dim=self.state_batch_dim
            )
        return self._interface.exchange(scope)

    def _step_synthesizer(self, exchange: Exchange) -> Synthetic:
        regressions = exchange.regressions
        norm = torch.zeros(())
        if regressions and self.synthesizer_optimizer is not None:
            norm = _clip(self.synthesizer_optimizer, self.synthesizer_clip)
            self.synthesizer_optimizer.step()
        injected = _norm(exchange.injected[0])
        if not regressions:
            nothing = injected.new_full((), float("nan"))
            return Synthetic(nothing, norm, nothing, nothing[None], nothing[None])
        (regression,), (own,) = regressions, exchange.own_gradients
        self._fidelity.update(regression.error, regression.power)
        ratio = injected / _norm(own) if own is not None else injected.new_full((), float("nan"))
        return Synthetic(regression.loss, norm, ratio, regression.cosine, self._fidelity.r2())

    def _next_state(self, last: State, ends: Tensor | None, lanes: int) -> State:
        state = states.detach(last)
        if ends is None:
            return state
        return states.reset_lanes(state, ends, self.initial_state(lanes), self.state_batch_dim)

    def _zero_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.synthesizer_optimizer is not None:
            self.synthesizer_optimizer.zero_grad()

    def _precision(self, device: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)

    def _check_window(self, inputs: Tensor, targets: Tensor, ends: Tensor | None) -> None:
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            if tensor.dim() <= self.batch_dim:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, without dimension batch_dim={self.batch_dim}")
            if tensor.shape[0] == 0:
                raise ValueError(f"{name} has no steps: a window needs one at least")
        lanes = inputs.shape[self.batch_dim]
        if targets.shape[self.batch_dim] != lanes:
            raise ValueError(f"inputs have {lanes} lanes, targets {targets.shape[self.batch_dim]}")
        if ends is not None and (ends.shape != (lanes,) or ends.dtype != torch.bool):
            raise ValueError(f"ends must be a bool tensor [{lanes}], got {ends.dtype} {list(ends.shape)}")


class RunningFidelity:
    """R² by horizon over running sums, since that of a single window is noise."""

    decay = 0.98

    def __init__(self) -> None:
        self._error: Tensor | None = None
        self._power: Tensor | None = None

    def update(self, error: Tensor, power: Tensor) -> None:
        """Take in the squared error and the squared target of each horizon, [N] each."""
        if self._error is None or self._power is None:
            self._error, self._power = torch.zeros_like(error), torch.zeros_like(power)
        known = ~error.isnan()  # a horizon that this window did not train says nothing
        self._error = torch.where(known, torch.lerp(error, self._error, self.decay), self._error)
        self._power = torch.where(known, torch.lerp(power, self._power, self.decay), self._power)

    def r2(self) -> Tensor:
        """[N]: 1 - squared error / squared target."""
        if self._error is None or self._power is None:
            return torch.full((1,), float("nan"))
        return 1 - self._error / self._power

    def state_dict(self) -> dict[str, Any]:
        """The running sums."""
        return {"error": self._error, "power": self._power}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._error, self._power = saved["error"], saved["power"]


def ahead_of_window(inputs: Tensor, targets: Tensor, mask: Tensor | None, lookahead: Lookahead) -> Lookahead:
    """What the window's first state has ahead: the first m steps of the window and, behind it, of its lookahead."""
    steps = len(lookahead.inputs)
    counts = torch.ones_like(lookahead.valid[:1]).expand(len(inputs), -1) if mask is None else mask
    behind = lookahead.valid if lookahead.mask is None else lookahead.mask
    return Lookahead(
        inputs=torch.cat([inputs, lookahead.inputs])[:steps],
        targets=torch.cat([targets, lookahead.targets])[:steps],
        valid=torch.cat([torch.ones_like(counts), lookahead.valid])[:steps],
        mask=torch.cat([counts, behind])[:steps],
    )


def _norm(leaves: list[Tensor]) -> Tensor:
    """The norm of all leaves together, 0-d."""
    return torch.stack([leaf.norm() for leaf in leaves]).norm()


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _clip(optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """Scale the gradients of `optimizer`'s parameters down to norm `limit`; the norm they had."""
    parameters = list(_parameters(optimizer))
    if limit is not None:
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _check_settings(
    synthetic_scale: float,
    discount: float,
    clip: float | None,
    synthesizer_clip: float | None,
    reduction: str,
) -> None:
    if not 0 <= synthetic_scale < float("inf"):
        raise ValueError(f"synthetic_scale must be 0 or more, got {synthetic_scale}")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must lie between 0 and 1, got {discount}")
    for name, limit in (("clip", clip), ("synthesizer_clip", synthesizer_clip)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be positive, or None for no limit, got {limit}")
    if reduction not in ("mean", "lane-mean", "sum"):
        raise ValueError(f'reduction must be "mean", "lane-mean" or "sum", got {reduction!r}')


def _check_apart(optimizer: torch.optim.Optimizer, synthesizer_optimizer: torch.optim.Optimizer | None) -> None:
    if synthesizer_optimizer is None:
        return
    shared = {id(p) for p in _parameters(optimizer)} & {id(p) for p in _parameters(synthesizer_optimizer)}
    if shared:
        raise ValueError(
            f"{len(shared)} parameters are in both optimizers: give the model's to one and the synthesizer's to the other"
        )
