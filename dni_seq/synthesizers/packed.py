"""PackedSynthesizer: what synthesizers on packed states share.

Legend: B = lanes, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.base import (
    Collective,
    Regression,
    check_like,
)
from dni_seq.synthesizers.normalization import Normalized, checked_limit, limited
from dni_seq.synthesizers.packing import Packing
from dni_seq.synthesizers.state_mlp import StateTrunk


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
        self.across_ranks: Collective | None = None
        self.cells = self.packing.spans(cells, example, "cells")
        zeros = states.to_float32(states.floating(example)[0]).new_zeros  # as states arrive
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
