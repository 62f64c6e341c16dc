"""SyntheticCredit: injects, trains and measures a synthesizer beside the RNN.

`SequenceTrainer` steps the RNN. `SyntheticCredit` predicts the gradient after each window and trains the synthesizer towards
its targets: bootstrapped ones at every window, or λ-targets by replay. Every `fidelity_every` windows it replays a few
windows to compare messages with exact gradients; with `scale="auto"` these comparisons set the share of each horizon.

Legend: B = lanes, N = horizons, K = windows in the replay buffer.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import nonfinite, states
from dni_seq.core.deferred_backward import GradientAccumulator
from dni_seq.core.nonfinite import SkipCounter, both_finite
from dni_seq.core.optimizer_step import clear_optimizer_state, clipped_step, gradient_norm, total_norm
from dni_seq.core.snapshot import TensorSnapshot, TrainingSnapshot, buffers_of
from dni_seq.core.states import State
from dni_seq.core.windows import Lookahead
from dni_seq.credit.auto_scale import AutoScale, RunningFidelity
from dni_seq.credit.config import CreditSettings
from dni_seq.credit.fidelity import FidelityProbe, StateFidelity, fidelity
from dni_seq.credit.message_filter import FilteredInterface
from dni_seq.credit.replay import RecordedWindow, gather_lanes, lambda_targets, own_lanes, pack, unpack
from dni_seq.credit.results import Synthetic
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.interfaces.context import synthesizer_context
from dni_seq.interfaces.exchange import ScopeExchange, zero_ended_lanes
from dni_seq.synthesizers.base import Regression
from dni_seq.synthesizers.exact_future import ExactFuture
from dni_seq.synthesizers.target_rule import TargetRule, drawn, rule_of

BAD_WINDOWS = 3
"""Number of windows in a row with a rejected message or regression after which the synthesizer is reset."""

READ_EVERY = 20
"""Number of windows between two reads of the GPU's counts."""

RESETS = 3
"""Number of resets after which the next divergence disables the synthesizer."""


class SyntheticCredit:
    """Manages the synthetic gradients of one trainer.

    Args:
        synthesizer: the module that predicts.
        optimizer: of the synthesizer's parameters, None if it has none to train.
        runner: replays windows.
        settings: the settings of injection and targets.
        auxiliary: a module that shares the optimizer and is reset with the synthesizer.
        parallel: this rank's part if the lanes are spread over several ranks. The synthesizer's running statistics,
            comparisons and validity then cover the lanes of all ranks; `Synthetic.injected_ratio` and `fidelity` cover
            this rank's lanes.

    Attributes:
        resets: number of times that the synthesizer has diverged and was reset.
        disabled: whether it has diverged once more, so that nothing is injected or trained any longer.
    """

    def __init__(
        self,
        synthesizer: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        runner: WindowRunner,
        settings: CreditSettings,
        auxiliary: nn.Module | None = None,
        parallel: DataParallel | None = None,
    ) -> None:
        settings.check()
        self.parallel = parallel
        self.settings = settings
        self.synthesizer = synthesizer
        self.optimizer = optimizer
        self.runner = runner
        self.interface = FilteredInterface(synthesizer, parallel)
        # `ExactFuture` holds the RNN, which must not be copied.
        memo = {id(runner.model): runner.model}
        self._target_network = copy.deepcopy(synthesizer, memo) if settings.target_network else None
        self._running = RunningFidelity()
        self._reliability = AutoScale()
        self._replay_buffer: deque[RecordedWindow] = deque()
        self._probe = FidelityProbe()
        self._steps = 0
        self._auxiliary = auxiliary
        self._modules = (synthesizer, auxiliary)
        self._fresh = TrainingSnapshot(self._modules, [])
        self._buffers = TensorSnapshot(buffers_of(self._modules))
        self._full_snapshot: TrainingSnapshot | None = None
        self._largest = self.interface.largest
        self._bad = SkipCounter()
        self._events: list[str] = []
        self.resets = 0
        self.disabled = False
        self._before = self._remember()
        self.rule = self._rule()
        if settings.scale == "auto" and isinstance(synthesizer, ExactFuture):
            raise ValueError('ExactFuture rejects synthetic_scale="auto": give a number')
        if settings.targets == "lambda" and not self.interface.learns:
            raise ValueError('targets="lambda" needs a synthesizer with trainable parameters: use "bootstrap"')
        if self.rule.self_supervised and settings.targets == "lambda":
            raise ValueError('targets="lambda" does not apply to a self-supervised synthesizer: use "bootstrap"')

    def _rule(self) -> TargetRule:
        """Returns the coefficients of targets and injection at the next window."""
        scale = 1.0 if self.settings.scale == "auto" else self.settings.scale
        rule = rule_of(self.synthesizer, scale, self.settings.discount)
        # Drawn at random: with a fixed period, short sequences would train at the same windows each time.
        if self.settings.targets == "lambda" or drawn(self.settings.regress_every, self._steps):
            rule = rule._replace(active=[False] * len(rule.local))
        elif self._can_skip_injection(rule):
            rule = rule._replace(skip_injection=True)
        if self.settings.scale == "auto":
            trust = self._reliability.shares or [0.0] * len(rule.injection)
            rule = rule._replace(injection=[w * r for w, r in zip(rule.injection, trust, strict=True)])
        if self.disabled:
            rule = rule._replace(
                injection=[0.0] * len(rule.injection), active=[False] * len(rule.local), self_supervised=False
            )
        return rule

    def _can_skip_injection(self, rule: TargetRule) -> bool:
        """Returns whether to skip injection at this window, which trains: its target then needs no extra product."""
        if self.settings.regress_every == 1 or rule.self_supervised or not (any(rule.active) and self.interface.learns):
            return False
        return self._auxiliary is None and not any(map(any, rule.bootstrap))

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose tensors a step may change."""
        return [module for module in (*self._modules, self._target_network) if module is not None]

    @property
    def looks_back(self) -> bool:
        """Whether the synthesizer may be evaluated at the next window's first state after the window has run."""
        settings = self.settings
        return any(self.rule.active) or settings.targets == "lambda" or settings.fidelity_every > 0

    def make_trigger(self, start: State, context: Lookahead | None) -> State:
        """Returns the window's first state, detached; its gradient becomes a target of the synthesizer."""
        watched = any(self.rule.active) or self.interface.observes(self._steps)
        with synthesizer_context(context):
            return self.interface.make_trigger(start, watched=watched)

    def inject(
        self, scope: GradientAccumulator, loss: Tensor, last: State, ends: Tensor | None, context: Lookahead | None
    ) -> ScopeExchange:
        """Injects the synthetic gradient of the future losses into the window's last state."""
        if not self.disabled:
            self.interface.observe(loss, scope, self._steps)
        with synthesizer_context(context):
            self.interface.backward(
                last,
                rule=self.rule,
                bootstrap=self._target_network,
                ends=ends,
                batch_dim=self.runner.state_batch_dim,
            )
        return self.interface.exchange(scope)

    def learn(
        self, exchange: ScopeExchange, window: RecordedWindow | None, last: State, last_context: Lookahead | None
    ) -> Synthetic:
        """Trains the synthesizer after a window; returns its measurements.

        Args:
            exchange: the exchange of the window's scope, after the backward pass.
            window: the window with its first state; None if the model chose that state itself.
            last: the window's last state, without a graph.
            last_context: the synthesizer's context at that state.
        """
        self._steps += 1
        if self.disabled:
            window = None
        if window is not None and self._replay_is_due():
            self._full_snapshot = TrainingSnapshot(self._modules, [self.optimizer])
        if exchange.regressions:
            regression = exchange.regressions[0]
            norm, valid = self._step_optimizer(regression.loss, self.interface.valid, self._buffers)
        else:
            regression, norm, valid = None, torch.zeros(()), self.interface.valid
            if self._auxiliary is not None and not self.disabled:
                # Only the auxiliary task's parameters have gradients here.
                norm, valid = self._step_optimizer(torch.zeros(()), valid, self._buffers)
        if self.settings.targets == "lambda" and window is not None:
            regression, norm, valid = self._replay(window, last, last_context, valid)
        measured = None if window is None else self._measure(window)
        # After everything that may fail and be undone.
        if self._target_network is not None and self._steps % self.settings.target_network == 0:
            self._target_network.load_state_dict(self.synthesizer.state_dict())
        self._check_divergence(valid)
        injected = torch.where(self.interface.valid, self.interface.norm, 0)
        own = exchange.own_gradients[0] if exchange.own_gradients else None
        unknown = injected.new_full((), float("nan"))
        if regression is None:
            regression = Regression(unknown, unknown[None], unknown[None], unknown[None])
        elif exchange.own_gradients or self.settings.targets == "lambda":
            self._running.update(torch.where(valid, regression.error, unknown), regression.power)
        return Synthetic(
            loss=regression.loss,
            gradient_norm=norm,
            injected_ratio=unknown if own is None else injected / total_norm(own),
            cosine=regression.cosine,
            r2=self._running.r2(len(regression.error)),
            scale=torch.tensor(self.rule.injection),
            fidelity=measured,
        )

    def _replay_is_due(self) -> bool:
        """Returns whether windows are replayed after this one: that may fail after the synthesizer has been stepped."""
        every = self.settings.fidelity_every
        due = self._probe.messages is not None or (every > 0 and self._steps % every == 0)
        return due or (self.settings.targets == "lambda" and len(self._replay_buffer) + 1 >= self.settings.replay_windows)

    def _replay(
        self, window: RecordedWindow, last: State, last_context: Lookahead | None, valid: Tensor
    ) -> tuple[Regression | None, Tensor, Tensor]:
        """Every K windows, computes λ-targets by one backward sweep and steps the synthesizer for each window.

        Returns the last regression, the norm of its gradient, and whether all regressions and `valid` are valid, 0-d bool.
        """
        if not self.interface.learns:  # frozen meanwhile: the buffer would only grow
            self._replay_buffer.clear()
            return None, torch.zeros(()), valid
        self._replay_buffer.append(states.clone(window))
        if len(self._replay_buffer) < self.settings.replay_windows:
            return None, torch.zeros(()), valid
        windows = list(self._replay_buffer)
        self._replay_buffer.clear()
        teacher = self._target_network or self.synthesizer
        scale = 1.0 if self.settings.scale == "auto" else self.settings.scale
        rule = rule_of(self.synthesizer, scale, self.settings.discount)
        after = self.interface.messages(last, last_context, teacher)
        if window.ends is not None:
            after = [zero_ended_lanes(message, window.ends, self.runner.state_batch_dim) for message in after]
        targets = lambda_targets(
            self.runner,
            windows,
            after,
            rule,
            lambda past: self.interface.messages(past.start, past.context, teacher),
            self.settings.lam,
        )
        for past, target in zip(windows, targets, strict=True):
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            buffers = TensorSnapshot(buffers_of(self._modules)).keep()
            regression = self.interface.regress(past.start, past.context, list(target))
            if self.parallel is not None:
                regression = self.divided(regression)
                self.parallel.sum_gradients(self.synthesizer.parameters(), regression)
            norm, valid = self._step_optimizer(regression.loss, valid, buffers)
        return regression, norm, valid

    def divided(self, regression: Regression) -> Regression:
        """Divides a regression and, in place, its gradients by the number of ranks, for the sum over ranks."""
        assert self.parallel is not None
        self.parallel.divide_gradients(self.synthesizer.parameters())
        return Regression(*(number / self.parallel.size for number in regression))

    def _step_optimizer(self, loss: Tensor, valid: Tensor, buffers: TensorSnapshot) -> tuple[Tensor, Tensor]:
        """Steps the synthesizer's optimizer if `valid` is true and the loss and the gradient norm are finite.

        Otherwise parameters and moments do not change, and the tensors in `buffers` are restored.
        Returns the gradient norm, and whether the step was valid, 0-d bool.
        """
        if self.optimizer is None:
            return torch.zeros(()), valid & torch.isfinite(loss)
        norm = gradient_norm(self.optimizer)
        valid = valid & both_finite(loss, norm)
        clipped_step(self.optimizer, self.settings.clip, norm, valid)
        if not nonfinite.readable_without_sync(valid):
            buffers.restore_unless(valid)
        elif not valid:
            buffers.restore()
        return norm, valid

    def _check_divergence(self, valid: Tensor) -> None:
        """Counts windows with a rejected message or regression; resets the synthesizer after too many in a row."""
        if self.disabled:
            return
        self._bad.add(valid)
        if not nonfinite.readable_without_sync(valid) and self._steps % READ_EVERY:
            return
        row = self._bad.in_a_row
        if row:
            self._events.append(f"skipped a synthetic message or regression, not finite or too large ({row} in a row)")
        if row >= BAD_WINDOWS and self.interface.learns:
            self._reset_synthesizer()

    def _reset_synthesizer(self) -> None:
        """Restores the synthesizer's initial parameters; disables it if it was reset `RESETS` times before."""
        self.disabled = self.resets == RESETS
        self.resets += not self.disabled
        then = "disabled" if self.disabled else f"reset, {self.resets} of {RESETS} times"
        self._events.append(f"the synthesizer has diverged and was {then}")
        self._fresh.restore()
        if self.optimizer is not None:
            clear_optimizer_state(self.optimizer)
        if self._target_network is not None:
            self._target_network.load_state_dict(self.synthesizer.state_dict())
        self._running = RunningFidelity()
        self._reliability = AutoScale()
        self._bad.end_row()
        self.break_chain()

    def break_chain(self) -> None:
        """Clears the recorded windows, because the next window does not follow them."""
        self._replay_buffer.clear()
        self._probe = FidelityProbe()

    def keep(self) -> None:
        """Prepares a window: sets its rule, and records what `undo` restores."""
        self.rule = self._rule()
        self._buffers.keep()
        self._full_snapshot = None
        self._before = self._remember()
        self._largest = self.interface.largest

    def _remember(self) -> dict[str, Any]:
        """Returns the attributes that a step changes, apart from module tensors; containers are copied."""
        return {
            "_bad": copy.copy(self._bad),
            "_events": list(self._events),
            "resets": self.resets,
            "disabled": self.disabled,
            "_steps": self._steps,
            "_replay_buffer": deque(self._replay_buffer),
            "_probe": FidelityProbe(self._probe.messages, self._probe.windows),
            "_running": copy.copy(self._running),
            "_reliability": copy.copy(self._reliability),
        }

    def undo(self) -> None:
        """Restores everything that has changed since `keep`, except one optimizer step outside of replays."""
        if self._full_snapshot is not None:
            self._full_snapshot.restore()
        self._buffers.restore()
        vars(self).update(self._before)
        self.interface.largest = self._largest

    def skip_step(self, *, broken_auxiliary: bool) -> None:
        """Counts a skipped window, after `undo`, and clears the recorded windows, which the next one does not follow."""
        self._steps += 1
        self.break_chain()
        if broken_auxiliary:
            self._reset_synthesizer()

    @property
    def skipped(self) -> int:
        """Number of windows so far whose message or regression was skipped; reading it waits for a GPU."""
        return self._bad.total

    def take_events(self, step: int) -> tuple[str, ...]:
        """Returns the messages for the user since the last call."""
        if not self._events:
            return ()
        events, self._events = tuple(f"step {step}: {event}" for event in self._events), []
        return events

    def _measure(self, window: RecordedWindow) -> StateFidelity | None:
        """Compares messages with exact gradients if a comparison is due, and updates the automatic scale."""
        every = self.settings.fidelity_every
        if not every:
            return None
        if not self._probe.windows and self._steps % every == 0:
            self._probe.messages = self.interface.messages(window.start, window.context)
        if self._probe.messages is None:
            return None
        self._probe.windows.append(states.clone(window))
        horizons = len(self._probe.messages)
        # A last message that bootstraps on itself (a tail, or the only one) predicts all later windows.
        bootstrapped = bool(self.rule.bootstrap[-1][-1])
        needed = horizons - 1 + self.settings.replay_windows if bootstrapped else horizons
        if len(self._probe.windows) < needed:
            return None
        discount = self.settings.discount
        found = fidelity(self.runner, self._probe.windows, self._probe.messages, discount, bootstrapped=bootstrapped)
        self._probe = FidelityProbe()
        self._trust(found)
        return found

    def _trust(self, found: StateFidelity) -> None:
        """Adds a comparison, summed over ranks, to the automatic scale."""
        rows = [[float(number) for number in (h.overlap, h.power, h.exact_power)] for h in found.horizons]
        sums = torch.tensor(rows, dtype=torch.float64)
        self._reliability.update(sums if self.parallel is None else self.parallel.sum(sums))

    def state_dict(self) -> dict[str, Any]:
        """Returns all state but the synthesizer's and its optimizer's; a collective call on several ranks."""
        messages = self._probe.messages
        if self.parallel is not None and messages is not None:
            messages = [self._leaves(self.parallel.all, message) for message in messages]
        return {
            "running": self._running.state_dict(),
            **self._reliability.state_dict(),
            "ring": [pack(gather_lanes(window, self.runner)) for window in self._replay_buffer],
            "probe_windows": [pack(gather_lanes(window, self.runner)) for window in self._probe.windows],
            "probe_messages": None if messages is None else [states.flatten(message) for message in messages],
            "target_network": None if self._target_network is None else self._target_network.state_dict(),
            "steps": self._steps,
            "bad": self._bad.state_dict(),
            "largest": self.interface.largest,
            "resets": self.resets,
            "disabled": self.disabled,
        }

    def load_state_dict(self, saved: dict[str, Any], like: State) -> None:
        """Restores what `state_dict` returned; hidden states are nested like `like`."""
        self._running.load_state_dict(saved["running"])
        self._reliability.load_state_dict(saved)
        messages = saved["probe_messages"]
        if messages is not None:
            messages = [states.unflatten(like, leaves) for leaves in messages]
            if self.parallel is not None:
                messages = [self._leaves(self.parallel.own, message) for message in messages]
        self._replay_buffer = deque(own_lanes(unpack(window, like), self.runner) for window in saved["ring"])
        self._probe = FidelityProbe(
            messages, [own_lanes(unpack(window, like), self.runner) for window in saved["probe_windows"]]
        )
        if self._target_network is not None:
            # If none was saved, it starts as a copy of the synthesizer.
            self._target_network.load_state_dict(saved["target_network"] or self.synthesizer.state_dict())
        self._steps = saved["steps"]
        if "bad" in saved:  # missing in what older versions saved
            self._bad.load_state_dict(saved["bad"])
            self.interface.largest = saved["largest"]
            self.resets, self.disabled = saved["resets"], saved["disabled"]

    def _leaves(self, function: Callable[[Tensor, int], Tensor], state: State) -> State:
        return states.map_lanes(function, state, self.runner.state_batch_dim)


def without_chain(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of `SyntheticCredit.state_dict` without the recorded windows."""
    return {**saved, "ring": [], "probe_windows": [], "probe_messages": None}
