"""PackedSynthesizer: base class of synthesizers on packed states.

Legend: B = lanes, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.windows import Reduction
from dni_seq.synthesizers.base import (
    Collective,
    Regression,
    check_like,
)
from dni_seq.synthesizers.binding import check_dtype
from dni_seq.synthesizers.normalization import Normalized, checked_limit, limited
from dni_seq.synthesizers.packing import Packing


class Outputs(NamedTuple):
    """The result of `PackedSynthesizer._outputs`.

    Attributes:
        messages: [B, N, S], multiplied by the gate. The messages of `FutureGradient` are raw, all others are normalised.
        features: the features that `_learn` needs, or None.
        loss: 0-d, the loss of a future model that provides features, or None.
    """

    messages: Tensor
    features: Tensor | None
    loss: Tensor | None


class PackedSynthesizer(nn.Module):
    """Base class of synthesizers on packed states, with bounded cells, normalised targets and limited messages.

    A subclass provides the network and its outputs. The result equals that of `Normalized(GatedCells(network))`, with a
    third of the small operations, which dominate the time of a short window's step.

    Args:
        network: a `StateTrunk`, a `StateNetwork` or a `StatePredictor`, which have the attributes `packing` and `horizons`.
        example: a state of the model, such as `model.initial_state(1)`. Its values and its number of lanes do not matter.
        cells: which leaves are LSTM cell states, such as `LSTM_CELLS`. False for none.
        decay: factor of the old value in the running mean of squared targets. The first 1 / (1 - decay) updates form a
            plain mean instead.
        limit: the largest absolute value in a message, in units of its segment's running root mean square. None for no
            limit.

    Attributes:
        cells: the slices of the packed state that hold LSTM cells.
        across_ranks: a `Collective` that reduces the statistics over all ranks, or None.
        mean_square: buffer [N, G], the running mean square of the targets of each segment (see `Packing`).
        counts: buffer [N, 1], number of updates of each horizon.

    Raises:
        ValueError: `limit` is not positive.
    """

    mean_square: Tensor
    counts: Tensor

    def __init__(self, network: nn.Module, example: State, cells: Any, decay: float, limit: float | None) -> None:
        super().__init__()
        self.limit = checked_limit(limit)
        self.network: Any = network
        self.decay = decay
        self.across_ranks: Collective | None = None
        self.cells = self.packing.spans(cells, example, "cells")
        zeros = states.to_float32(states.floating(example)[0]).new_zeros  # the dtype in which states arrive
        horizons: int = self.network.horizons  # type: ignore[assignment]
        self.register_buffer("mean_square", zeros(horizons, len(self.packing.lengths)))
        self.register_buffer("counts", zeros(horizons, 1))

    def bind(self, *, window: int, reduction: Reduction | None, state_batch_dim: Any, state: State) -> None:
        """Checks the dtype of the trainer's states; see `dni_seq.synthesizers.binding.bind`."""
        check_dtype(self, state)

    @property
    def packing(self) -> Packing:
        """The `Packing` that turns states into vectors [B, S] and back."""
        packing: Packing = self.network.packing
        return packing

    def _outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Computes gated messages in normalised units; every subclass implements it.

        Args:
            bounded: [B, S], the packed state with tanh applied to its cells.
            gate: [B, S], 1 - tanh² at the cells, 1 elsewhere.
            context: the synthesizer's context.
        """
        raise NotImplementedError

    def _learn(self, trained: list[int], features: Tensor | None, gate: Tensor, wanted: Tensor) -> None:
        """Learns from targets without gradients, in addition to the regression; does nothing by default.

        Args:
            trained: the n horizons that have a target.
            features: the features that `_outputs` returned.
            gate: [B, S], as for `_outputs`.
            wanted: [B, n, S], the normalised targets.
        """

    def predict(self, trigger: State, context: Any) -> list[State]:
        """Returns one raw message for each horizon; messages are exactly zero before the first regression.

        Args:
            trigger: the state.
            context: a `Lookahead` if the synthesizer has an encoder or a future model, else None.
        """
        found = self._outputs(*self._bounded(trigger), context).messages
        messages = limited(found, self.limit) * self._scales()
        return [self.packing.unpack(message, trigger) for message in messages.unbind(1)]

    def forward(self, trigger: State, context: Any = None) -> State:
        """Returns the raw message of a synthesizer with one horizon."""
        (message,) = self.predict(trigger, context)
        return message

    def regress(self, trigger: State, context: Any, targets: list[State | None]) -> Regression:
        """Computes the mean squared error in normalised units, plus the loss of a future model if there is one.

        The targets are added to the running mean squares first.

        Args:
            trigger: the state at which the targets were computed.
            context: the context that belongs to the trigger.
            targets: one raw target for each horizon, None for a horizon without a target. At least one is not None.

        Raises:
            ValueError: a target differs from the trigger in its keys, the number of tensors, a shape or a dtype.
        """
        trained = [i for i, target in enumerate(targets) if target is not None]
        wanted = self._wanted(trigger, targets, trained)
        bounded, gate = self._bounded(trigger)
        outputs = self._outputs(bounded, gate, context)
        found = outputs.messages[:, trained]
        error = (found - wanted).square().mean((0, 2))
        with torch.no_grad():
            rows = self._measured(error, found, wanted, trained, len(targets))
            self._learn(trained, outputs.features, gate, wanted)
        loss = error.mean() if outputs.loss is None else error.mean() + outputs.loss
        return Regression(loss, *rows)

    def _wanted(self, trigger: State, targets: list[State | None], trained: list[int]) -> Tensor:
        """Adds the n targets that are not None to the running mean squares; returns these targets normalised, [B, n, S]."""
        like = self.packing.leaves(trigger)
        rows = [self.packing.leaves(target) for target in targets if target is not None]
        for row in rows:
            check_like(like, row, "trigger", "real message")
        packed = [self.packing.pack(row) for row in rows]
        wanted = torch.stack(packed, dim=1)
        self._update(trained, wanted)
        return wanted / self._scales()[trained].clamp_min(Normalized.tiny)

    @staticmethod
    def _measured(
        error: Tensor, found: Tensor, wanted: Tensor, trained: list[int], horizons: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean squared error, the targets' mean square and cosine, [N] each; NaN for horizons not in `trained`."""
        power = wanted.square().mean((0, 2))
        norms = (found.square().mean((0, 2)) * power).sqrt()
        cosine = (found * wanted).mean((0, 2)) / norms.clamp_min(Normalized.tiny)
        rows = wanted.new_full((3, horizons), float("nan"))
        rows[:, trained] = torch.stack([error, power, cosine])
        errors, powers, cosines = rows.unbind()
        return errors, powers, cosines

    def _bounded(self, trigger: State) -> tuple[Tensor, Tensor]:
        """Returns the packed state with tanh applied to its cells, and the gate of the messages, [B, S] each."""
        bounded = self.packing.pack(self.packing.leaves(states.detach(trigger)))  # a copy, because `pack` concatenates
        gate = torch.ones_like(bounded)
        for span in self.cells:
            cells = bounded[:, span].tanh_()
            gate[:, span].addcmul_(cells, cells, value=-1)
        return bounded, gate

    def _scales(self) -> Tensor:
        """Returns the root mean square of the segment of each number in a packed state, [N, S]; 0 before an update."""
        return self.mean_square.sqrt()[:, self.packing.segment]

    @torch.no_grad()
    def _update(self, trained: list[int], wanted: Tensor) -> None:
        """Adds targets [B, n, S] of the horizons `trained` to the running mean squares, as `RunningRMS` does.

        Skips a horizon whose targets are not all finite. They reach this method if a device skips the window.
        """
        counts = self.counts[trained] + 1
        weight = (1 / counts).clamp_min(1 - self.decay)
        fresh = self.packing.segment_means(wanted.square().mean(0))
        if self.across_ranks is not None:
            (fresh,) = self.across_ranks.mean([fresh])
        before, known = self.mean_square[trained], fresh.isfinite().all(1, keepdim=True)
        self.mean_square[trained] = torch.where(known, torch.lerp(before, fresh, weight), before)
        self.counts[trained] = torch.where(known, counts, counts - 1)
