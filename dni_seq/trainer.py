"""SequenceTrainer: truncated BPTT over a stream of windows, with or without synthetic gradients.

Truncated BPTT ignores the effect of a window's last state on all later losses. A synthesizer predicts the gradient of those
losses with respect to that state, and the trainer injects the prediction.

Source: Jaderberg et al. 2017, arXiv 1608.05343, sections 2.1 and 3.1. We differ in three points. The injected share c
(`synthetic_scale`) and the discount γ (`discount`) are two numbers. Most regressed synthesizers divide targets by the
targets' running root mean square. The sequences of different lanes may end at different windows.

Legend: T = window length in steps, B = lanes (batch), H = hidden units, N = horizons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite, states
from dni_seq.core.nonfinite import all_finite, both_finite, select_where
from dni_seq.core.optimizer_step import check_disjoint, check_moments, clipped_step, gradient_norm, supports_found_inf
from dni_seq.core.snapshot import ReentrancyGuard, TensorSnapshot, TrainingSnapshot, buffers_of
from dni_seq.core.states import State
from dni_seq.core.windows import Lookahead, Nest, Reduction, Window, first_tensor
from dni_seq.credit.config import SyntheticGradientConfig
from dni_seq.credit.description import TrainerDescription, describe
from dni_seq.credit.nonfinite_policy import NonFinitePolicy, diagnose
from dni_seq.credit.past_inputs import WindowContexts
from dni_seq.credit.replay import RecordedWindow
from dni_seq.credit.results import StepResult
from dni_seq.credit.step_gradients import StepGradients
from dni_seq.credit.step_transaction import StepTransaction
from dni_seq.credit.stream_state import StreamState
from dni_seq.credit.synthetic_gradient import SyntheticCredit
from dni_seq.credit.trainer_arguments import check_kinds, chosen_config
from dni_seq.credit.trainer_settings import TrainerSettings
from dni_seq.credit.window_checks import check_window, finite_window, nothing_counts
from dni_seq.credit.window_pass import run_and_backpropagate, sum_over_ranks
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.distributed.data_parallel import DataParallel, SingleProcess

SKIP_LIMIT = 10
"""Number of windows skipped in a row at which `step` raises a NonFiniteError, unless `skip_limit` is set."""


class SequenceTrainer(TrainerSettings):
    """Trains an RNN on a stream of windows, one window per `step`; the hidden state is carried between windows.

    Without a synthesizer this is truncated BPTT. With a synthesizer, a prediction of the gradient that later windows would
    send back is injected into the last state of each window.

    Args:
        model: `model(inputs, state) -> (outputs, state)`. A state is a tensor or any nest of tuples, lists and dicts of
            tensors; dicts are matched by key. If there is no initial state, the first window gets the state None.
        optimizer: the optimizer of the model's parameters.
        loss_fn: `loss_fn(outputs, targets)` returns a scalar, or unreduced losses [T, B].
        synthesizer: predicts the gradient of all later losses with respect to a window's last state. None for plain
            truncated BPTT.
        synthesizer_optimizer: the optimizer of the synthesizer's parameters. Default: Adam with learning rate 1e-3.
        synthetic_scale: short for `config=SyntheticGradientConfig(synthetic_scale=...)`.
        config: the settings of the synthetic gradient. Default: `SyntheticGradientConfig()`, with which the trainer uses the
            values that the synthesizer recommends.
        clip: largest norm of the model's gradient, None for no limit.
        batch_dim: dimension of the lanes in `inputs` and `targets`. The default 1 is for time-major windows [T, B, ...].
        state_batch_dim: dimension of the lanes in the state's leaves, an int or a nest like the state (nn.LSTM: 1,
            nn.LSTMCell: 0). Default: in each leaf, the dimension of size B; `WindowRunner.check_lanes` says what happens if
            several dimensions of a leaf have this size.
        initial_state: the state in which sequences start: a nest, or a function of the number of lanes. Default:
            `model.initial_state(B)` if it exists. Without such a method the first window gets the state None, and a lane
            whose sequence has ended continues from zeros.
        reduction: how losses [T, B] become one number: "mean" over the steps that count, "lane-mean" (sum over time,
            mean over lanes) or "sum".
        autocast: dtype of `torch.autocast` for the model and the loss, None for full precision.
        parallel: the `DataParallel` of this rank if the lanes are split over processes. Each rank steps with its own lanes.
            Gradients are summed over the ranks. A `loss_fn` that returns a scalar must average over lanes. `state_dict` is
            a collective call, and its result holds the lanes of all ranks.

    Attributes:
        steps: number of windows so far, skipped ones included.
        credit: manages the synthesizer; None without a synthesizer.
        skip_limit, accumulate, checkpoint_every, backward_windows, synthetic_scale: settings that may be changed between two
            steps. The base class `TrainerSettings` describes each of them.

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
        state_batch_dim: Any = None,
        initial_state: State | Callable[[int], State] | None = None,
        reduction: Reduction = "mean",
        autocast: torch.dtype | None = None,
        parallel: DataParallel | None = None,
    ) -> None:
        check_kinds(model, optimizer, loss_fn, synthesizer, synthesizer_optimizer, config, autocast, clip)
        self.parallel = SingleProcess() if parallel is None else parallel
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.runner = WindowRunner(
            model, loss_fn, reduction, autocast, batch_dim, state_batch_dim, initial_state, self.parallel
        )
        self.steps = 0
        config = chosen_config(synthesizer, synthetic_scale, config, batch_dim)
        self.credit: SyntheticCredit | None = None
        if synthesizer is not None:
            self.credit = SyntheticCredit(synthesizer, synthesizer_optimizer, self.runner, config)
            check_disjoint(optimizer, self.credit.optimizer)
        self._stream = StreamState(self.runner, self.credit)
        self._skip_policy = NonFinitePolicy(SKIP_LIMIT)
        self._stepped = False
        self._buffers = TensorSnapshot(buffers_of([model]))
        self._gradients = StepGradients(model, self._optimizers)
        self._reentrancy_guard = ReentrancyGuard(
            "step was called while another step of this trainer is running: use one trainer per thread"
        )

    @property
    def state(self) -> State | None:
        """The hidden state that the next window starts from; None before the first window and after `reset`."""
        return self._stream.state

    @state.setter
    def state(self, state: State | None) -> None:
        self._stream.replace(state)

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
        are restored, and gradients are cleared.

        If the loss or the model's gradient holds a NaN or an infinity, the step is skipped. Model and optimizer then do not
        change. The next window starts from the first state of the skipped window. Lanes that are in `ends`, and lanes in
        which this state holds a NaN or an infinity, are reset. `steps` counts the window.

        Args:
            inputs: [T, B, ...], the model's inputs: a tensor, or a nest of tuples, lists and dicts of such tensors.
            targets: [T, B, ...], passed to `loss_fn`: a tensor or a nest.
            ends: [B] bool, True for lanes whose sequence ends with this window. Nothing is injected in these lanes, and
                they start the next window from the initial state.
            mask: [T, B] bool, True for steps that count in the loss; `loss_fn` must then return unreduced losses.
            lookahead: the steps after the window, for a synthesizer that needs them (`dni_seq.with_lookahead`).

        Raises:
            ValueError, TypeError: shapes do not agree, a nest holds something else than tensors, or a parameter has a
                gradient that this trainer did not compute. Nothing has changed.
            NonFiniteError: at least `skip_limit` windows in a row were skipped. The message names the first tensor of the
                last window that holds a NaN or an infinity.
            RuntimeError: another step of this trainer is running.
        """
        window = Window(inputs, targets, mask, ends, lookahead)
        check_window(window, self.runner.batch_dim)
        inputs, targets, mask, ends, lookahead = finite_window(window, self.runner.batch_dim)
        with self._reentrancy_guard:
            self._gradients.check()
            start = self._stream.start(inputs)
            with self._transaction(first_tensor(inputs).device) as transaction:
                result = self._step(RecordedWindow(inputs, targets, mask, ends, start, None), lookahead, transaction)
            self._stepped = True
            return result

    def _transaction(self, device: torch.device) -> StepTransaction:
        full = None
        if not self._stepped:
            # An optimizer that cannot step (LBFGS needs a closure, Adam rejects sparse gradients, memory for moments is
            # missing) fails at its first step. A copy of everything undoes what this step has changed.
            modules = [self.model, *(self.credit.modules if self.credit is not None else ())]
            full = TrainingSnapshot(modules, self._optimizers())
        return StepTransaction(device, self._buffers, self.credit, self._skip_policy, self._gradients, full)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        both = (self.optimizer, None if self.credit is None else self.credit.optimizer)
        return [optimizer for optimizer in both if optimizer is not None]

    def _step(self, window: RecordedWindow, lookahead: Lookahead | None, transaction: StepTransaction) -> StepResult:
        """Performs one step on a checked window whose first state is `window.start`."""
        start, credit = window.start, self.credit
        around = self._stream.inputs.around(window, lookahead)
        context = around.after(0) if around.known and credit is not None and credit.looks_back else None
        self._gradients.clear()
        parts = (self.runner, credit, self._stream)
        loss, outputs, last, exchange = run_and_backpropagate(*parts, window, context, around, self._stepped)
        # Ranks sum before the check, so that a NaN on one rank skips the step on all ranks.
        measured = sum_over_ranks(self.parallel, self.optimizer, self.credit, loss, exchange)
        norm = gradient_norm(self.optimizer)
        good = both_finite(measured, norm)
        result = StepResult(measured, states.detach(outputs), norm, None, ~good)
        # The host reads `good` if it need not wait for a device. It must read `good` if the device cannot skip the step,
        # for which the device needs a first state to keep and an optimizer with `found_inf`.
        on_host = nonfinite.readable_without_sync(good) or start is None or not supports_found_inf(self.optimizer)
        last = states.detach_clone(last)
        if on_host and not good:
            return self._skip_step(around, result, transaction, last)
        # Everything that may fail runs before the optimizers' steps, which cannot be undone.
        passed = good if on_host else good | nothing_counts(measured, window.targets)
        reached, again = last, None
        if not on_host:
            kept, again = self._stream.if_skipped(start, passed)
            reached = select_where(passed, last, kept)
        next_state = self.runner.reset(reached, window.ends)
        synthetic = None
        if credit is not None and exchange is not None:
            past = None if start is None else window._replace(context=context)
            synthetic = credit.learn(exchange, past, last, around.at_end)
        due, norm, finite = self._gradients.collect(norm, good)
        if due:
            clipped_step(self.optimizer, self.clip, norm, finite)
        if not on_host:
            self._buffers.restore_unless(good)
        self._skip_policy.count(passed)
        self._stream.follow(around, next_state, passed, again)
        self.steps += 1
        return result._replace(synthetic=synthetic, events=self._events(window, result))

    def _skip_step(
        self, around: WindowContexts, result: StepResult, transaction: StepTransaction, last: State
    ) -> StepResult:
        """Skips the step, and resets lanes whose state holds a NaN or an infinity.

        If no step of the window counts in the loss, the window is not counted as a failure: the next window starts from
        `last`, and the parameters do not change.

        Raises:
            NonFiniteError: `skip_limit` windows in a row were skipped.
        """
        window = around.window
        empty = bool(nothing_counts(result.loss, window.targets)) and all_finite(result.outputs)
        where = "" if empty else self._diagnose(window, result)
        transaction.undo()
        self.steps += 1
        if self.credit is not None:
            self.credit.skip_step(loss_is_finite=bool(result.loss.isfinite()))
        if empty:
            self._stream.follow(around, self.runner.reset(last, window.ends), torch.ones_like(result.skipped))
            return result
        self._stream.stay(window.start, window.ends)
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
        counts = {"steps": self.steps, "skipped": self._skip_policy.state_dict(), "gradients": self._gradients.state_dict()}
        return {**parts, **self._stream.state_dict(), **counts}

    def load_state_dict(self, saved: dict[str, Any], lanes: int | None = None) -> None:
        """Restores what `state_dict` returned; the saved leaves of the hidden state are nested as in the model's state.

        Args:
            saved: what `state_dict` returned. Entries that older versions did not save, such as skip counts, may be missing.
            lanes: B, the lanes of all ranks together. If given, the hidden state is restored and checked in this call, for
                which the trainer needs an initial state. If None, the hidden state is restored at the next `step`.

        Raises:
            ValueError: the saved trainer and this one differ in their parts, for example if only one of them has a
                synthesizer; or `lanes` is given and the saved hidden state has other keys or shapes than the initial state.
        """
        parts = self._parts()
        expected = {*parts, "state", "credit", "steps"}
        if set(saved) - {"skipped", "fresh", "gradients", "state_paths", "past", "past_inputs"} != expected:
            raise ValueError(f"the saved trainer has the parts {sorted(saved)}, this trainer needs {sorted(expected)}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        for optimizer in self._optimizers():
            check_moments(optimizer)
        self._stream.load_state_dict(saved)
        self.steps = saved["steps"]
        self._skip_policy.load_state_dict(saved.get("skipped", {"total": 0, "in_a_row": 0}))
        self._gradients.load_state_dict(saved.get("gradients", {"collected": 0, "sums": [], "updates": saved["steps"]}))
        if lanes is not None:
            mine = lanes // self.parallel.size
            self._stream.restore(self.runner.initial_state(mine), mine)

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if (credit := self.credit) is not None:
            parts |= {"synthesizer": credit.synthesizer, "auxiliary": credit.auxiliary}
            parts["synthesizer_optimizer"] = credit.optimizer
        return {name: part for name, part in parts.items() if part is not None}

    def describe(self, window: Window | None = None) -> TrainerDescription:
        """Returns which optimizer trains each parameter, and which gradients reach the parameter on `window`.

        `print` shows the result as a table. Without a window the gradients of the model's parameters are unknown.
        """
        return describe(self.runner, self.optimizer, self.credit, window)
