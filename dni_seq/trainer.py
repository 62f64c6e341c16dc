"""SequenceTrainer: truncated BPTT over a stream of windows, with or without synthetic gradients.

Truncated BPTT ignores the effect of a window's last state on all later losses. A synthesizer predicts the gradient of those
losses with respect to that state, and the trainer injects the prediction.

Source: Jaderberg et al. 2017, arXiv 1608.05343, sections 2.1 and 3.1. We differ in three points: the injected share c
(`synthetic_scale`) and the discount γ (`discount`) are two numbers, the regression is normalised, and each lane of the batch
ends its sequence on its own.

Legend: T = window length in steps, B = lanes (batch), H = hidden units, N = horizons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite, states
from dni_seq.core.deferred_backward import backward, defer_backward
from dni_seq.core.nonfinite import NonFiniteError, both_finite, broken_lanes, select_where
from dni_seq.core.optimizer_step import check_disjoint, clipped_step, gradient_norm, supports_found_inf
from dni_seq.core.snapshot import ReentrancyGuard, RNGState, TensorSnapshot, TrainingSnapshot, buffers_of
from dni_seq.core.states import State
from dni_seq.core.windows import REDUCTIONS, Lookahead, Reduction
from dni_seq.credit.config import CreditSettings
from dni_seq.credit.nonfinite_policy import NonFinitePolicy, diagnose
from dni_seq.credit.replay import RecordedWindow
from dni_seq.credit.results import StepResult
from dni_seq.credit.synthetic_gradient import SyntheticCredit, without_chain
from dni_seq.credit.window_runner import WindowRunner, lookahead_at_start
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.interfaces.exchange import ScopeExchange


class SequenceTrainer:
    """Trains an RNN on a stream of windows, one window per `step`; the hidden state is carried between windows.

    Without a synthesizer this is truncated BPTT. With a synthesizer, a prediction of the gradient that later windows would
    send back is injected into the last state of each window.

    Args:
        model: `model(inputs, state) -> (outputs, state)`. A state is a tensor or any nest of tuples, lists and dicts of
            tensors. It is None at the start of a stream without an initial state.
        optimizer: of the model's parameters.
        loss_fn: `loss_fn(outputs, targets)`, a scalar or unreduced losses [T, B].
        synthesizer: predicts the gradient of all later losses with respect to a window's last state. None for plain
            truncated BPTT.
        synthesizer_optimizer: of the synthesizer's parameters. Default: Adam with learning rate 1e-3.
        synthetic_scale: c, the share of the message that is injected. "auto" starts at 0 and is adjusted for each horizon by
            comparisons with exact gradients; it needs `fidelity_every`.
        discount: γ: a window's target is the gradient of its own loss plus γ times the message at its last state,
            backpropagated to its first state.
        targets: "bootstrap" trains the synthesizer towards a target that holds its own next message. "lambda" trains it on
            λ-targets every `replay_windows` windows, by replaying them.
        lam: λ of "lambda": 0 is the bootstrapped target, 1 that of exact BPTT over the replayed windows.
        replay_windows: number of windows in a replay.
        regress_every: n: targets are computed at one window in n, chosen at random. A synthesizer that fits targets trains
            only there; `FutureGradient` needs no targets and trains at every window.
        target_network: number of windows between updates of a frozen copy that supplies the messages in targets; 0 for none.
        fidelity_every: number of windows between comparisons of messages with exact gradients; 0 for none.
        auxiliary: an `AuxiliaryTask`. Its loss is added to the window's, and its parameters belong to
            `synthesizer_optimizer`. The model's outputs must be one time-major tensor.
        auxiliary_weight: weight of that loss.
        clip: largest norm of the model's gradient, None for no limit.
        synthesizer_clip: largest norm of the synthesizer's gradient, None for no limit.
        batch_dim: dimension of the lanes in `inputs` and `targets`; windows are time-major, so 1.
        state_batch_dim: dimension of the lanes in the state's leaves, an int or a nest like the state (nn.LSTM: 1,
            nn.LSTMCell: 0).
        initial_state: the state in which sequences start: a nest, or a function of the number of lanes. Default:
            `model.initial_state(B)` if it exists, else None for the first window and zeros for lanes that end.
        reduction: how losses [T, B] become one number: "mean" over the steps that count, "lane-mean" (sum over time,
            mean over lanes) or "sum".
        autocast: dtype of `torch.autocast` for the model and the loss, None for full precision.
        skip_limit: `step` raises a NonFiniteError at this many windows in a row that are skipped for a NaN or an infinity.
        parallel: the `DataParallel` of this rank if the lanes are split over processes. Each rank steps with its own lanes.
            Gradients are summed over the ranks. A scalar `loss_fn` must average over lanes. `state_dict` is then a
            collective call and holds all lanes.

    Attributes:
        state: the hidden state that the next window starts from, None before the first window.
        steps: number of windows so far, skipped ones included.

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
            raise ValueError("auxiliary predicts the messages of a synthesizer: give a synthesizer too")
        if not 0 <= auxiliary_weight < float("inf"):
            raise ValueError(f"auxiliary_weight must be 0 or more, got {auxiliary_weight}")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("SequenceTrainer reduces gradients itself: pass the bare model, not DDP, and parallel=")
        self.parallel = parallel
        self.auxiliary = auxiliary
        self.auxiliary_weight = auxiliary_weight
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.runner = WindowRunner(model, loss_fn, reduction, autocast, batch_dim, state_batch_dim, initial_state, parallel)
        self.state: State | None = None
        self.steps = 0
        self._saved: dict[str, Any] | None = None
        self.credit: SyntheticCredit | None = None
        if synthesizer is not None:
            learning = [p for part in (synthesizer, auxiliary) if part is not None for p in part.parameters()]
            if synthesizer_optimizer is None and any(p.requires_grad for p in learning):
                synthesizer_optimizer = torch.optim.Adam(learning, lr=1e-3)
            check_disjoint(optimizer, synthesizer_optimizer)
            self.credit = SyntheticCredit(synthesizer, synthesizer_optimizer, self.runner, settings, auxiliary, parallel)
            if parallel is not None:
                for part in (synthesizer, auxiliary):
                    if part is not None:
                        parallel.synchronize(part)
        self.skip_policy = NonFinitePolicy(skip_limit)
        self._stepped = False
        self._buffers = TensorSnapshot(buffers_of([model]))
        self._reentrancy_guard = ReentrancyGuard(
            "step was called while another step of this trainer is running: use one trainer per thread"
        )

    @property
    def skipped(self) -> int:
        """Number of windows skipped so far because of a NaN or an infinity. Reading it synchronises with the GPU."""
        return self.skip_policy.total

    def skip_counts(self) -> dict[str, float]:
        """Returns the numbers of skipped windows by TensorBoard key; synchronises with the GPU.

        "train/skipped" counts steps; "synthetic/skipped" counts windows whose message or regression was skipped.
        """
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
        """Trains on one window and carries the hidden state to the next window.

        A step is atomic. If it raises an exception, parameters, optimizers, buffers, hidden state, random state and counters
        are restored, and gradients are cleared. If the loss or the gradient holds a NaN or an infinity, the step is skipped:
        model, optimizer and hidden state stay, lanes in `ends` and lanes with a NaN are reset, and `steps` goes up.

        Args:
            inputs: [T, B, ...], the model's inputs.
            targets: [T, B, ...], passed to `loss_fn`.
            ends: [B] bool, True for lanes whose sequence ends with this window. Nothing is injected there, and the next
                window of the lane starts from the initial state.
            mask: [T, B] bool, True for steps that count in the loss; `loss_fn` must then return unreduced losses.
            lookahead: the steps after the window, for a synthesizer that needs them (`dni_seq.with_lookahead`).

        Raises:
            ValueError: shapes do not agree. Nothing has changed then.
            NonFiniteError: this is the `skip_limit`-th skipped window in a row. The message names the first bad tensor.
            RuntimeError: another step of this trainer is running.
        """
        self.runner.check_window(inputs, targets, ends)
        with self._reentrancy_guard:
            start = self._start(inputs, inputs.shape[self.runner.batch_dim])
            randomness = RNGState.now(inputs.device)
            self._buffers.keep()
            if self.credit is not None:
                self.credit.keep()
            # An optimizer that cannot step (LBFGS, sparse gradients, memory for moments) fails at its first step: copy all.
            snapshot = None if self._stepped else self._full_snapshot()
            try:
                result = self._step(RecordedWindow(inputs, targets, mask, ends, start, None), lookahead)
            except NonFiniteError:
                raise
            except BaseException:
                self._undo()
                if snapshot is not None:
                    snapshot.restore()
                randomness.restore()
                raise
            self._stepped = True
            return result

    def _step(self, window: RecordedWindow, lookahead: Lookahead | None) -> StepResult:
        """Performs one step on a checked window whose first state is `window.start`."""
        inputs, targets, mask, ends, start, _ = window
        credit = self.credit
        context = None
        if lookahead is not None and credit is not None and credit.looks_back:
            context = lookahead_at_start(inputs, targets, mask, lookahead)
        self._zero_gradients()
        with defer_backward() as scope:
            trigger = states.detach(start) if credit is None or start is None else credit.make_trigger(start, context)
            if self.auxiliary is None:
                outputs, last = self.runner.run(inputs, trigger)
                early = last
            else:
                outputs, early, last = self.runner.run_in_two_parts(inputs, trigger)
            loss = self.runner.loss(outputs, targets, mask)
            backward(loss)
            exchange = None if credit is None else credit.inject(scope, loss, last, ends, lookahead)
            if self.auxiliary is not None and credit is not None and exchange is not None and not credit.disabled:
                share = self.auxiliary_weight if self.parallel is None else self.auxiliary_weight / self.parallel.ranks.size
                backward(share * self.auxiliary(early, exchange.injected[0]))
        # Ranks sum before the check, so that a NaN on one rank skips the step on all ranks.
        measured = loss.detach() if self.parallel is None else self._join(self.parallel, loss.detach(), exchange)
        norm = gradient_norm(self.optimizer)
        good = both_finite(measured, norm)
        result = StepResult(measured, states.detach(outputs), norm, None, ~good)
        if self._reads_on_host(good, start) and not good:
            return self._skip_step(window, result)
        last = states.detach_clone(last)
        # Everything that may fail runs before the optimizers' steps, which cannot be undone.
        next_state = self.runner.reset(last if self._reads_on_host(good, start) else select_where(good, last, start), ends)
        synthetic = None
        if credit is not None and exchange is not None:
            past = None if start is None else window._replace(context=context)
            synthetic = credit.learn(exchange, past, last, lookahead)
        clipped_step(self.optimizer, self.clip, norm, good)
        if not self._reads_on_host(good, start):
            self._buffers.restore_unless(good)
        self.skip_policy.count(good)
        self.state = next_state
        self.steps += 1
        return result._replace(synthetic=synthetic, events=self._events(window, result))

    def _reads_on_host(self, good: Tensor, start: State | None) -> bool:
        """Returns whether to read `good` on the host: if that is free, or if no device can skip the step."""
        return nonfinite.readable_without_sync(good) or start is None or not supports_found_inf(self.optimizer)

    def _skip_step(self, window: RecordedWindow, result: StepResult) -> StepResult:
        """Skips the step, and resets lanes whose state holds a NaN or an infinity.

        Raises:
            NonFiniteError: `skip_limit` windows in a row were skipped.
        """
        where = self._diagnose(window, result)
        next_state = window.start
        if next_state is not None:
            broken = broken_lanes(next_state, self.runner.state_batch_dim)
            next_state = self.runner.reset(self.runner.reset(next_state, broken), window.ends)
        self._undo()
        if self.credit is not None:
            self.credit.skip_step(broken_auxiliary=self._auxiliary_broken(result))
        self.state = next_state
        self.steps += 1
        self.skip_policy.count_skipped(result.skipped, self.steps, where)
        events = [f"step {self.steps} skipped; first NaN or infinity in {where}"]
        return result._replace(events=(*events, *self._credit_events()))

    def _full_snapshot(self) -> TrainingSnapshot:
        """Returns a copy of all parameters, buffers and optimizer states."""
        modules = [self.model, *(self.credit.modules if self.credit is not None else ())]
        return TrainingSnapshot(
            modules, [part for part in self._parts().values() if isinstance(part, torch.optim.Optimizer)]
        )

    def _undo(self) -> None:
        """Undoes what a step has changed before its optimizers run."""
        self._buffers.restore()
        if self.credit is not None:
            self.credit.undo()
        self._zero_gradients()

    def _events(self, window: RecordedWindow, result: StepResult) -> tuple[str, ...]:
        """Returns the messages for an accepted step. On CUDA, skip counts are read only every `skip_limit` steps.

        Raises:
            NonFiniteError: `skip_limit` windows in a row were skipped on the device.
        """
        events = self._credit_events()
        if nonfinite.readable_without_sync(result.skipped):
            return events
        return (*self.skip_policy.read_counts(self.steps, lambda: self._diagnose(window, result)), *events)

    def _diagnose(self, window: RecordedWindow, result: StepResult) -> str:
        return diagnose(self.model, self.auxiliary, window, result.outputs, result.loss, self.parallel)

    def _credit_events(self) -> tuple[str, ...]:
        return () if self.credit is None else self.credit.take_events(self.steps)

    def _auxiliary_broken(self, result: StepResult) -> bool:
        """Returns whether the auxiliary task's own tensors hold a NaN or an infinity although the loss is finite."""
        if self.auxiliary is None or not result.loss.isfinite():
            return False
        tensors = (*self.auxiliary.parameters(), *self.auxiliary.buffers())
        return not all(bool(tensor.isfinite().all()) for tensor in tensors)

    def reset(self) -> None:
        """Resets all lanes: the next window starts from the initial state and does not continue an earlier window."""
        self.state = None
        if self._saved is not None:
            credit = self._saved["credit"]
            self._saved = {"state": None, "credit": None if credit is None else without_chain(credit)}
        if self.credit is not None:
            self.credit.break_chain()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything needed to resume training, as nested dicts and lists of tensors and numbers.

        The global random state is not included. With `parallel` this is a collective call and the result holds all lanes.
        """
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        streaming = self._saved
        if streaming is None:
            streaming = {
                "state": None if self.state is None else states.flatten(self._of_all_ranks(self.state)),
                "credit": None if self.credit is None else self.credit.state_dict(),
            }
        return {**parts, **streaming, "steps": self.steps, "skipped": self.skip_policy.state_dict()}

    def load_state_dict(self, saved: dict[str, Any], lanes: int | None = None) -> None:
        """Restores what `state_dict` returned; the nesting of the hidden state comes from the initial state.

        Args:
            saved: what `state_dict` returned. Skip counts may be missing, as in states that older versions saved.
            lanes: B over all ranks. If given, the hidden state is restored and checked now; the trainer must then know its
                initial state. None to restore it at the next `step`.

        Raises:
            ValueError: the saved trainer has other parts (a synthesizer, for example), or with `lanes` another hidden state.
        """
        parts = self._parts()
        expected = {*parts, "state", "credit", "steps"}
        if set(saved) - {"skipped"} != expected:
            raise ValueError(f"the saved trainer has the parts {sorted(saved)}, this trainer needs {sorted(expected)}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self.state = None
        self._saved = {"state": saved["state"], "credit": saved["credit"]}
        self.steps = saved["steps"]
        self.skip_policy.load_state_dict(saved.get("skipped", {"total": 0, "in_a_row": 0}))
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
        """Returns the initial state of `lanes` sequences, or None if the model creates it itself when called with None."""
        return self.runner.initial_state(lanes)

    def _start(self, inputs: Tensor, lanes: int) -> State | None:
        """Returns the state that the window starts from; restores a loaded state first."""
        if self._saved is not None:
            self._take_saved(self.runner.state_template(inputs, lanes))
        return self.initial_state(lanes) if self.state is None else self.state

    def _take_saved(self, nest: State) -> None:
        """Restores the loaded hidden state, in the nesting and shapes of `nest`.

        Raises:
            ValueError: a leaf does not have the shape of its leaf in `nest`.
        """
        if self._saved is None:
            return
        leaves = self._saved["state"]
        if leaves is not None:
            state = states.unflatten(nest, leaves)
            self.runner.check_saved(leaves, nest)
        if self.credit is not None:
            self.credit.load_state_dict(self._saved["credit"], nest)
        if leaves is not None:
            self.state = self._of_this_rank(state)
        self._saved = None

    def _of_all_ranks(self, state: State) -> State:
        return state if self.parallel is None else states.map_lanes(self.parallel.all, state, self.runner.state_batch_dim)

    def _of_this_rank(self, state: State) -> State:
        return state if self.parallel is None else states.map_lanes(self.parallel.own, state, self.runner.state_batch_dim)

    def _join(self, parallel: DataParallel, loss: Tensor, exchange: ScopeExchange | None) -> Tensor:
        """Sums gradients, the loss and the regressions over the ranks by one all-reduce; returns the loss of all lanes."""
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
