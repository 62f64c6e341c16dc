"""SequenceTrainer: truncated BPTT over a stream of windows, with or without synthetic gradients.

Source: Jaderberg et al. 2017, arXiv 1608.05343, sections 2.1 and 3.1. Truncated BPTT drops the effect of a window's last
state on all later losses; a synthesizer predicts it. We differ in that the injected share c (`synthetic_scale`) and the
discount γ (`discount`) are two numbers, in the normalised regression, and in that lanes end one by one.

Legend: T = window length in steps, B = lanes, H = hidden units, N = horizons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.deferred_backward import backward, defer_backward
from dni_seq.core.optimizer_step import clipped_step, gradient_norm, leaves_out_by_itself
from dni_seq.core.snapshot import (
    Alone,
    Kept,
    NonFiniteError,
    Randomness,
    Tally,
    Whole,
    all_finite,
    broken_lanes,
    buffers_of,
    choose,
    decided_here,
    first_not_finite,
)
from dni_seq.core.states import State
from dni_seq.core.windows import REDUCTIONS, Lookahead, Reduction
from dni_seq.credit.replay import Past, Replayer
from dni_seq.credit.synthetic_gradient import CreditSettings, Synthetic, SyntheticCredit, without_chain
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.interfaces.backward import Exchange


class Model(Protocol):
    """What the trainer asks of a model: `model(inputs, state) -> (outputs, state)`."""

    def __call__(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Run T steps from `state`."""


class StepResult(NamedTuple):
    """What `SequenceTrainer.step` returns; tensors without a graph.

    Attributes:
        loss: 0-d, the window's loss, in the unit of `loss_fn` (nats a token for cross entropy).
        outputs: the model's outputs.
        gradient_norm: 0-d, norm of the model's gradient, synthetic part included, before clipping.
        synthetic: None without a synthesizer, and where the step was left out.
        skipped: 0-d bool, whether the step was left out for a NaN or an infinity in the loss or the gradient.
        events: what a user should know of this step, as texts: that it was left out, where the first NaN was, that the
            synthesizer was reset. On a GPU they come at a later step, when the counts are read.
    """

    loss: Tensor
    outputs: Any
    gradient_norm: Tensor
    synthetic: Synthetic | None
    skipped: Tensor
    events: tuple[str, ...] = ()


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
    if reduction == "lane-mean" and losses.dim() < 2:
        raise ValueError(f'"lane-mean" needs unreduced losses [T, B], this loss_fn returned shape {list(losses.shape)}')
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
        synthetic_scale: c, the share of the synthetic gradient that is injected; "auto" for the share that comparisons
            with exact gradients find right, horizon by horizon, starting from 0.
        discount: γ, how much the message behind a window counts.
        targets: "bootstrap" trains the synthesizer at every window, on its own message behind it; "lambda" every
            `replay_windows` windows, on λ-targets computed by replaying them.
        lam: λ: 0 is the bootstrapped target, 1 that of exact BPTT over the replayed windows.
        replay_windows: K, how many windows are replayed: for λ-targets, and for the fidelity of a message that stands for
            all windows to come, a tail's or the only one.
        regress_every: n: targets are computed at one window of n, drawn at random, and the synthesizer is trained there; one
            that learns ahead, as `FutureGradient`, is trained at every window. One that learns a window's own
            gradient and nothing behind it, as a `MultiHorizonSynthesizer` of one horizon does, keeps quiet at its target,
            since the gradient then arrives alone and costs nothing; others send their messages at all windows, and so
            does every one beside an auxiliary task. λ-targets are not thinned out.
        target_network: every so many windows a copy of the synthesizer is made, whose messages go into targets; 0 for off.
        fidelity_every: every so many windows messages are compared with exact gradients; 0 for never.
        auxiliary: an `AuxiliaryTask` whose loss joins the window's; its parameters go to `synthesizer_optimizer`, and learn
            at every window. The model's outputs must then be one time-major tensor, since the window is run in two parts.
        auxiliary_weight: w, the share of that loss.
        clip: largest norm of the model's gradient, None for no limit.
        synthesizer_clip: largest norm of the synthesizer's gradient, None for no limit.
        batch_dim: where the lanes lie in `inputs` and `targets`; windows are time-major, so 1.
        state_batch_dim: where the lanes lie in the state's leaves, an int or a nest shaped like the state (nn.LSTM: 1,
            nn.LSTMCell: 0).
        initial_state: the state in which sequences start: a nest, or a function of the number of lanes; else
            `model.initial_state(B)`, else None at first, and zeros where a lane ends.
        reduction: how unreduced losses become one number: see `window_loss`.
        autocast: dtype to run the model's forward in under `torch.autocast`, None for full precision.
        skip_limit: how many windows in a row may be left out for a NaN or an infinity before `step` raises.
        parallel: this rank's part in a run whose lanes are spread over several ranks, None for one process. Every rank
            steps with its own lanes of the same windows; gradients are summed and statistics averaged over all. A loss_fn
            that returns a scalar must average over lanes. `state_dict` then is a collective, and holds all lanes.

    Raises:
        ValueError: a setting is out of its range, a parameter is in both optimizers, or the model is wrapped in
            DistributedDataParallel, which would reduce gradients a second time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Tensor], Tensor],
        *,
        synthesizer: nn.Module | None = None,
        synthesizer_optimizer: torch.optim.Optimizer | None = None,
        synthetic_scale: float | Literal["auto"] = 0.1,
        discount: float = 0.9,
        targets: Literal["bootstrap", "lambda"] = "bootstrap",
        lam: float = 0.9,
        replay_windows: int = 8,
        regress_every: int = 1,
        target_network: int = 0,
        fidelity_every: int = 0,
        auxiliary: nn.Module | None = None,
        auxiliary_weight: float = 0.1,
        clip: float | None = None,
        synthesizer_clip: float | None = 1.0,
        batch_dim: int = 1,
        state_batch_dim: Any = 1,
        initial_state: State | Callable[[int], State] | None = None,
        reduction: Reduction = "mean",
        autocast: torch.dtype | None = None,
        skip_limit: int = 10,
        parallel: DataParallel | None = None,
    ) -> None:
        settings = CreditSettings(
            synthetic_scale,
            discount,
            synthesizer_clip,
            targets,
            lam,
            replay_windows,
            regress_every,
            target_network,
            fidelity_every,
        )
        settings.check()
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None for no limit, got {clip}")
        if reduction not in REDUCTIONS:
            raise ValueError(f'reduction must be "mean", "lane-mean" or "sum", got {reduction!r}')
        if auxiliary is not None and synthesizer is None:
            raise ValueError("the auxiliary task predicts synthetic gradients: give a synthesizer too")
        if not 0 <= auxiliary_weight < float("inf"):
            raise ValueError(f"auxiliary_weight must be 0 or more, got {auxiliary_weight}")
        if skip_limit < 1:
            raise ValueError(f"skip_limit must be 1 or more, got {skip_limit}")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("SequenceTrainer reduces gradients itself: give it the bare model, and parallel=")
        self.parallel = parallel
        self.auxiliary = auxiliary
        self.auxiliary_weight = auxiliary_weight
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.clip = clip
        self.batch_dim = batch_dim
        self.state_batch_dim = state_batch_dim
        self.reduction: Reduction = reduction
        self.autocast = autocast
        self.state: State | None = None
        self.steps = 0
        self._initial_state = initial_state
        self._saved: dict[str, Any] | None = None
        self.credit: SyntheticCredit | None = None
        if synthesizer is not None:
            learning = [p for part in (synthesizer, auxiliary) if part is not None for p in part.parameters()]
            if synthesizer_optimizer is None and any(p.requires_grad for p in learning):
                synthesizer_optimizer = torch.optim.Adam(learning, lr=1e-3)
            _check_apart(optimizer, synthesizer_optimizer)
            self.credit = SyntheticCredit(
                synthesizer, synthesizer_optimizer, self._replayer(), settings, auxiliary, parallel
            )
            if parallel is not None:
                for part in (synthesizer, auxiliary):
                    if part is not None:
                        parallel.synchronize(part)
        self.skip_limit = skip_limit
        self._tally = Tally()
        self._reported = 0
        self._stepped = False
        self._buffers = Kept(buffers_of([model]))
        self._alone = Alone("step was called while a step of this trainer is under way: each thread needs its own trainer")

    @property
    def skipped(self) -> int:
        """Windows left out so far for a NaN or an infinity; this waits for a GPU."""
        return self._tally.total

    def skip_counts(self) -> dict[str, float]:
        """What was left out so far, by TensorBoard key: steps, and the synthesizer's part of steps; this waits for a GPU."""
        counts: dict[str, float] = {"train/skipped": self.skipped}
        if self.credit is not None:
            counts["synthetic/skipped"] = self.credit.skipped
        return counts

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

        A step happens whole or not at all. After an exception, of the user's code or of this one, parameters, optimizers,
        buffers, hidden state, random state and counters are as before it, and gradients are cleared. A NaN or an infinity in
        the loss or the gradient leaves the step out: only `steps` goes up and `ends` is obeyed.

        Args:
            inputs: [T, B, ...], the model's inputs.
            targets: [T, B, ...], passed to `loss_fn`.
            ends: [B] bool, lanes whose sequence ends with this window: nothing is injected there, and the next window of
                the lane starts from the initial state.
            mask: [T, B] bool, steps that count in the loss; `loss_fn` must then return unreduced losses.
            lookahead: the steps behind the window, for a synthesizer that looks ahead (`dni_seq.with_lookahead`).

        Raises:
            ValueError: shapes do not agree; nothing has changed then.
            NonFiniteError: `skip_limit` windows in a row had to be left out; the text says where it began.
            RuntimeError: another step of this trainer is under way.
        """
        self._check_window(inputs, targets, ends)
        with self._alone:
            start = self._start(inputs, inputs.shape[self.batch_dim])
            randomness = Randomness.now(inputs.device)
            self._buffers.keep()
            if self.credit is not None:
                self.credit.keep()
            # What an optimizer cannot do shows at its first step: LBFGS, sparse gradients, memory for the moments.
            whole = None if self._stepped else self._whole()
            try:
                result = self._step(Past(inputs, targets, mask, ends, start, None), lookahead)
            except NonFiniteError:
                raise
            except BaseException:
                self._undo()
                if whole is not None:
                    whole.restore()
                randomness.restore()
                raise
            self._stepped = True
            return result

    def _step(self, window: Past, lookahead: Lookahead | None) -> StepResult:
        """One step from a checked window, `window.start` its first state."""
        inputs, targets, mask, ends, start, _ = window
        credit = self.credit
        context = None
        if lookahead is not None and credit is not None and credit.looks_back:
            context = ahead_of_window(inputs, targets, mask, lookahead)
        self._zero_gradients()
        with defer_backward() as scope:
            trigger = self._make_trigger(start, context)
            outputs, early, last = self._run_window(inputs, trigger)
            loss = self._loss(outputs, targets, mask)
            backward(loss)
            exchange = None if credit is None else credit.inject(scope, loss, last, ends, lookahead)
            if self.auxiliary is not None and credit is not None and exchange is not None and not credit.disabled:
                share = self.auxiliary_weight if self.parallel is None else self.auxiliary_weight / self.parallel.ranks.size
                backward(share * self.auxiliary(early, exchange.injected[0]))
        # Joined before it is judged: a NaN on one rank leaves the step out on all of them.
        measured = loss.detach() if self.parallel is None else self._join(self.parallel, loss.detach(), exchange)
        norm = gradient_norm(self.optimizer)
        good = all_finite(measured, norm)
        result = StepResult(measured, states.detach(outputs), norm, None, ~good)
        if self._decided_here(good, start) and not good:
            return self._leave_out(window, result)
        last = states.owned(last)
        # All that may fail comes before the optimizers, whose steps cannot be taken back.
        following = self._following(last if self._decided_here(good, start) else choose(good, last, start), ends)
        synthetic = None
        if credit is not None and exchange is not None:
            past = None if start is None else window._replace(context=context)
            synthetic = credit.learn(exchange, past, last, lookahead)
        clipped_step(self.optimizer, self.clip, norm, good)
        if not self._decided_here(good, start):
            self._buffers.restore_unless(good)
        self._tally.add(good)
        self.state = following
        self.steps += 1
        return result._replace(synthetic=synthetic, events=self._events(window, result))

    def _following(self, last: State, ends: Tensor | None) -> State:
        """The state that the next window starts from: `last`, but for lanes that end, which start anew."""
        if ends is None:
            return last
        return states.reset_lanes(last, ends, self.initial_state(len(ends)), self.state_batch_dim)

    def _decided_here(self, good: Tensor, start: State | None) -> bool:
        """Whether to read `good` at once: where that is free, and where no device could do without."""
        return decided_here(good) or start is None or not leaves_out_by_itself(self.optimizer)

    def _leave_out(self, window: Past, result: StepResult) -> StepResult:
        """Leave the step out; lanes whose state is broken start anew.

        Raises:
            NonFiniteError: it is one too many.
        """
        where = self._where(window, result)
        following = window.start
        if following is not None:
            broken = broken_lanes(following, self.state_batch_dim)
            following = self._following(self._following(following, broken), window.ends)
        self._undo()
        if self.credit is not None:
            self.credit.leave_out(broken_auxiliary=self._auxiliary_broken(result))
        self._tally.add(~result.skipped)
        self.state = following
        self.steps += 1
        self._reported = self._tally.total
        self._check_row(where)
        events = [f"step {self.steps} left out, the first NaN or infinity: {where}"]
        return result._replace(events=(*events, *self._credit_events()))

    def _whole(self) -> Whole:
        """A copy of all parameters, buffers and moments."""
        modules = [self.model, *(self.credit.modules if self.credit is not None else ())]
        return Whole(modules, [part for part in self._parts().values() if isinstance(part, torch.optim.Optimizer)])

    def _undo(self) -> None:
        """Put back what a step has changed before its optimizers ran."""
        self._buffers.restore()
        if self.credit is not None:
            self.credit.undo()
        self._zero_gradients()

    def _events(self, window: Past, result: StepResult) -> tuple[str, ...]:
        """What there is to say of a step that was not left out here; now and then what a GPU has counted.

        Raises:
            NonFiniteError: a GPU has left out too many.
        """
        events = self._credit_events()
        if not decided_here(result.skipped) and self.steps % self.skip_limit == 0:
            if self._tally.in_a_row >= self.skip_limit:
                self._check_row(self._where(window, result))
            if self._tally.total > self._reported:
                count, self._reported = self._tally.total - self._reported, self._tally.total
                events = (f"{count} of the last {self.skip_limit} steps left out for a NaN or an infinity", *events)
        return events

    def _credit_events(self) -> tuple[str, ...]:
        return () if self.credit is None else self.credit.take_events(self.steps)

    def _check_row(self, where: str) -> None:
        """Raise a NonFiniteError where too many windows in a row were left out."""
        row = self._tally.in_a_row
        if row >= self.skip_limit:
            raise NonFiniteError(
                f"{row} windows in a row were left out, from step {self.steps - row + 1} on, for a NaN or an infinity; it "
                f"appeared first in {where}. Parameters are those before that step; a smaller learning rate or clip may help"
            )

    def _where(self, window: Past, result: StepResult) -> str:
        """Where the first NaN or infinity of a window is, in the order of computation, and on which of several ranks."""
        parts = [(name, module) for name, module in (("", self.model), ("auxiliary.", self.auxiliary)) if module is not None]
        named: list[tuple[str, Any]] = [
            ("the inputs", window.inputs),
            ("the state that the window starts from", window.start),
            *((f"the parameter {n}", p) for n, p in self.model.named_parameters()),
            *((f"the buffer {n}", b) for n, b in self.model.named_buffers()),
            ("the model's outputs", result.outputs),
            ("the targets", window.targets),
            ("the loss", result.loss),
            *((f"the parameter auxiliary.{n}", p) for pre, m in parts if pre for n, p in m.named_parameters()),
            *((f"the gradient of {pre}{n}", dense(p.grad)) for pre, m in parts for n, p in m.named_parameters()),
        ]
        found = first_not_finite(named)
        return found[1] if self.parallel is None else self.parallel.first(*found)

    def _auxiliary_broken(self, result: StepResult) -> bool:
        """Whether the auxiliary task's own parameters are to blame for a window that is left out."""
        if self.auxiliary is None or not result.loss.isfinite():
            return False
        tensors = (*self.auxiliary.parameters(), *self.auxiliary.buffers())
        return not all(bool(tensor.isfinite().all()) for tensor in tensors)

    def reset(self) -> None:
        """Start all lanes anew: the next window begins in the initial state, and follows none of those before it."""
        self.state = None
        if self._saved is not None:
            credit = self._saved["credit"]
            self._saved = {"state": None, "credit": None if credit is None else without_chain(credit)}
        if self.credit is not None:
            self.credit.break_chain()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as nests of dicts and lists of tensors and numbers."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        streaming = self._saved
        if streaming is None:
            streaming = {
                "state": None if self.state is None else states.flatten(self._of_all_ranks(self.state)),
                "credit": None if self.credit is None else self.credit.state_dict(),
            }
        return {**parts, **streaming, "steps": self.steps, "skipped": self._tally.state_dict()}

    def load_state_dict(self, saved: dict[str, Any], lanes: int | None = None) -> None:
        """Take over what `state_dict` gave; the hidden state's nest comes from the initial state.

        Args:
            saved: what `state_dict` gave. Counts of windows that were left out are missing in what older versions saved.
            lanes: B of all ranks, for a trainer that has an initial state, to take the hidden state over and check it now;
                None to do so at the next step.

        Raises:
            ValueError: it was saved by a trainer of other parts, with or without a synthesizer, say.
        """
        parts = self._parts()
        expected = {*parts, "state", "credit", "steps"}
        if set(saved) - {"skipped"} != expected:
            raise ValueError(f"the saved trainer has parts {sorted(saved)}, this one {sorted(expected)}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self.state = None
        self._saved = {"state": saved["state"], "credit": saved["credit"]}
        self.steps = saved["steps"]
        self._tally.load_state_dict(saved.get("skipped", {"total": 0, "in_a_row": 0}))
        self._reported = self._tally.total
        if lanes is not None:
            mine = lanes if self.parallel is None else lanes // self.parallel.ranks.size
            self._take_saved(self.initial_state(mine))

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.credit is not None:
            parts["synthesizer"] = self.credit.synthesizer
            if self.auxiliary is not None:
                parts["auxiliary"] = self.auxiliary
            if self.credit.optimizer is not None:
                parts["synthesizer_optimizer"] = self.credit.optimizer
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
        """The state that the window starts from; what was loaded takes its nest here."""
        if self._saved is not None:
            self._take_saved(self._nest(inputs, lanes))
        return self.initial_state(lanes) if self.state is None else self.state

    def _take_saved(self, nest: State) -> None:
        """Fill a state's nest with what was loaded.

        Raises:
            ValueError: a leaf has not the shape of the nest's.
        """
        if self._saved is None:
            return
        leaves = self._saved["state"]
        if leaves is not None:
            state = states.unflatten(nest, leaves)
            dims = states.spread(self.state_batch_dim, nest, "state_batch_dim")
            for leaf, like, dim in zip(leaves, states.flatten(nest), dims, strict=True):
                if not isinstance(like, Tensor):
                    continue
                expected, shape = self._shape_of_all(like, dim), list(leaf.shape) if isinstance(leaf, Tensor) else None
                if shape != expected:
                    found = type(leaf).__name__ if shape is None else shape
                    raise ValueError(f"the saved hidden state has a leaf {found}, this model's is {expected}")
        if self.credit is not None:
            self.credit.load_state_dict(self._saved["credit"], nest)
        if leaves is not None:
            self.state = self._of_this_rank(state)
        self._saved = None

    @torch.no_grad()
    def _nest(self, inputs: Tensor, lanes: int) -> State:
        """A state of the right nest, for saved leaves to fill; without an initial state it takes a run of the model."""
        initial = self.initial_state(lanes)
        if initial is None:
            with torch.random.fork_rng():
                initial = self._run(inputs, None)[1]
        return initial

    def _make_trigger(self, start: State | None, context: Lookahead | None) -> State | None:
        if start is None:
            return None
        return states.detach(start) if self.credit is None else self.credit.make_trigger(start, context)

    def _run_window(self, inputs: Tensor, state: State | None) -> tuple[Any, State, State]:
        """Outputs, the state that the auxiliary task reads, and the last state."""
        if self.auxiliary is None or len(inputs) == 1:
            outputs, last = self._run(inputs, state)
            return outputs, last, last
        first, early = self._run(inputs[:1], state)
        rest, last = self._run(inputs[1:], early)
        return torch.cat([first, rest]), early, last

    def _run(self, inputs: Tensor, state: State | None) -> tuple[Any, State]:
        """Run the model on a copy of `state`, so that one that writes into its state harms neither trainer nor trigger."""
        device = inputs.device.type
        state = None if state is None else states.copied(state)
        with contextlib.nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast):
            result: tuple[Any, State] = self.model(inputs, state)
        return result

    def _loss(self, outputs: Any, targets: Tensor, mask: Tensor | None) -> Tensor:
        with contextlib.nullcontext() if self.autocast is None else torch.autocast(targets.device.type, dtype=self.autocast):
            losses = self.loss_fn(outputs, targets)
            loss = window_loss(losses, mask, self.reduction)
            if self.parallel is None or (self.reduction == "sum" and losses.dim() > 0):
                return loss
            return self.parallel.share_of_mean(loss, mask if self.reduction == "mean" else None)

    def _replayer(self) -> Replayer:
        return Replayer(self._run, self.model, self._loss, self.initial_state, self.state_batch_dim, self.batch_dim)

    def _of_all_ranks(self, state: State) -> State:
        return state if self.parallel is None else states.map_lanes(self.parallel.all, state, self.state_batch_dim)

    def _of_this_rank(self, state: State) -> State:
        return state if self.parallel is None else states.map_lanes(self.parallel.own, state, self.state_batch_dim)

    def _shape_of_all(self, leaf: Tensor, dim: int) -> list[int]:
        """The shape that a leaf with this rank's lanes has with those of all ranks."""
        shape = list(leaf.shape)
        if self.parallel is not None and shape:
            shape[dim] *= self.parallel.ranks.size
        return shape

    def _join(self, parallel: DataParallel, loss: Tensor, exchange: Exchange | None) -> Tensor:
        """Sum all gradients over the ranks, and the losses that are measured, in one all-reduce; the whole window's loss."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = [loss.clone()]
        if self.auxiliary is not None:
            parameters += self.auxiliary.parameters()
        if self.credit is not None and exchange is not None:
            exchange.regressions = [self.credit.divided(regression) for regression in exchange.regressions]
            parameters += self.credit.synthesizer.parameters()
            numbers += [number for regression in exchange.regressions for number in regression]
        parallel.sum_gradients(parameters, numbers)
        return numbers[0]

    def _zero_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.credit is not None and self.credit.optimizer is not None:
            self.credit.optimizer.zero_grad()

    def _check_window(self, inputs: Tensor, targets: Tensor, ends: Tensor | None) -> None:
        if not torch.is_grad_enabled():
            raise ValueError("step trains: call it outside of torch.no_grad() and torch.inference_mode()")
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


def dense(gradient: Tensor | None) -> Tensor | None:
    """The same gradient, a row-sparse one with all its rows."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _check_apart(optimizer: torch.optim.Optimizer, synthesizer_optimizer: torch.optim.Optimizer | None) -> None:
    if synthesizer_optimizer is None:
        return
    shared = _parameters(optimizer) & _parameters(synthesizer_optimizer)
    if shared:
        raise ValueError(
            f"{len(shared)} parameters are in both optimizers: give the model's to one and the synthesizer's to the other"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
