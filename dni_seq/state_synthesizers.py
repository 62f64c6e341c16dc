"""Synthesizers made for recurrent states: several layers and tensors, a look at the future, several horizons.

Source: the recipe starts from Jaderberg et al. 2017, arXiv 1608.05343, section 3.1. We differ in the heads by horizon (each
predicts the gradient of one window ahead, so that none but the tail bootstraps on itself), in the lookahead of more than one
step, in `GatedCells` and in `Normalized`; docs/synthetic-gradients.md measures each.

Legend: B = lanes, H = hidden units, L = layers, K = horizons, m = lookahead in steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import states
from .states import State
from .synthesizers import GatedCells, Normalized, Regression, RunningRMS, mean_squared, zero_
from .targets import TargetRule, combine, increments
from .windows import Lookahead


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
        if not isinstance(context, Lookahead) or len(context.inputs) < self.steps:
            seen = f"{len(context.inputs)} steps" if isinstance(context, Lookahead) else type(context).__name__
            raise ValueError(
                f"the synthesizer looks {self.steps} steps ahead, its context is {seen}: pass windows through "
                f"dni_seq.with_lookahead(windows, {self.steps}), and lookahead=window.lookahead to the trainer"
            )
        ahead = context.span(0, self.steps)
        counts = ahead.valid if ahead.mask is None else ahead.valid & ahead.mask
        encoded = torch.cat([self.inputs(ahead.inputs), self.targets(ahead.targets)], dim=-1)
        flags = torch.stack([ahead.valid, counts], dim=-1).to(encoded.dtype)
        step = torch.cat([encoded * flags[..., :1], flags], dim=-1)  # [m, B, E + 2]
        return step.transpose(0, 1).flatten(1)


def _width(module: nn.Module) -> int:
    for name in ("embedding_dim", "out_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise ValueError(
        f"LookaheadEncoder: the width of {type(module).__name__} is unknown; pass features, inputs' and targets'"
    )


class StateNetwork(nn.Module):
    """An MLP from the whole state of a lane, and what it has ahead, to one message for each horizon.

    The trunk sees every tensor and layer at once; each tensor of each layer of each horizon has its own head, so a layer
    needs no index. Heads, and a linear path beside the trunk, start at zero.

    Args:
        example: a state; leaves [L, B, H] or [B, H], shapes but for B are taken from it.
        horizons: number of messages.
        hidden: sizes of the trunk's hidden layers.
        batch_dim: where the lanes lie in the state's leaves, an int or a nest.
        encoder: context encoder with an attribute `features`, None for a synthesizer without context.
    """

    def __init__(
        self,
        example: State,
        horizons: int = 1,
        *,
        hidden: Sequence[int] = (512, 512),
        batch_dim: Any = 1,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if horizons < 1:
            raise ValueError(f"horizons must be positive, got {horizons}")
        leaves = states.flatten(example)
        dims = states.spread(batch_dim, example, "batch_dim")
        self._dims = [d % leaf.dim() for d, leaf in zip(dims, leaves, strict=True) if states.is_floating(leaf)]
        shapes = [leaf.movedim(d, 0).shape[1:] for d, leaf in zip(self._dims, states.floating(example), strict=True)]
        self._sizes = [shape.numel() for shape in shapes]
        self.horizons = horizons
        self.encoder = encoder
        size = sum(self._sizes)
        widths = [size + (0 if encoder is None else int(encoder.features)), *hidden]  # type: ignore[arg-type]
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.heads = nn.Linear(widths[-1], horizons * size)
        self.linear = nn.Linear(size, horizons * size, bias=False)
        zero_(self.heads)
        zero_(self.linear)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """One message for each horizon, in the unit that this network is trained in."""
        leaves = states.floating(trigger)
        flat = torch.cat(
            [leaf.movedim(d, 0).flatten(1) for d, leaf in zip(self._dims, leaves, strict=True)], dim=1
        )  # [B, S]
        out = self.heads(self._trunk(flat, context)) + self.linear(flat)
        messages = []
        for message in out.chunk(self.horizons, dim=1):
            pieces = message.split(self._sizes, dim=1)
            shaped = [
                piece.reshape(leaf.movedim(d, 0).shape).movedim(0, d)
                for piece, leaf, d in zip(pieces, leaves, self._dims, strict=True)
            ]
            messages.append(states.with_floating(trigger, shaped))
        return messages

    def forward(self, trigger: State, context: Any = None) -> State:
        """The message of a network of one horizon."""
        (message,) = self.predict(trigger, context)
        return message

    def _trunk(self, flat: Tensor, context: Any) -> Tensor:
        if self.encoder is not None:
            flat = torch.cat([flat, self.encoder(context)], dim=1)
        elif context is not None:
            raise ValueError("a context is given; build the synthesizer with an encoder (LookaheadEncoder) to use it")
        for layer in self.trunk:
            flat = F.gelu(layer(flat))
        return flat


class StateSynthesizer(Normalized):
    """One synthesizer for a recurrent state, its target bootstrapped: a_k + γ J_kᵀ M(s_{k+1}).

    Args:
        example: a state of the model, such as `model.initial_state(1)`.
        cells: which leaves are LSTM cells, such as `LSTM_CELLS`; False for none.
        hidden: sizes of the trunk's hidden layers.
        batch_dim: where the lanes lie in the state's leaves, an int or a nest.
        encoder: a `LookaheadEncoder`, None for the purely online case.
        decay: of the running root mean square.
    """

    def __init__(
        self,
        example: State,
        *,
        cells: Any = False,
        hidden: Sequence[int] = (512, 512),
        batch_dim: Any = 1,
        encoder: nn.Module | None = None,
        decay: float = 0.99,
    ) -> None:
        network = StateNetwork(example, 1, hidden=hidden, batch_dim=batch_dim, encoder=encoder)
        super().__init__(GatedCells(network, cells), decay)


class MultiHorizonSynthesizer(nn.Module):
    """K synthesizers in one: horizon n predicts the gradient of the loss of the n-th window ahead.

        target of E_1(s_k) = a_k                            exact, without bootstrap
        target of E_n(s_k) = J_kᵀ E_{n-1}(s_{k+1})          n = 2..K
        target of the tail = J_kᵀ (E_K + γ tail)(s_{k+1})   where there is one
        injected           = c (Σ_n γ^{n-1} w_n E_n + γ^K w_tail tail)

    Nothing but the tail bootstraps on itself. Discount, number of horizons used and their weights may change at any time
    without training anew; only the tail's target depends on γ.

    Args:
        example: a state of the model.
        horizons: K.
        tail: whether a last head stands for all windows behind the K-th.
        draw: train one head, drawn at random, a window: one vector-Jacobian product instead of K.
        cells, hidden, batch_dim, encoder, decay: see `StateSynthesizer`.

    Attributes:
        weights: w, one number a head, the tail's last; 1 at first. Set it, or single entries, at any time.

    Raises:
        ValueError: `horizons` is not positive.
    """

    draws: Tensor

    def __init__(
        self,
        example: State,
        *,
        horizons: int = 1,
        tail: bool = False,
        draw: bool = False,
        cells: Any = False,
        hidden: Sequence[int] = (512, 512),
        batch_dim: Any = 1,
        encoder: nn.Module | None = None,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if horizons < 1:
            raise ValueError(f"horizons must be positive, got {horizons}")
        self.horizons = horizons
        self.tail = tail
        self.draw = draw
        self.weights = [1.0] * (horizons + tail)
        network = StateNetwork(example, horizons + tail, hidden=hidden, batch_dim=batch_dim, encoder=encoder)
        self.heads = Normalized(GatedCells(network, cells), decay)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def predict(self, trigger: State, context: Any) -> list[State]:
        """E_1..E_K and the tail, raw."""
        return self.heads.predict(trigger, context)

    def forward(self, trigger: State, context: Any = None) -> State:
        """The raw gradient of all the windows predicted, undiscounted: Σ_n w_n E_n + w_tail tail."""
        messages = self.predict(trigger, context)
        return states.with_floating(trigger, combine(messages, self.target_rule(1.0, 1.0).weights))

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """One regression step of the heads that have a target."""
        self.draws += 1
        return self.heads.regress(trigger, context, targets)

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """The rule above, for one window."""
        rule = increments(scale, discount, self.weights, self.tail)
        if not self.draw:
            return rule
        # Seeded by a counter that is saved with the module: draws go on exactly and leave the global random state alone.
        generator = torch.Generator().manual_seed(int(self.draws))
        drawn = int(torch.randint(len(self.weights), (), generator=generator))
        return rule._replace(trained=[i == drawn for i in range(len(self.weights))])


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
