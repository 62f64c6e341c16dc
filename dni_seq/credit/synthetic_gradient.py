"""The synthesizer's side of training: what it injects, what it learns from, and how far it is trusted.

`SequenceTrainer` steps the RNN; a `SyntheticCredit` predicts the gradient behind each window, trains the synthesizer towards
its targets, bootstrapped at once or λ-targets by replay, and now and then replays a few windows to compare messages with
exact gradients. With `scale="auto"` each horizon is injected in proportion to what that comparison says of it.

Legend: B = lanes, N = horizons, K = windows in the ring.
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
"""Windows in a row with a message or a regression that is not sound, after which a synthesizer begins anew."""


READ_EVERY = 20
"""Windows between two looks at what a GPU has counted."""


RESETS = 3
"""How often a synthesizer begins anew before it is switched off."""


class SyntheticCredit:
    """Synthetic gradients for one trainer.

    Args:
        synthesizer: the module that predicts.
        optimizer: of its parameters, None where it has none to train.
        runner: runs windows once more.
        settings: how messages are used.
        auxiliary: a module that shares the optimizer, and begins anew with the synthesizer.
        parallel: this rank's part where the lanes are spread over several; the synthesizer's running statistics, its
            comparisons, and whether it is sound then count all of them, what `Synthetic` tells of injection and fidelity
            this rank's lanes alone.

    Attributes:
        resets: how often the synthesizer has diverged and begun anew.
        disabled: whether it has diverged once more, and nothing is injected or learned any longer.
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
        # The RNN, which an exact future holds, is nothing to copy.
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
        self._whole: TrainingSnapshot | None = None
        self._largest = self.interface.largest
        self._bad = SkipCounter()
        self._events: list[str] = []
        self.resets = 0
        self.disabled = False
        self._before = self._remember()
        self.rule = self._rule()
        if settings.scale == "auto" and isinstance(synthesizer, ExactFuture):
            raise ValueError(
                'synthetic_scale="auto" asks what of a message is true, and all of an exact one is: give a number'
            )
        if settings.targets == "lambda" and not self.interface.learns:
            raise ValueError('targets="lambda" trains a synthesizer, this one has nothing to train: use "bootstrap"')
        if self.rule.self_supervised and settings.targets == "lambda":
            raise ValueError('targets="lambda" trains towards targets, this synthesizer learns without any: use "bootstrap"')

    def _rule(self) -> TargetRule:
        """The coefficients of targets and injection at the coming window."""
        scale = 1.0 if self.settings.scale == "auto" else self.settings.scale
        rule = rule_of(self.synthesizer, scale, self.settings.discount)
        # Drawn, since every second window, say, would be the same windows of short sequences each time.
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
        """Whether this window trains the synthesizer and may go without a message, which makes its target free."""
        if self.settings.regress_every == 1 or rule.self_supervised or not (any(rule.active) and self.interface.learns):
            return False
        return self._auxiliary is None and not any(map(any, rule.bootstrap))

    @property
    def modules(self) -> list[nn.Module]:
        """All whose tensors a step may change."""
        return [module for module in (*self._modules, self._target_network) if module is not None]

    @property
    def looks_back(self) -> bool:
        """Whether the coming window's first state may be shown to the synthesizer once the window has run."""
        settings = self.settings
        return any(self.rule.active) or settings.targets == "lambda" or settings.fidelity_every > 0

    def make_trigger(self, start: State, context: Lookahead | None) -> State:
        """The window's first state, as a target for the synthesizer."""
        watched = any(self.rule.active) or self.interface.observes(self._steps)
        with synthesizer_context(context):
            return self.interface.make_trigger(start, watched=watched)

    def inject(
        self, scope: GradientAccumulator, loss: Tensor, last: State, ends: Tensor | None, context: Lookahead | None
    ) -> ScopeExchange:
        """Send the synthetic gradient of what is to come into the window's last state."""
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
        """Train the synthesizer on what a window has taught; returns what it did.

        Args:
            exchange: the window's, delivered.
            window: the window, its first state included; None where the model chose that state itself.
            last: its last state, without a graph.
            last_context: what the synthesizer has ahead of it there.
        """
        self._steps += 1
        if self.disabled:
            window = None
        if window is not None and self._runs_again():
            self._whole = TrainingSnapshot(self._modules, [self.optimizer])
        if exchange.regressions:
            regression = exchange.regressions[0]
            norm, valid = self._step_optimizer(regression.loss, self.interface.valid, self._buffers)
        else:
            regression, norm, valid = None, torch.zeros(()), self.interface.valid
            if self._auxiliary is not None and not self.disabled:
                # Its own gradients alone: the synthesizer's parameters have none here.
                norm, valid = self._step_optimizer(torch.zeros(()), valid, self._buffers)
        if self.settings.targets == "lambda" and window is not None:
            regression, norm, valid = self._replay(window, last, last_context, valid)
        measured = None if window is None else self._measure(window)
        # Last, since everything before it may fail and be undone.
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

    def _runs_again(self) -> bool:
        """Whether windows are to be run again after this one, by code that may fail when the synthesizer has learned."""
        every = self.settings.fidelity_every
        due = self._probe.messages is not None or (every > 0 and self._steps % every == 0)
        return due or (self.settings.targets == "lambda" and len(self._replay_buffer) + 1 >= self.settings.replay_windows)

    def _replay(
        self, window: RecordedWindow, last: State, last_context: Lookahead | None, valid: Tensor
    ) -> tuple[Regression | None, Tensor, Tensor]:
        """Every K windows: λ-targets for the ring by one sweep backwards, then one regression step for each window.

        Returns the last regression, the norm of its gradient, and whether these were `valid` too, 0-d bool.
        """
        if not self.interface.learns:  # frozen since: a ring would only grow
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
        behind = self.interface.messages(last, last_context, teacher)
        if window.ends is not None:
            behind = [zero_ended_lanes(message, window.ends, self.runner.state_batch_dim) for message in behind]
        targets = lambda_targets(
            self.runner,
            windows,
            behind,
            rule,
            lambda past: self.interface.messages(past.start, past.context, teacher),
            self.settings.lam,
        )
        for past, target in zip(windows, targets, strict=True):
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            kept = TensorSnapshot(buffers_of(self._modules)).keep()
            regression = self.interface.regress(past.start, past.context, list(target))
            if self.parallel is not None:
                regression = self.divided(regression)
                self.parallel.sum_gradients(self.synthesizer.parameters(), regression)
            norm, valid = self._step_optimizer(regression.loss, valid, kept)
        return regression, norm, valid

    def divided(self, regression: Regression) -> Regression:
        """This rank's share of a regression: its gradients, in place, and its numbers, for the sum over the ranks."""
        assert self.parallel is not None
        self.parallel.divide_gradients(self.synthesizer.parameters())
        return Regression(*(number / self.parallel.size for number in regression))

    def _step_optimizer(self, loss: Tensor, valid: Tensor, kept: TensorSnapshot) -> tuple[Tensor, Tensor]:
        """One step for the gradients of a regression; their norm, and whether it, the loss and `valid` are, 0-d bool.

        Where they are not, parameters and moments stay as they are, and normalisers are as they were `kept`.
        """
        if self.optimizer is None:
            return torch.zeros(()), valid & torch.isfinite(loss)
        norm = gradient_norm(self.optimizer)
        valid = valid & both_finite(loss, norm)
        clipped_step(self.optimizer, self.settings.clip, norm, valid)
        if not nonfinite.readable_without_sync(valid):
            kept.restore_unless(valid)
        elif not valid:
            kept.restore()
        return norm, valid

    def _check_divergence(self, valid: Tensor) -> None:
        """Count a window whose message or regression was not sound; after too many in a row begin anew."""
        if self.disabled:
            return
        self._bad.add(valid)
        if not nonfinite.readable_without_sync(valid) and self._steps % READ_EVERY:
            return
        row = self._bad.in_a_row
        if row:
            self._events.append(f"a message or regression of the synthesizer was not finite or too large, {row} in a row")
        if row >= BAD_WINDOWS and self.interface.learns:
            self._reset_synthesizer()

    def _reset_synthesizer(self) -> None:
        """Give the synthesizer its first parameters again; the one time too many, switch it off."""
        self.disabled = self.resets == RESETS
        self.resets += not self.disabled
        then = "is switched off" if self.disabled else f"begins anew, {self.resets} of {RESETS} times"
        self._events.append(f"the synthesizer has diverged and {then}")
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
        """Forget the windows that were to be run again, since the next one does not follow them."""
        self._replay_buffer.clear()
        self._probe = FidelityProbe()

    def keep(self) -> None:
        """Before a window: settle its rule, and remember what a step that fails must leave as it is."""
        self.rule = self._rule()
        self._buffers.keep()
        self._whole = None
        self._before = self._remember()
        self._largest = self.interface.largest

    def _remember(self) -> dict[str, Any]:
        """What changes in a step beside tensors of modules: by attribute, containers copied."""
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
        """Put everything back that has changed since `keep`, but for one step of the optimizer outside of replays."""
        if self._whole is not None:
            self._whole.restore()
        self._buffers.restore()
        vars(self).update(self._before)
        self.interface.largest = self._largest

    def skip_step(self, *, broken_auxiliary: bool) -> None:
        """A window was left out, and `undo` called: the next one does not follow the ones before it."""
        self._steps += 1
        self.break_chain()
        if broken_auxiliary:
            self._reset_synthesizer()

    @property
    def skipped(self) -> int:
        """Windows so far whose message or regression was left out; this waits for a GPU."""
        return self._bad.total

    def take_events(self, step: int) -> tuple[str, ...]:
        """What has happened since the last call, as texts for the user."""
        if not self._events:
            return ()
        events, self._events = tuple(f"step {step}: {event}" for event in self._events), []
        return events

    def _measure(self, window: RecordedWindow) -> StateFidelity | None:
        """Compare messages with exact gradients where a comparison is due; update the reliabilities."""
        every = self.settings.fidelity_every
        if not every:
            return None
        if not self._probe.windows and self._steps % every == 0:
            self._probe.messages = self.interface.messages(window.start, window.context)
        if self._probe.messages is None:
            return None
        self._probe.windows.append(states.clone(window))
        horizons = len(self._probe.messages)
        # A tail, or the only message, that is its own target stands for all windows from there on.
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
        """Take a comparison into the reliabilities, with the lanes of all ranks."""
        rows = [[float(number) for number in (h.overlap, h.power, h.exact_power)] for h in found.horizons]
        sums = torch.tensor(rows, dtype=torch.float64)
        self._reliability.update(sums if self.parallel is None else self.parallel.sum(sums))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the synthesizer and its optimizer: running sums, reliabilities, ring, probe, target network."""
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
        """Take over what `state_dict` gave; `like` gives the hidden state's nest."""
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
            # Saved without one, it begins as a copy.
            self._target_network.load_state_dict(saved["target_network"] or self.synthesizer.state_dict())
        self._steps = saved["steps"]
        if "bad" in saved:  # missing in what older versions saved
            self._bad.load_state_dict(saved["bad"])
            self.interface.largest = saved["largest"]
            self.resets, self.disabled = saved["resets"], saved["disabled"]

    def _leaves(self, function: Callable[[Tensor, int], Tensor], state: State) -> State:
        return states.map_lanes(function, state, self.runner.state_batch_dim)


def without_chain(saved: dict[str, Any]) -> dict[str, Any]:
    """What `SyntheticCredit.state_dict` gave, without the windows that were to be run again."""
    return {**saved, "ring": [], "probe_windows": [], "probe_messages": None}
