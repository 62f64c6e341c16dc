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
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite, states
from dni_seq.core.deferred_backward import backward, defer_backward
from dni_seq.core.nonfinite import both_finite, broken_lanes, select_where
from dni_seq.core.optimizer_step import check_disjoint, clipped_step, gradient_norm, supports_found_inf
from dni_seq.core.snapshot import ReentrancyGuard, TensorSnapshot, TrainingSnapshot, buffers_of
from dni_seq.core.states import State
from dni_seq.core.windows import Lookahead, Nest, Reduction, first_tensor
from dni_seq.credit.config import SyntheticGradientConfig
from dni_seq.credit.nonfinite_policy import NonFinitePolicy, diagnose
from dni_seq.credit.replay import RecordedWindow
from dni_seq.credit.results import StepResult
from dni_seq.credit.step_transaction import StepTransaction
from dni_seq.credit.stream_state import StreamState
from dni_seq.credit.synthetic_gradient import SyntheticCredit
from dni_seq.credit.window_runner import WindowRunner, lookahead_at_start
from dni_seq.distributed.data_parallel import DataParallel, SingleProcess
from dni_seq.interfaces.exchange import ScopeExchange

SKIP_LIMIT = 10
"""Skipped windows in a row after which a trainer gives up, unless `skip_limit` is set."""


class SequenceTrainer:
    """Trains an RNN on a stream of windows, one window per `step`; the hidden state is carried between windows.

    Without a synthesizer this is truncated BPTT. With a synthesizer, a prediction of the gradient that later windows would
    send back is injected into the last state of each window.

    Args:
        model: `model(inputs, state) -> (outputs, state)`. A state is a tensor or any nest of tuples, lists and dicts of
            tensors; dicts are matched by key. It is None at the start of a stream without an initial state.
        optimizer: of the model's parameters.
        loss_fn: `loss_fn(outputs, targets)`, a scalar or unreduced losses [T, B].
        synthesizer: predicts the gradient of all later losses with respect to a window's last state. None for plain
            truncated BPTT.
        synthesizer_optimizer: of the synthesizer's parameters. Default: Adam with learning rate 1e-3.
        synthetic_scale: short for `config=SyntheticGradientConfig(synthetic_scale=...)`.
        config: the settings of the synthetic gradient. Default: what the synthesizer recommends.
        clip: largest norm of the model's gradient, None for no limit.
        batch_dim: dimension of the lanes in `inputs` and `targets`; windows are time-major, so 1.
        state_batch_dim: dimension of the lanes in the state's leaves, an int or a nest like the state (nn.LSTM: 1,
            nn.LSTMCell: 0).
        initial_state: the state in which sequences start: a nest, or a function of the number of lanes. Default:
            `model.initial_state(B)` if it exists, else None for the first window and zeros for lanes that end.
        reduction: how losses [T, B] become one number: "mean" over the steps that count, "lane-mean" (sum over time,
            mean over lanes) or "sum".
        autocast: dtype of `torch.autocast` for the model and the loss, None for full precision.
        parallel: the `DataParallel` of this rank if the lanes are split over processes. Each rank steps with its own lanes.
            Gradients are summed over the ranks. A scalar `loss_fn` must average over lanes. `state_dict` is then a
            collective call and holds all lanes.

    Attributes:
        steps: number of windows so far, skipped ones included.
        credit: manages the synthesizer; None without one.

    Raises:
        ValueError: a setting is out of its range, a parameter is in both optimizers, or the model is wrapped in
            DistributedDataParallel, which would reduce gradients a second time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        synthesizer: nn.Module | None = None,
        synthesizer_optimizer: torch.optim.Optimizer | None = None,
        synthetic_scale: float | None = None,
        config: SyntheticGradientConfig | None = None,
        clip: float | None = None,
        batch_dim: int = 1,
        state_batch_dim: Any = 1,
        initial_state: State | Callable[[int], State] | None = None,
        reduction: Reduction = "mean",
        autocast: torch.dtype | None = None,
        parallel: DataParallel | None = None,
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None for no limit, got {clip}")
        self.parallel = SingleProcess() if parallel is None else parallel
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.runner = WindowRunner(
            model, loss_fn, reduction, autocast, batch_dim, state_batch_dim, initial_state, self.parallel
        )
        self.steps = 0
        config = _chosen_config(synthesizer, synthetic_scale, config)
        self.credit: SyntheticCredit | None = None
        if synthesizer is not None:
            self.credit = SyntheticCredit(synthesizer, synthesizer_optimizer, self.runner, config)
            check_disjoint(optimizer, self.credit.optimizer)
        self._stream = StreamState(self.runner, self.credit)
        self._skip_policy = NonFinitePolicy(SKIP_LIMIT)
        self._stepped = False
        self._buffers = TensorSnapshot(buffers_of([model]))
        self._reentrancy_guard = ReentrancyGuard(
            "step was called while another step of this trainer is running: use one trainer per thread"
        )

    @property
    def state(self) -> State | None:
        """The hidden state that the next window starts from, None before the first window."""
        return self._stream.state

    @state.setter
    def state(self, state: State | None) -> None:
        self._stream.state = state

    @property
    def skip_limit(self) -> int:
        """Number of windows skipped in a row, for a NaN or an infinity, at which `step` raises a NonFiniteError."""
        return self._skip_policy.limit

    @skip_limit.setter
    def skip_limit(self, limit: int) -> None:
        self._skip_policy.limit = limit

    @property
    def skipped(self) -> int:
        """Number of windows skipped so far because of a NaN or an infinity. Reading it synchronises with the GPU."""
        return self._skip_policy.total

    def skip_counts(self) -> dict[str, float]:
        """Returns the numbers of skipped windows by TensorBoard key; synchronises with the GPU.

        "train/skipped" counts steps; "synthetic/skipped" counts windows whose message or regression was skipped.
        """
        counts: dict[str, float] = {"train/skipped": self.skipped}
        if self.credit is not None:
            counts["synthetic/skipped"] = self.credit.monitor.total
        return counts

    def step(
        self,
        inputs: Nest,
        targets: Nest,
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
            inputs: [T, B, ...], the model's inputs: a tensor, or a nest of tuples, lists and dicts of such tensors.
            targets: [T, B, ...], passed to `loss_fn`: a tensor or a nest.
            ends: [B] bool, True for lanes whose sequence ends with this window. Nothing is injected there, and the next
                window of the lane starts from the initial state.
            mask: [T, B] bool, True for steps that count in the loss; `loss_fn` must then return unreduced losses.
            lookahead: the steps after the window, for a synthesizer that needs them (`dni_seq.with_lookahead`).

        Raises:
            ValueError, TypeError: shapes do not agree, or a nest holds something else than tensors. Nothing has changed.
            NonFiniteError: this is the `skip_limit`-th skipped window in a row. The message names the first bad tensor.
            RuntimeError: another step of this trainer is running.
        """
        self.runner.check_window(inputs, targets, ends)
        with self._reentrancy_guard:
            start = self._stream.start(inputs)
            with self._transaction(first_tensor(inputs).device) as transaction:
                result = self._step(RecordedWindow(inputs, targets, mask, ends, start, None), lookahead, transaction)
            self._stepped = True
            return result

    def _transaction(self, device: torch.device) -> StepTransaction:
        full = None
        if not self._stepped:
            # An optimizer that cannot step (LBFGS, sparse gradients, memory for moments) fails at its first step: copy all.
            modules = [self.model, *(self.credit.modules if self.credit is not None else ())]
            full = TrainingSnapshot(modules, [p for p in self._parts().values() if isinstance(p, torch.optim.Optimizer)])
        return StepTransaction(device, self._buffers, self.credit, self._skip_policy, self._zero_gradients, full)

    def _step(self, window: RecordedWindow, lookahead: Lookahead | None, transaction: StepTransaction) -> StepResult:
        """Performs one step on a checked window whose first state is `window.start`."""
        start, credit = window.start, self.credit
        context = None
        if lookahead is not None and credit is not None and credit.looks_back:
            context = lookahead_at_start(window.inputs, window.targets, window.mask, lookahead)
        self._zero_gradients()
        loss, outputs, last, exchange = self._backward(window, context, lookahead)
        # Ranks sum before the check, so that a NaN on one rank skips the step on all ranks.
        measured = _sum_over_ranks(self.parallel, self.optimizer, self.credit, loss, exchange)
        norm = gradient_norm(self.optimizer)
        good = both_finite(measured, norm)
        result = StepResult(measured, states.detach(outputs), norm, None, ~good)
        # Read on the host if that is free, or if no device can skip the step.
        on_host = nonfinite.readable_without_sync(good) or start is None or not supports_found_inf(self.optimizer)
        if on_host and not good:
            return self._skip_step(window, result, transaction)
        last = states.detach_clone(last)
        # Everything that may fail runs before the optimizers' steps, which cannot be undone.
        next_state = self.runner.reset(last if on_host else select_where(good, last, start), window.ends)
        synthetic = None
        if credit is not None and exchange is not None:
            past = None if start is None else window._replace(context=context)
            synthetic = credit.learn(exchange, past, last, lookahead)
        clipped_step(self.optimizer, self.clip, norm, good)
        if not on_host:
            self._buffers.restore_unless(good)
        self._skip_policy.count(good)
        self.state = next_state
        self.steps += 1
        return result._replace(synthetic=synthetic, events=self._events(window, result))

    def _backward(
        self, window: RecordedWindow, context: Lookahead | None, lookahead: Lookahead | None
    ) -> tuple[Tensor, Any, State, ScopeExchange | None]:
        """Runs the window and one backward pass through it; returns loss, outputs, last state and the exchange."""
        credit, exchange = self.credit, None
        auxiliary = credit is not None and credit.auxiliary is not None
        with defer_backward() as scope:
            start = window.start
            trigger = states.detach(start) if credit is None or start is None else credit.make_trigger(start, context)
            run = self.runner.run_in_two_parts if auxiliary else self.runner.run_whole
            outputs, early, last = run(window.inputs, trigger)
            loss = self.runner.loss(outputs, window.targets, window.mask)
            backward(loss)
            if credit is not None:
                if not self._stepped:
                    credit.bind(len(first_tensor(window.inputs)))
                exchange = credit.inject(scope, loss, last, window.ends, lookahead)
                if (own := credit.auxiliary_loss(early, exchange)) is not None:
                    backward(own)
        return loss.detach(), outputs, last, exchange

    def _skip_step(self, window: RecordedWindow, result: StepResult, transaction: StepTransaction) -> StepResult:
        """Skips the step, and resets lanes whose state holds a NaN or an infinity.

        Raises:
            NonFiniteError: `skip_limit` windows in a row were skipped.
        """
        where = self._diagnose(window, result)
        next_state = window.start
        if next_state is not None:
            broken = broken_lanes(next_state, self.runner.state_batch_dim)
            next_state = self.runner.reset(self.runner.reset(next_state, broken), window.ends)
        transaction.undo()
        if self.credit is not None:
            self.credit.skip_step(loss_is_finite=bool(result.loss.isfinite()))
        self.state = next_state
        self.steps += 1
        self._skip_policy.count_skipped(result.skipped, self.steps, where)
        skipped = f"step {self.steps} skipped; first NaN or infinity in {where}"
        return result._replace(events=(skipped, *self._credit_events()))

    def _events(self, window: RecordedWindow, result: StepResult) -> tuple[str, ...]:
        """Returns the messages for an accepted step. On CUDA, skip counts are read only every `skip_limit` steps.

        Raises:
            NonFiniteError: `skip_limit` windows in a row were skipped on the device.
        """
        events = self._credit_events()
        if nonfinite.readable_without_sync(result.skipped):
            return events
        return (*self._skip_policy.read_counts(self.steps, lambda: self._diagnose(window, result)), *events)

    def _diagnose(self, window: RecordedWindow, result: StepResult) -> str:
        auxiliary = None if self.credit is None else self.credit.auxiliary
        return diagnose(self.model, auxiliary, window, result.outputs, result.loss, self.parallel)

    def _credit_events(self) -> tuple[str, ...]:
        return () if self.credit is None else self.credit.monitor.take_events(self.steps)

    def reset(self) -> None:
        """Resets all lanes: the next window starts from the initial state and does not continue an earlier window."""
        self._stream.reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything needed to resume training, as nested dicts and lists of tensors and numbers.

        The global random state is not included. With `parallel` this is a collective call and the result holds all lanes.
        """
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, **self._stream.state_dict(), "steps": self.steps, "skipped": self._skip_policy.state_dict()}

    def load_state_dict(self, saved: dict[str, Any], lanes: int | None = None) -> None:
        """Restores what `state_dict` returned; the nesting of the hidden state comes from the initial state.

        Args:
            saved: what `state_dict` returned. Skip counts and `state_paths` may be missing, as older versions saved none.
            lanes: B over all ranks. If given, the hidden state is restored and checked now; the trainer must then know its
                initial state. None to restore it at the next `step`.

        Raises:
            ValueError: the saved trainer has other parts (a synthesizer, for example), or with `lanes` another hidden state.
        """
        parts = self._parts()
        expected = {*parts, "state", "credit", "steps"}
        if set(saved) - {"skipped", "state_paths"} != expected:
            raise ValueError(f"the saved trainer has the parts {sorted(saved)}, this trainer needs {sorted(expected)}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self._stream.load_state_dict(saved)
        self.steps = saved["steps"]
        self._skip_policy.load_state_dict(saved.get("skipped", {"total": 0, "in_a_row": 0}))
        if lanes is not None:
            self._stream.restore(self.initial_state(lanes // self.parallel.size))

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.credit is not None:
            parts["synthesizer"] = self.credit.synthesizer
            if self.credit.auxiliary is not None:
                parts["auxiliary"] = self.credit.auxiliary
            if self.credit.optimizer is not None:
                parts["synthesizer_optimizer"] = self.credit.optimizer
        return parts

    def initial_state(self, lanes: int) -> State | None:
        """Returns the initial state of `lanes` sequences, or None if the model creates it itself when called with None."""
        return self.runner.initial_state(lanes)

    def _zero_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.credit is not None and self.credit.optimizer is not None:
            self.credit.optimizer.zero_grad()


def _chosen_config(
    synthesizer: nn.Module | None, synthetic_scale: float | None, config: SyntheticGradientConfig | None
) -> SyntheticGradientConfig:
    """Returns the config that the arguments of a trainer describe.

    Raises:
        ValueError: they contradict each other.
    """
    if config is not None and synthetic_scale is not None:
        raise ValueError("synthetic_scale is a field of config: give it in one of the two places")
    if config is None:
        config = SyntheticGradientConfig(synthetic_scale=synthetic_scale)
    if config.auxiliary is not None and synthesizer is None:
        raise ValueError("auxiliary predicts the messages of a synthesizer: give a synthesizer too")
    return config


def _sum_over_ranks(
    parallel: DataParallel,
    optimizer: torch.optim.Optimizer,
    credit: SyntheticCredit | None,
    loss: Tensor,
    exchange: ScopeExchange | None,
) -> Tensor:
    """Sums gradients, the loss and the regressions over the ranks by one all-reduce; returns the loss of all lanes."""
    if parallel.size == 1:
        return loss
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [loss.clone()]
    if credit is not None and exchange is not None:
        if credit.auxiliary is not None:
            parameters += credit.auxiliary.parameters()
        parameters += credit.synthesizer.parameters()
        numbers += credit.share_regressions(exchange)
    parallel.sum_gradients(parameters, numbers)
    return numbers[0]
