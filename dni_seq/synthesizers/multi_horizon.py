"""Synthesizers made for recurrent states: several layers and tensors, a look at the future, several horizons.

Source: the recipe starts from Jaderberg et al. 2017, arXiv 1608.05343, section 3.1. We differ in the heads by horizon (each
predicts the gradient of one window ahead, so that none but the tail bootstraps on itself), in the lookahead of more than one
step, in bounded cells and in normalised targets; docs/synthetic-gradients.md measures each.

Legend: B = lanes, H = hidden units, L = layers, S = numbers in one lane's state, N, K = horizons, m = lookahead in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.windows import next_steps
from dni_seq.synthesizers.base import (
    AcrossRanks,
    Normalized,
    Regression,
    RunningRMS,
    check_like,
    checked_limit,
    learn_ahead,
    learns_ahead,
    limited,
    mean_squared,
    predict,
    regress,
)
from dni_seq.synthesizers.packing import Packing, StateNetwork, StateTrunk
from dni_seq.synthesizers.target_rule import TargetRule, combine, drawn, increments


class LookaheadEncoder(nn.Module):
    """Turn the next m steps of every lane into one vector a lane; steps behind the end of a sequence count as zeros.

    Args:
        steps: m.
        inputs: module from `Lookahead.inputs` [m, B, ...] to [m, B, E], such as `nn.Embedding` for tokens or `nn.Linear`
            for vectors; it becomes part of this one.
        targets: the same for `Lookahead.targets`.
        features: E of both together, where it cannot be read off an `nn.Embedding` or `nn.Linear`.

    Raises:
        ValueError: `steps` is not positive, or E is unknown; at a call, the context is no lookahead of m steps.
    """

    def __init__(self, steps: int, inputs: nn.Module, targets: nn.Module, features: int | None = None) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(
                f"LookaheadEncoder: steps must be positive, got {steps}; for no lookahead leave the encoder out"
            )
        self.steps = steps
        self.inputs = inputs
        self.targets = targets
        per_step = _width(inputs) + _width(targets) if features is None else features
        self.features = steps * (per_step + 2)

    def forward(self, context: Any) -> Tensor:
        """[B, features] for a `Lookahead` of at least m steps, of which the first m are read."""
        ahead = next_steps(context, self.steps)
        encoded = torch.cat([self.inputs(ahead.inputs), self.targets(ahead.targets)], dim=-1)
        flags = torch.stack([ahead.valid, ahead.counts], dim=-1).to(encoded.dtype)
        step = torch.cat([encoded * flags[..., :1], flags], dim=-1)  # [m, B, E + 2]
        return step.transpose(0, 1).flatten(1)


def _width(module: nn.Module) -> int:
    for name in ("embedding_dim", "out_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise ValueError(
        f"LookaheadEncoder: the width of {type(module).__name__} is unknown; pass features, inputs' and targets'"
    )


class Outputs(NamedTuple):
    """What a `PackedSynthesizer` computes of packed states.

    Attributes:
        messages: [B, N, S], in units of the targets' root mean square, gated.
        features: what `learn` needs of the features, None for nothing.
        loss: 0-d, of a model of what is ahead, None where there is none.
    """

    messages: Tensor
    features: Tensor | None
    loss: Tensor | None


class PackedSynthesizer(nn.Module):
    """What synthesizers on packed states share: bounded cells, normalised targets, limited messages.

    A subclass gives the network, and its outputs in normalised units. What is computed is what
    `Normalized(GatedCells(network))` computes, in a third as many of the small operations that a short window's step is
    made of.

    Args:
        network: the trunk, with or without heads.
        example: a state of the model, such as `model.initial_state(1)`.
        cells: which leaves are LSTM cells, such as `LSTM_CELLS`; False for none.
        decay: share of the running mean square that an update keeps, in the long run.
        limit: the largest number in a message, in units of its segment's running root mean square; None for no limit.
    """

    mean_square: Tensor
    counts: Tensor

    def __init__(self, network: StateTrunk, example: State, cells: Any, decay: float, limit: float | None) -> None:
        super().__init__()
        self.limit = checked_limit(limit)
        self.network: Any = network
        self.decay = decay
        self.across_ranks: AcrossRanks | None = None
        self.cells = self.packing.spans(cells, example, "cells")
        zeros = states.in_full(states.floating(example)[0]).new_zeros  # as states arrive
        self.register_buffer("mean_square", zeros(network.horizons, len(self.packing.lengths)))
        self.register_buffer("counts", zeros(network.horizons, 1))

    @property
    def packing(self) -> Packing:
        """How states lie side by side."""
        packing: Packing = self.network.packing
        return packing

    def outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Messages in units of the targets' root mean square, gated, and what goes with them.

        Args:
            bounded: [B, S], the packed state with tanh of its cells.
            gate: [B, S], 1 - tanh² of the cells, 1 elsewhere.
            context: for the encoder.
        """
        raise NotImplementedError

    def learn(self, trained: list[int], features: Tensor | None, gate: Tensor, wanted: Tensor) -> None:
        """Take in normalised targets [B, n, S] of the horizons `trained`, beside the gradients of the regression."""

    def predict(self, trigger: State, context: Any) -> list[State]:
        """One message a horizon, raw; exactly zero before the first regression."""
        found = self.outputs(*self._bounded(trigger), context).messages
        messages = limited(found, self.limit) * self._scales()
        return [self.packing.unpack(message, trigger) for message in messages.unbind(1)]

    def forward(self, trigger: State, context: Any = None) -> State:
        """The raw message of one horizon."""
        (message,) = self.predict(trigger, context)
        return message

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Mean squared error in normalised units, and the loss of a model of what is ahead, where there is one.

        Takes the targets into the statistics first.

        Raises:
            ValueError: a target has not the shape of its message.
        """
        trained = [i for i, target in enumerate(targets) if target is not None]
        wanted = self._wanted(trigger, targets, trained)
        bounded, gate = self._bounded(trigger)
        outputs = self.outputs(bounded, gate, context)
        found = outputs.messages[:, trained]
        error = (found - wanted).square().mean((0, 2))
        with torch.no_grad():
            rows = self._measured(error, found, wanted, trained, len(targets))
            self.learn(trained, outputs.features, gate, wanted)
        loss = error.mean() if outputs.loss is None else error.mean() + outputs.loss
        return Regression(loss, *rows)

    def _wanted(self, trigger: State, targets: list[State | None], trained: list[int]) -> Tensor:
        """The targets that are there, [B, n, S], in units of the running root mean square that takes them in first."""
        like = states.floating(trigger)
        for target in targets:
            if target is not None:
                check_like(like, states.floating(target), "trigger", "real message")
        packed = [self.packing.pack(states.floating(target)) for target in targets if target is not None]
        wanted = torch.stack(packed, dim=1)
        self._update(trained, wanted)
        return wanted / self._scales()[trained].clamp_min(Normalized.tiny)

    @staticmethod
    def _measured(
        error: Tensor, found: Tensor, wanted: Tensor, trained: list[int], horizons: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error, the targets' mean square, and the cosine, [N] each, NaN where nothing is `trained`."""
        power = wanted.square().mean((0, 2))
        norms = (found.square().mean((0, 2)) * power).sqrt()
        cosine = (found * wanted).mean((0, 2)) / norms.clamp_min(Normalized.tiny)
        rows = wanted.new_full((3, horizons), float("nan"))
        rows[:, trained] = torch.stack([error, power, cosine])
        errors, powers, cosines = rows.unbind()
        return errors, powers, cosines

    def _bounded(self, trigger: State) -> tuple[Tensor, Tensor]:
        """[B, S] each: the packed state with tanh of its cells, and the gate of what is said of them."""
        bounded = self.packing.pack(states.floating(states.detach(trigger)))  # a copy, since no state is its packed form
        gate = torch.ones_like(bounded)
        for span in self.cells:
            cells = bounded[:, span].tanh_()
            gate[:, span].addcmul_(cells, cells, value=-1)
        return bounded, gate

    def _scales(self) -> Tensor:
        """[N, S], the root mean square of every number's segment; zero before the first update."""
        return self.mean_square.sqrt()[:, self.packing.segment]

    @torch.no_grad()
    def _update(self, trained: list[int], wanted: Tensor) -> None:
        """Take targets [B, n, S] of the horizons `trained` into the mean squares, as `RunningRMS` does."""
        counts = self.counts[trained] + 1
        weight = (1 / counts).clamp_min(1 - self.decay)
        fresh = self.packing.segment_means(wanted.square().mean(0))
        if self.across_ranks is not None:
            (fresh,) = self.across_ranks.mean([fresh])
        self.mean_square[trained] = torch.lerp(self.mean_square[trained], fresh, weight)
        self.counts[trained] = counts


class StateHeads(PackedSynthesizer):
    """Messages by horizon for a recurrent state, learned by gradient descent: a `StateNetwork`, bounded and normalised.

    Args:
        example: a state of the model, such as `model.initial_state(1)`.
        horizons: N, number of messages.
        cells, decay, limit: see `PackedSynthesizer`.
        hidden, batch_dim, encoder, future: see `StateTrunk`.
    """

    def __init__(
        self,
        example: State,
        horizons: int = 1,
        *,
        cells: Any = False,
        decay: float = 0.99,
        limit: float | None = None,
        **network: Any,
    ) -> None:
        super().__init__(StateNetwork(example, horizons, **network), example, cells, decay, limit)

    def outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Those of the network's heads."""
        found, loss = self.network.packed(bounded, context)
        return Outputs(found * gate[:, None], None, loss)


class StateSynthesizer(StateHeads):
    """One synthesizer for a recurrent state, its target bootstrapped: a_k + γ J_kᵀ M(s_{k+1}).

    Args:
        example, cells, hidden, batch_dim, encoder, future, decay, limit: see `StateHeads`.
    """

    def __init__(self, example: State, **settings: Any) -> None:
        super().__init__(example, 1, **settings)


class Horizons(nn.Module):
    """K synthesizers in one: horizon n predicts the gradient of the loss of the n-th window ahead.

        target of E_1(s_k) = a_k                            exact, without bootstrap
        target of E_n(s_k) = J_kᵀ E_{n-1}(s_{k+1})          n = 2..K
        target of the tail = J_kᵀ (E_K + γ tail)(s_{k+1})   where there is one
        injected           = c (Σ_n γ^{n-1} w_n E_n + γ^K w_tail tail)

    Nothing but the tail bootstraps on itself. Discount, number of horizons used and their weights may change at any time
    without training anew; only the tail's target depends on γ.

    Args:
        heads: `predict(trigger, context)` gives E_1..E_K and the tail, a list of messages.
        horizons: K.
        tail: whether a last head stands for all windows behind the K-th.
        draw: train one head, drawn at random, a window: one vector-Jacobian product instead of K. Heads that learn as they
            predict do so at every window all the same.

    Attributes:
        weights: w, one number a head, the tail's last; 1 at first. Set it, or single entries, at any time.

    Raises:
        ValueError: `horizons` is not positive.
    """

    draws: Tensor

    def __init__(self, heads: nn.Module, *, horizons: int = 1, tail: bool = False, draw: bool = False) -> None:
        super().__init__()
        if horizons < 1:
            raise ValueError(f"horizons must be positive, got {horizons}")
        self.horizons = horizons
        self.tail = tail
        self.draw = draw
        self.weights = [1.0] * (horizons + tail)
        self.heads = heads
        self.learns_ahead = learns_ahead(heads)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def predict(self, trigger: State, context: Any) -> list[State]:
        """E_1..E_K and the tail, raw."""
        return predict(self.heads, trigger, context)

    def learn_ahead(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """The same from heads that learn as they predict, and their loss; see `synthesizers.learn_ahead`."""
        return learn_ahead(self.heads, trigger, context)

    def forward(self, trigger: State, context: Any = None) -> State:
        """The raw gradient of all the windows predicted, undiscounted: Σ_n w_n E_n + w_tail tail."""
        messages = self.predict(trigger, context)
        return states.with_floating(trigger, combine(messages, self.target_rule(1.0, 1.0).weights))

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """One regression step of the heads that have a target."""
        self.draws += 1
        return regress(self.heads, trigger, context, targets)

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """The rule above, for one window."""
        rule = increments(scale, discount, self.weights, self.tail)._replace(ahead=self.learns_ahead)
        if not self.draw or self.learns_ahead:  # there a target measures, which all heads learn without
            return rule
        chosen = drawn(len(self.weights), int(self.draws))
        return rule._replace(trained=[i == chosen for i in range(len(self.weights))])


class MultiHorizonSynthesizer(Horizons):
    """`Horizons` by one network that sees the whole state, and what it has ahead, and has a head for each of them.

    Args:
        example: a state of the model.
        horizons, tail, draw: see `Horizons`.
        cells, hidden, batch_dim, encoder, future, decay, limit: see `StateHeads`.

    Raises:
        ValueError: `horizons` is not positive.
    """

    def __init__(
        self, example: State, *, horizons: int = 1, tail: bool = False, draw: bool = False, **settings: Any
    ) -> None:
        heads = StateHeads(example, horizons + tail, **settings)
        super().__init__(heads, horizons=horizons, tail=tail, draw=draw)


class AuxiliaryTask(nn.Module):
    """Predict the synthetic gradient of the window's last state from the state behind the window's first step.

    Its loss flows into the RNN, which so learns to know early where its state is going to matter.

    Source: the auxiliary task of Jaderberg et al. 2017, section 3.1 ("DNI + Aux"). We differ in the target's unit, its
    running root mean square, so that the weight of the task does not depend on the gradient's scale.

    Args:
        example: a state of the model.
        hidden, batch_dim: see `StateNetwork`; no lookahead, since the RNN has none.
        decay: of the running root mean square.
    """

    def __init__(self, example: State, *, hidden: Sequence[int] = (256,), batch_dim: Any = 1, decay: float = 0.99) -> None:
        super().__init__()
        self.network = StateNetwork(example, 1, hidden=hidden, batch_dim=batch_dim)
        self.rms = RunningRMS(decay)

    def forward(self, state: State, message: Sequence[Tensor]) -> Tensor:
        """Mean squared error of the prediction at `state`, in units of the running root mean square of `message`."""
        prediction = states.floating(self.network(state))
        self.rms.update(list(message), list(message))
        scales = self.rms.scales() or []
        normal = [m / scale.clamp_min(Normalized.tiny) for m, scale in zip(message, scales, strict=True)]
        return mean_squared([prediction], [normal]).loss
