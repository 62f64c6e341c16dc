"""SyntheticCredit: injects the messages of a synthesizer, trains the synthesizer and measures its messages.

`SequenceTrainer` steps the RNN. `SyntheticCredit` predicts a gradient at the end of each window and trains the synthesizer.
A regressed synthesizer is trained towards bootstrapped targets, at windows drawn by `regress_every`, or towards λ-targets
from replays. Every `fidelity_every` windows a few windows are replayed to compare messages with exact gradients. With
`synthetic_scale="auto"` these comparisons set the injected share of each horizon.

Legend: B = lanes, N = horizons, K = windows in the replay buffer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.deferred_backward import GradientAccumulator
from dni_seq.core.host_count import reread_counts
from dni_seq.core.nonfinite import module_is_finite
from dni_seq.core.optimizer_step import total_norm
from dni_seq.core.snapshot import Restorable, TensorSnapshot, TrainingSnapshot, buffers_of
from dni_seq.core.states import State
from dni_seq.core.windows import Context
from dni_seq.credit.auto_scale import AutoScale, RunningFidelity
from dni_seq.credit.config import CreditSettings, SyntheticGradientConfig
from dni_seq.credit.divergence_monitor import DivergenceMonitor
from dni_seq.credit.fidelity import StateFidelity
from dni_seq.credit.fidelity_probe import FidelityProbe
from dni_seq.credit.inner_messages import InnerStates
from dni_seq.credit.message_filter import FilteredInterface, MessageFilter
from dni_seq.credit.replay import RecordedWindow, lambda_targets
from dni_seq.credit.replay_buffer import ReplayBuffer
from dni_seq.credit.results import Synthetic
from dni_seq.credit.synthesizer_step import SynthesizerStep
from dni_seq.credit.target_network import TargetNetwork
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.interfaces.context import synthesizer_context
from dni_seq.interfaces.exchange import ScopeExchange
from dni_seq.synthesizers.base import Regression, past_steps, recommended, supports_auto_scale
from dni_seq.synthesizers.binding import bind_first
from dni_seq.synthesizers.target_rule import TargetRule, drawn, rule_of


class SyntheticCredit(Restorable):
    """Manages the synthetic gradients of one trainer.

    Attributes that a step changes are `Restorable`, so that the step can be undone; modules have other snapshots.

    Args:
        synthesizer: the module that predicts.
        optimizer: of the parameters of the synthesizer and the auxiliary task. Default: Adam with learning rate 1e-3.
        runner: runs the model. On several ranks, the running statistics, the automatic scale and the check of messages use
            the lanes of all ranks; `Synthetic.injected_ratio` and `Synthetic.fidelity` use this rank's lanes.
        config: the settings of injection and targets.

    Raises:
        ValueError: a setting does not apply to this synthesizer.
    """

    UNCHANGING = (WindowRunner, SynthesizerStep, TensorSnapshot, TrainingSnapshot)

    def __init__(
        self,
        synthesizer: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        runner: WindowRunner,
        config: SyntheticGradientConfig,
    ) -> None:
        settings = config.resolve(recommended(synthesizer))
        self.settings = settings
        self.synthesizer = synthesizer
        self.auxiliary = config.auxiliary
        self._auxiliary_weight = config.auxiliary_weight
        self.runner = runner
        self._filter = MessageFilter(runner.parallel)
        self.interface = FilteredInterface(synthesizer, self._filter)
        every = settings.target_network
        self.target_network = TargetNetwork(synthesizer, every, runner.model) if every else None
        self._running = RunningFidelity()
        self._auto_scale = AutoScale()
        self._replay_buffer = ReplayBuffer(runner, settings.replay_windows)
        self._probe = FidelityProbe(runner, settings)
        self.monitor = DivergenceMonitor()
        self.step_optimizer = SynthesizerStep(self._learners, optimizer, settings.clip, runner.parallel)
        self._steps = 0
        self.window: int | None = None
        self._fresh = TrainingSnapshot(self._learners, [])
        self._buffers = TensorSnapshot(buffers_of(self._learners))
        self._before_replay: TrainingSnapshot | None = None
        self.rule = self._rule()
        check_settings(synthesizer, settings, self.rule, learns=self.interface.learns)
        self.check_attributes()
        for module in self._learners:
            runner.parallel.synchronize(module)

    def _rule(self) -> TargetRule:
        """Returns the coefficients of targets and injection at the next window."""
        can_skip = self.interface.learns and self.auxiliary is None
        rule = step_rule(self.synthesizer, self.settings, self._steps, self._auto_scale.shares, can_skip=can_skip)
        if self.monitor.disabled:
            nothing = [0.0] * len(rule.injection)
            rule = rule._replace(injection=nothing, active=[False] * len(rule.local), self_supervised=False)
        return rule

    @property
    def _learners(self) -> list[nn.Module]:
        """The modules that the synthesizer's optimizer trains."""
        return [module for module in (self.synthesizer, self.auxiliary) if module is not None]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose tensors a step may change."""
        return self._learners if self.target_network is None else [*self._learners, self.target_network.module]

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the synthesizer's and the auxiliary task's parameters; None if no parameter can be trained."""
        return self.step_optimizer.optimizer

    @property
    def past_steps(self) -> int:
        """Number of inputs before a state that the synthesizer reads; 0 for none."""
        return past_steps(self.synthesizer)

    @property
    def looks_back(self) -> bool:
        """Whether the synthesizer may be evaluated at a window's first state again, after the window has run."""
        return any(self.rule.active) or self.settings.targets == "lambda" or self.settings.fidelity_every > 0

    def bind(self, window: int, state: State) -> None:
        """Tells the modules the trainer's settings, see `bind_first`; sets `self.window` to the T that they use."""
        how: dict[str, Any] = {"reduction": self.runner.reduction if self.runner.reduces else None}
        how |= {"window": window, "state_batch_dim": self.runner.state_batch_dim, "state": state}
        self.window = bind_first(self.modules, self.window, **how)

    def make_trigger(self, start: State, context: Context) -> State:
        """Returns the window's first state, detached; its gradient becomes a target of the synthesizer."""
        watched = any(self.rule.active) or self.interface.observes(self._steps)
        with synthesizer_context(context):
            return self.interface.make_trigger(start, watched=watched)

    def inject(
        self,
        scope: GradientAccumulator,
        loss: Tensor,
        last: State,
        ends: Tensor | None,
        context: Context,
        inner: InnerStates | None,
    ) -> ScopeExchange:
        """Injects messages into the window's last state and into the states `inner`; returns the exchange of the scope."""
        if not self.monitor.disabled:
            self.interface.observe(loss, scope, self._steps)
        rule, dims = self.rule, self.runner.state_batch_dim
        at_end = rule if self.settings.message_at_end else rule._replace(injection=[0.0] * len(rule.injection))
        teacher = None if self.target_network is None else self.target_network.module
        last = self.interface.reachable(scope, last)
        with synthesizer_context(context):
            if inner is None or not rule.self_supervised:
                self.interface.backward(last, rule=at_end, bootstrap=teacher, ends=ends, batch_dim=dims)
            else:
                messages, valid = self.interface.send_inner(scope, inner, last, context, rule, dims)
                self.interface.inject(last, messages, at_end, ends=ends, batch_dim=dims, bootstrap=teacher)
                self.interface.valid = self.interface.valid & valid
        return self.interface.exchange(scope)

    def auxiliary_loss(self, early: State, exchange: ScopeExchange) -> Tensor | None:
        """Returns this rank's share of the auxiliary task's weighted loss, 0-d; None without a task or after divergence.

        Args:
            early: the state after the window's first step, with its graph.
            exchange: the exchange of the window's scope, after `inject`.
        """
        if self.auxiliary is None or self.monitor.disabled:
            return None
        loss: Tensor = self.auxiliary(*states.map_floating(states.to_float32, (early, exchange.injected[0])))
        return self._auxiliary_weight / self.runner.parallel.size * loss

    def share_regressions(self, exchange: ScopeExchange) -> list[Tensor]:
        """Divides the exchange's regressions by the number of ranks; returns their numbers, for a sum over the ranks."""
        exchange.regressions = [self.step_optimizer.share(regression) for regression in exchange.regressions]
        return [number for regression in exchange.regressions for number in regression]

    def learn(self, exchange: ScopeExchange, window: RecordedWindow | None, last: State, last_context: Context) -> Synthetic:
        """Trains the synthesizer after a window; returns its measurements.

        Args:
            exchange: the exchange of the window's scope, after the backward pass.
            window: the window with its first state; None if the model chose the first state itself.
            last: the window's last state, without a graph.
            last_context: the synthesizer's context at the last state.
        """
        self._steps += 1
        if self.monitor.disabled:
            window = None
        replays = self._probe.due(self._steps) or (self.settings.targets == "lambda" and self._replay_buffer.fills)
        if window is not None and replays:  # a replay may fail after the synthesizer has been stepped
            self._before_replay = TrainingSnapshot(self._learners, [self.optimizer])
        valid, norm = self.interface.valid, torch.zeros(())
        regression = exchange.regressions[0] if exchange.regressions else None
        if regression is not None:
            norm, valid = self.step_optimizer(regression.loss, valid, self._buffers)
        elif self.auxiliary is not None and not self.monitor.disabled:
            # Only the auxiliary task's parameters have gradients here.
            norm, valid = self.step_optimizer(torch.zeros(()), valid, self._buffers)
        if self.settings.targets == "lambda" and window is not None:
            regression, norm, valid = self._replay(window, last, last_context, valid)
        measured = None if window is None else self._measure(window)
        # These changes come last, after everything that may fail.
        if self.target_network is not None:
            self.target_network.update(self._steps)
        if self.monitor.diverged(valid, self._steps) and self.interface.learns:
            self._reset_synthesizer()
        return self._measurements(exchange, regression, norm, valid, measured)

    def _measurements(
        self,
        exchange: ScopeExchange,
        regression: Regression | None,
        norm: Tensor,
        valid: Tensor,
        measured: StateFidelity | None,
    ) -> Synthetic:
        """Returns the measurements of a step, and adds its regression to the running R²."""
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

    def _replay(
        self, window: RecordedWindow, last: State, last_context: Context, valid: Tensor
    ) -> tuple[Regression | None, Tensor, Tensor]:
        """Records a window; every K windows, computes λ-targets by one backward sweep and trains on each of the K windows.

        Returns the last regression (or None), the norm of its gradient, and a 0-d bool: `valid` and all regressions valid.
        """
        if not self.interface.learns:  # frozen since construction: recorded windows would be of no use
            self._replay_buffer.clear()
            return None, torch.zeros(()), valid
        windows = self._replay_buffer.add(window)
        regression, norm = None, torch.zeros(())
        teacher = self.synthesizer if self.target_network is None else self.target_network.module
        targets = targets_of(self.interface, teacher, self.runner, self.settings, windows, last, last_context)
        for past, target in zip(windows, targets, strict=True):
            self.step_optimizer.zero_grad()
            buffers = TensorSnapshot(buffers_of(self._learners)).keep()
            regression = self.step_optimizer.sum_gradients(self.interface.regress(past.start, past.context, list(target)))
            norm, valid = self.step_optimizer(regression.loss, valid, buffers)
        return regression, norm, valid

    def _measure(self, window: RecordedWindow) -> StateFidelity | None:
        """Compares messages with exact gradients if a comparison is due, and updates the automatic scale."""
        # A message that bootstraps on itself (of a tail, or the only message) predicts the gradient of all later windows.
        bootstrapped = bool(self.rule.bootstrap[-1][-1])
        messages = partial(self.interface.messages, window.start, window.context)
        found = self._probe.measure(window, self._steps, messages, bootstrapped=bootstrapped)
        if found is not None:
            rows = [[float(number) for number in (h.overlap, h.power, h.exact_power)] for h in found.horizons]
            self._auto_scale.update(self.runner.parallel.sum(torch.tensor(rows, dtype=torch.float64)))
        return found

    def _reset_synthesizer(self) -> None:
        """Restores the synthesizer's initial parameters; after too many resets the monitor disables the synthesizer."""
        self.monitor.count_reset()
        self._fresh.restore()
        reread_counts(self._learners)
        self.step_optimizer.clear_state()
        if self.target_network is not None:
            self.target_network.copy()
        self._running = RunningFidelity()
        self._auto_scale = AutoScale()
        self.break_chain()

    def break_chain(self) -> None:
        """Clears the recorded windows. To be called if the next window does not follow them."""
        self._replay_buffer.clear()
        self._probe.clear()

    def begin_step(self) -> dict[str, Any]:
        """Sets the rule of the next window; returns what `undo` needs."""
        self.rule = self._rule()
        self._buffers.keep()
        self._before_replay = None
        return self.snapshot()

    def undo(self, before: dict[str, Any]) -> None:
        """Restores everything changed since `begin_step`, except an optimizer step after which nothing more could fail."""
        if self._before_replay is not None:
            self._before_replay.restore()
        self._buffers.restore()
        reread_counts(self._learners)
        self.restore(before)

    def skip_step(self, *, loss_is_finite: bool) -> None:
        """Counts a skipped window and clears the recorded windows, because the next window does not follow them.

        Call it after `undo`. If the loss was finite and the auxiliary task holds a NaN, synthesizer and task are reset.
        """
        self._steps += 1
        self.break_chain()
        if self.auxiliary is not None and loss_is_finite and not module_is_finite(self.auxiliary):
            self._reset_synthesizer()

    def state_dict(self) -> dict[str, Any]:
        """Returns all state except that of modules in training and their optimizer; a collective call on several ranks."""
        return {
            "running": self._running.state_dict(),
            **self._auto_scale.state_dict(),
            **self._replay_buffer.state_dict(),
            **self._probe.state_dict(),
            "target_network": None if self.target_network is None else self.target_network.state_dict(),
            "steps": self._steps,
            "largest": self._filter.largest,
            "window": self.window,
            **self.monitor.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any], like: State) -> None:
        """Restores what `state_dict` returned; hidden states are nested like `like`."""
        self._running.load_state_dict(saved["running"])
        self._auto_scale.load_state_dict(saved)
        self._replay_buffer.load_state_dict(saved, like)
        self._probe.load_state_dict(saved, like)
        if self.target_network is not None:
            self.target_network.load_state_dict(saved["target_network"])
        self._steps = saved["steps"]
        self.window = saved.get("window")
        if "bad" in saved:  # older versions did not save these two entries
            self.monitor.load_state_dict(saved)
            self._filter.largest = saved["largest"]


def targets_of(
    interface: FilteredInterface,
    teacher: nn.Module,
    runner: WindowRunner,
    settings: CreditSettings,
    windows: list[RecordedWindow],
    last: State,
    last_context: Context,
) -> list[list[State]]:
    """Returns the λ-targets at the first states of `windows`, computed with messages of `teacher`; [] for no windows."""
    if not windows:
        return []
    scale = 1.0 if settings.scale == "auto" else settings.scale
    rule = rule_of(interface.synthesizer, scale, settings.discount)
    after = interface.messages(last, last_context, teacher)

    def predict(past: RecordedWindow) -> list[State]:
        return interface.messages(past.start, past.context, teacher)

    return lambda_targets(runner, windows, after, rule, predict, settings.lam)


def step_rule(
    synthesizer: nn.Module, settings: CreditSettings, steps: int, shares: list[float] | None, *, can_skip: bool
) -> TargetRule:
    """Returns the coefficients of targets and injection at one window.

    Args:
        synthesizer: the module that predicts.
        settings: the settings in force.
        steps: the number of windows before this one; it seeds the draw of windows with targets.
        shares: the automatic scale of each horizon; None before the first comparison, or if the scale is a number.
        can_skip: whether a window with targets may skip injection, if its target then needs no vector-Jacobian product.
    """
    rule = rule_of(synthesizer, 1.0 if settings.scale == "auto" else settings.scale, settings.discount)
    # Drawn at random: with a fixed period, short sequences would train at the same windows each time.
    if settings.targets == "lambda" or drawn(settings.regress_every, steps):
        rule = rule._replace(active=[False] * len(rule.local))
    elif settings.regress_every > 1 and can_skip and not rule.self_supervised and any(rule.active):
        rule = rule._replace(skip_injection=not any(map(any, rule.bootstrap)))
    if settings.scale == "auto":
        trust = shares or [0.0] * len(rule.injection)
        rule = rule._replace(injection=[w * r for w, r in zip(rule.injection, trust, strict=True)])
    return rule


def check_settings(synthesizer: nn.Module, settings: CreditSettings, rule: TargetRule, *, learns: bool) -> None:
    """Raises a ValueError if a setting does not apply to the synthesizer.

    Args:
        synthesizer: the module that predicts.
        settings: the settings in force.
        rule: the synthesizer's rule.
        learns: whether the synthesizer has a trainable parameter.
    """
    if settings.scale == "auto" and not supports_auto_scale(synthesizer):
        raise ValueError(f'{type(synthesizer).__name__} rejects synthetic_scale="auto": give a number')
    if settings.message_every is not None and not rule.self_supervised:
        raise ValueError(
            f"{type(synthesizer).__name__} learns from targets at the end of windows: message_every needs a synthesizer "
            "that learns from the next steps, such as FutureGradient"
        )
    if settings.targets == "lambda" and not learns:
        raise ValueError('targets="lambda" needs a synthesizer with trainable parameters: use "bootstrap"')
    if rule.self_supervised and settings.targets == "lambda":
        raise ValueError('targets="lambda" does not apply to a self-supervised synthesizer: use "bootstrap"')


def without_chain(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of `SyntheticCredit.state_dict` without the recorded windows."""
    return {**saved, "ring": [], "probe_windows": [], "probe_messages": None}
