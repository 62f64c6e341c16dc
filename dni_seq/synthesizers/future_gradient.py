"""FutureGradient: messages that are the gradient of a small learned future model's loss.

A message that is regressed towards exact gradients can be right on average and still have an error that is the same in all
lanes for many windows; the RNN accumulates such an error. R² of a message therefore tells little about its benefit. Here the
message is the true gradient of a learned loss, so it moves the RNN towards states from which the future model predicts
better. The future model learns from the targets of the next m steps, at every window, without vector-Jacobian products.

Source: ours. Jaderberg et al. 2017, arXiv 1608.05343, regress messages towards gradients. Trinh et al. 2018, "Learning
Longer-term Dependencies in RNNs with Auxiliary Losses", arXiv 1803.00144, train an RNN by the loss of a second network that
predicts from the RNN's states. Their network is unrolled from single past states; ours is evaluated at the end of every
window. docs/results/characters.md has measurements.

Legend: B = lanes, S = numbers in one lane's packed state, m = lookahead in steps, K = horizons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.windows import Reduction
from dni_seq.synthesizers.base import Recommended, Regression
from dni_seq.synthesizers.binding import StepWeight
from dni_seq.synthesizers.defaults import MEASURE_EVERY, default_scale
from dni_seq.synthesizers.for_model import check_past_loss, example_state, lstm_cells, predictor_for, read_text
from dni_seq.synthesizers.packed import Outputs, PackedSynthesizer
from dni_seq.synthesizers.packing import Packing
from dni_seq.synthesizers.predictor import Predictor
from dni_seq.synthesizers.target_rule import TargetRule, increments

MESSAGE_LIMIT = 10.0
"""Default of `limit` in `FutureGradient.for_model`."""


class ClampCache(NamedTuple):
    """The range to which messages are clamped, and the values from which the range was computed.

    Attributes:
        of: the mean squares of the targets.
        version: the version counter of the tensor `of` when the range was computed.
        limit: the limit.
        range: the least and the largest allowed value, [K, S] each.
    """

    of: Tensor
    version: int
    limit: float
    range: tuple[Tensor, Tensor]

    def holds(self, of: Tensor, limit: float) -> bool:
        """Returns whether the range is still valid for mean squares `of` and `limit`."""
        return self.of is of and self.version == of._version and self.limit == limit


class StatePredictor(nn.Module):
    """A predictor and the packing of the states that it reads.

    Args:
        example: a state of the model.
        future: function `S -> Predictor`, where S is the width of a lane's packed state.
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in [L, B, H], 0 in [B, H].

    Attributes:
        packing: the `Packing` of the state.
        future: the predictor.
        horizons: K, the number of the predictor's parts.
    """

    def __init__(self, example: State, future: Callable[[int], Predictor], batch_dim: Any) -> None:
        super().__init__()
        self.packing = Packing(example, batch_dim)
        self.future = future(self.packing.size)
        self.horizons = self.future.parts


class FutureGradient(PackedSynthesizer):
    """Predicts one message for each of K horizons: the gradient of a predictor's loss over one of K parts of its steps.

        M_n(s) = w g ⊙ ∂(Σ_{steps j of part n} ℓ_j)/∂u        n = 1..K

    u is the state s with tanh applied to its LSTM cells, g is 1 - tanh² at these cells and 1 elsewhere, ℓ_j is the
    predictor's loss at step j, and w is the weight of one step in the trainer's loss. With a `FutureModel` of m = K T steps
    the parts are the next K windows. `GatedFuture`, `GatedPast` and `JointPredictor` have one part.

    The predictor trains at every window on the steps that it predicts. The targets of the trainer do not train the
    predictor. They serve for R² and cosine, and their running root mean square is the unit of `limit`. Messages have the
    unit of the trainer's loss from the first window on. They are not zero at the start, because zero-initialised last layers
    gave worse results (docs/results/pilots.jsonl). Messages have the state's shapes and dtypes.

    Source: ours; Trinh et al. 2018, arXiv 1803.00144, is related.

    Args:
        example: a state of the model, such as `model.initial_state(1)`. Its values and its number of lanes do not matter.
        future: function that makes the predictor, such as a `FutureModel` of K parts, from S, the width of a lane's packed
            state.
        window: T, the length of the trainer's windows. With the reduction "mean" w = 1 / (T · B). Default: the length of the
            trainer's first window.
        reduction: the trainer's reduction, "mean", "lane-mean" or "sum". With "mean", each step weighs 1 / (T · B),
            in masked windows too. Default: the reduction of the trainer; "mean" without a trainer.
        cells: which leaves are LSTM cell states, such as `LSTM_CELLS`. False for none.
        decay: factor of the old value in the running mean of squared targets. The first 1 / (1 - decay) updates form a
            plain mean instead.
        limit: the largest absolute value in a message, in units of the running root mean square of its targets. None for
            no limit. Before the first target there is no limit either.
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in [L, B, H], 0 in [B, H].

    Attributes:
        limit: the argument; it may be set at any time.
        self_supervised: always True: the predictor learns from the steps in the context. The trainer's targets serve only
            to evaluate the messages.

    Raises:
        ValueError: `window` or `limit` is not positive, or the reduction is unknown.
    """

    self_supervised = True

    def __init__(
        self,
        example: State,
        future: Callable[[int], Predictor],
        *,
        window: int | None = None,
        reduction: Reduction | None = None,
        cells: Any = False,
        decay: float = 0.99,
        limit: float | None = None,
        batch_dim: Any = None,
    ) -> None:
        super().__init__(StatePredictor(example, future, batch_dim), example, cells, decay, limit)
        self.step_weight = StepWeight("FutureGradient", window, reduction)
        self._clamp_cache: ClampCache | None = None

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        *,
        example_inputs: Tensor,
        vocabulary: int | None = None,
        outputs: int | None = None,
        horizons: int | None = None,
        classes: int = 500,
        units: int = 256,
        cells: Any = None,
        state: State | None = None,
        predict: str = "horizons",
        predict_steps: int | None = None,
        past_loss_fn: Callable[[Any, Tensor], Tensor] | None = None,
        batch_dim: Any = None,
    ) -> FutureGradient:
        """Builds the recommended synthesizer for a model; by default it has one message for each of the next K windows.

        The attribute `lookahead` of the result is the number of steps to pass to `dni_seq.with_lookahead`.

        Args:
            model: `model(inputs, state) -> (outputs, state)`.
            loss_fn: `loss_fn(outputs, targets)`, unreduced losses [T, B].
            example_inputs: [T, B, ...], the inputs of one window, from which T is read; the values do not matter.
            vocabulary: V, if inputs and targets are token ids and the outputs are logits [T, B, V].
            outputs: Q, if inputs are vectors [T, B, E] and the outputs are [T, B, Q].
            horizons: K. Default: max(2, 4 / T), rounded up; but 1 for token ids if T >= 8 or V > `classes`, as for words.
            classes: number of tokens that the predictor distinguishes; ids from classes - 1 on share one class.
            units: hidden units of the predictor.
            cells: see `FutureGradient`. Default: `LSTM_CELLS` if `model` has a PyTorch LSTM and `state` is a pair.
            state: an example of the model's state. Default: `model.initial_state(1)`, else the state after `example_inputs`.
            predict: "horizons", the next K windows; "future", m steps; "past", the last m inputs; "both", future and past.
            predict_steps: m, a multiple of K. Default: 40; for "horizons" K T, but 4 for token ids if T >= 8 and `horizons`
                is None. If the trainer's config has `message_every=n`, m = n is enough.
            past_loss_fn: unreduced losses [m, B] of predicted and true past vectors [m, B, E]. Default: mean squared error.
            batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in [L, B, H], 0 in [B, H].

        Raises:
            ValueError: `vocabulary` and `outputs` are both given or both None, or another argument is not as described here.
        """
        check_past_loss(past_loss_fn, predict)
        text = read_text(loss_fn, example_inputs, vocabulary, outputs, classes, past_loss_fn)
        future = predictor_for(text, len(example_inputs), predict, predict_steps, horizons, units)
        example = example_state(model, example_inputs) if state is None else state
        marks = lstm_cells(model, example) if cells is None else cells
        found = cls(example, future, window=len(example_inputs), cells=marks, limit=MESSAGE_LIMIT, batch_dim=batch_dim)
        leaf = states.floating(example)[0]
        return found.to(leaf.device, states.to_float32(leaf).dtype)

    def bind(self, *, window: int, reduction: Reduction | None, state_batch_dim: Any, state: State) -> None:
        """Takes over the trainer's window length and reduction; see `dni_seq.synthesizers.binding.bind`."""
        super().bind(window=window, reduction=reduction, state_batch_dim=state_batch_dim, state=state)
        self.step_weight.bind(window, reduction)

    @property
    def lookahead(self) -> int:
        """m, the number of steps that `dni_seq.with_lookahead` must attach to each window; 0 for none."""
        return self.model.steps

    @property
    def past_steps(self) -> int:
        """Number of inputs before a state that the predictor reads; a `SequenceTrainer` keeps them."""
        return self.model.past_steps

    @property
    def recommended(self) -> Recommended:
        """The settings that this synthesizer recommends to the trainer.

        c is 1 for up to 2 horizons and 2 / K for more, so that further horizons do not enlarge the sum. γ is 1. Targets
        serve only to evaluate messages, so they are computed at one window in 100. The predictor's gradient is not clipped.
        """
        return Recommended(default_scale(self.network.horizons), 1.0, math.inf, MEASURE_EVERY)

    @property
    def model(self) -> Predictor:
        """The predictor whose loss is differentiated, such as a `FutureModel`."""
        model: Predictor = self.network.future
        return model

    def target_rule(self, scale: float, discount: float) -> TargetRule:
        """Returns the `TargetRule` of the next window: the coefficients of the injection and of the targets.

        The targets serve only to evaluate the messages; the predictor trains on the steps that it predicts. The trainer
        calls this method once for each window.

        Args:
            scale: c, the trainer's `synthetic_scale`.
            discount: γ, the trainer's `discount`.
        """
        return increments(scale, discount, [1.0] * self.network.horizons, False)._replace(self_supervised=True)

    def _outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Computes one message for each of the K parts of the next m steps, detached and not yet clamped to `limit`.

        Args:
            bounded: packed states [B, S], with tanh applied to LSTM cells.
            gate: [B, S], 1 - tanh² at LSTM cells and 1 elsewhere; messages are multiplied by it.
            context: a `Lookahead` of at least m steps.

        Returns:
            `Outputs` with messages [B, K, S] in the unit of the trainer's loss, and neither features nor loss.
        """
        return self._weighted(self.model.gradients(bounded, context), gate, 1)

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns one message for each horizon, in the unit of the trainer's loss.

        Messages are clamped to `limit` once there has been a target.

        Args:
            trigger: the state.
            context: a `Lookahead` of at least m steps; `Surroundings` if the predictor predicts the past.

        Raises:
            ValueError: the context does not hold the steps that the predictor predicts, or the predictor's `loss_fn` does
                not return unreduced losses.
        """
        return self._unpacked(self._outputs(*self._bounded(trigger), context), trigger)

    def predict_and_train(self, trigger: State, context: Any) -> tuple[list[State], Tensor]:
        """Predicts, and adds the gradients of the predictor's mean loss to its parameters' `.grad`, in one backward pass.

        Returns:
            The messages as `predict` returns them, and the mean loss, 0-d.
        """
        bounded, gate = self._bounded(trigger)
        found, loss = self.model.learn(bounded, context)
        return self._unpacked(self._weighted(found, gate, self.model.predicted * len(gate)), trigger), loss

    def _weighted(self, found: Tensor, gate: Tensor, of: int) -> Outputs:
        """Returns messages, given the gradients [K, B, S] of (summed losses / `of`) with respect to the bounded states."""
        ranks = 1 if self.across_ranks is None or self.step_weight.reduction == "sum" else self.across_ranks.size
        weight = of * self.step_weight(len(gate) * ranks)
        return Outputs((found * (weight * gate)).transpose(0, 1), None, None)

    def _unpacked(self, outputs: Outputs, trigger: State) -> list[State]:
        found = outputs.messages
        if self.limit is not None:
            found = found.clamp(*self._clamp_range(self.limit))
        return [self.packing.unpack(message, trigger) for message in found.unbind(1)]

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes for a copy, without the cached range, which belongs to a tensor of the original."""
        return {**self.__dict__, "_clamp_cache": None}

    def _clamp_range(self, limit: float) -> tuple[Tensor, Tensor]:
        """Returns the least and the largest allowed value, [K, S] each; recomputed only if the mean squares have changed."""
        of = self.mean_square
        if self._clamp_cache is None or not self._clamp_cache.holds(of, limit):
            scales = self._scales()  # zero before the first target, or if all targets were zero: no limit then
            largest = torch.where(scales > 0, limit * scales, torch.inf)
            self._clamp_cache = ClampCache(of, of._version, limit, (-largest, largest))
        return self._clamp_cache.range

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Returns the predictor's mean loss on the steps that it predicts, for the caller to backpropagate.

        This loss trains the predictor. The targets are only compared with the messages.

        Args:
            trigger: the state.
            context: a `Lookahead` of at least m steps; `Surroundings` if the predictor predicts the past.
            targets: one for each horizon, None for a horizon that is not compared.

        Returns:
            The predictor's loss, and the diagnostics of the messages against the targets.

        Raises:
            ValueError: a target and its message differ in shape or dtype, or the context is invalid (see `predict`).
        """
        bounded, gate = self._bounded(trigger)
        loss = self.model.loss(bounded, context)
        trained = [i for i, target in enumerate(targets) if target is not None]
        with torch.no_grad():
            wanted = self._wanted(trigger, targets, trained)
            found = self._outputs(bounded, gate, context).messages[:, trained]
            scales = self._scales()[trained]
            # If all targets so far were zero, messages have no unit and count as zero.
            found = torch.where(scales > 0, found / scales, 0)
            error = (found - wanted).square().mean((0, 2))
            return Regression(loss, *self._measured(error, found, wanted, trained, len(targets)))
