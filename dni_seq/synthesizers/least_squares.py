"""Heads solved by least squares instead of descended: a synthesizer that keeps up with a network that learns fast.

The map from a state to its gradient moves with every update of the RNN. A synthesizer that follows it by gradient descent
needs hundreds of windows to learn what a few dozen windows have shown; by then the map is another one. Given the features of
its trunk, a linear head has a best value in closed form, from sums over the latest windows that forget exponentially.

Source: recursive least squares with forgetting, as adaptive filters have it (Haykin, Adaptive Filter Theory); its use for
synthetic gradients is ours.

Legend: B = lanes, F = features, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dni_seq.core.states import State
from dni_seq.synthesizers.packed import Outputs, PackedSynthesizer
from dni_seq.synthesizers.state_mlp import StateTrunk


class LeastSquaresHeads(PackedSynthesizer):
    """Messages by horizon whose last layer is the least-squares fit to the latest targets; the trunk learns by gradient.

    Features are 1 and those of the trunk, whose number does not grow with the lookahead. For each horizon, sums of their
    products with themselves and with the targets forget exponentially, and every `solve_every` regressions the heads are
    solved from them.

    Args:
        example: a state of the model, such as `model.initial_state(1)`.
        horizons: N, number of messages.
        memory: how many lanes' targets the sums remember for each feature: 12 means that the weight of the past has fallen
            to 1/e when 12 F lanes have been seen since.
        ridge: added to the diagonal, as a share of its mean.
        solve_every: regressions from one solution to the next.
        cells, decay, limit: see `PackedSynthesizer`.
        hidden, batch_dim, encoder, future: see `StateTrunk`.

    Raises:
        ValueError: a setting is not positive.
    """

    covariance: Tensor
    correlation: Tensor
    solution: Tensor
    gate_power: Tensor
    regressions: Tensor

    def __init__(
        self,
        example: State,
        horizons: int = 1,
        *,
        memory: float = 12.0,
        ridge: float = 1e-3,
        solve_every: int = 4,
        cells: Any = False,
        decay: float = 0.99,
        limit: float | None = None,
        **network: Any,
    ) -> None:
        for name, value in (("memory", memory), ("ridge", ridge), ("solve_every", solve_every)):
            if not value > 0:
                raise ValueError(f"LeastSquaresHeads: {name} must be positive, got {value}")
        trunk = StateTrunk(example, horizons, **network)
        super().__init__(trunk, example, cells, decay, limit)
        self.memory, self.ridge, self.solve_every = memory, ridge, solve_every
        features, size, zeros = 1 + trunk.width, self.packing.size, self.mean_square.new_zeros
        self.register_buffer("covariance", zeros(horizons, features, features))
        self.register_buffer("correlation", zeros(horizons, features, size))
        self.register_buffer("solution", zeros(horizons, features, size))
        self.register_buffer("gate_power", zeros(horizons, 1, size))
        self.register_buffer("regressions", torch.zeros((), dtype=torch.int64))

    def outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Those of the fit, and its features [B, F]."""
        trunk, loss = self.network.features(bounded, context)
        features = torch.cat([trunk.new_ones(len(trunk), 1), trunk], dim=1)
        found = torch.matmul(features, self.solution).transpose(0, 1)
        return Outputs(found * gate[:, None], features, loss)

    def learn(self, trained: list[int], features: Tensor | None, gate: Tensor, wanted: Tensor) -> None:
        """Take targets into the sums, those of all ranks where there are several, and solve where that is due.

        Outputs are gated, so each is a fit with the gate's square as weight. One covariance for all of them takes that
        weight as independent of the features.
        """
        assert features is not None
        lanes = len(features)
        gated = (wanted * gate[:, None]).transpose(0, 1)  # [n, B, S]
        fresh = [features.T @ features, features.T @ gated, gate.square().sum(0)]
        if self.across_ranks is not None:
            lanes, fresh = lanes * self.across_ranks.size, self.across_ranks.sums(fresh)
        keep = 1 - 1 / max(self.memory * features.shape[1] / lanes, 1.0)
        for sums, added in zip((self.covariance, self.correlation, self.gate_power), fresh, strict=True):
            if len(trained) == len(sums):
                sums.mul_(keep).add_(added)
            else:
                sums[trained] = keep * sums[trained] + added
        self.regressions += 1
        if self.regressions % self.solve_every == 0:
            self._solve()

    def _solve(self) -> None:
        """The heads that fit best; as they were where the sums say too little."""
        diagonal = self.covariance.diagonal(dim1=1, dim2=2)
        lanes = diagonal[:, :1, None]  # the first feature is 1, so its sum of squares counts lanes
        shift = (self.ridge * diagonal.mean(1, keepdim=True)).expand_as(diagonal)
        factor, failed = torch.linalg.cholesky_ex(self.covariance + torch.diag_embed(shift))
        # A head that was never trained has sums of zero; its inverse is not used, but must not fail.
        factor = torch.where((failed == 0)[:, None, None], factor, torch.eye(factor.shape[1]).to(factor))
        weight = (self.gate_power / lanes).clamp_min(1e-6)
        # By the inverse: F is small beside S, and a product is several times as fast as a solution for as many columns.
        found = torch.cholesky_inverse(factor) @ (self.correlation / weight)
        usable = (failed == 0) & found.isfinite().flatten(1).all(1)
        # Another tensor, not another content: the regression's backward pass still reads the former one. Contiguous, as a
        # loaded one is: the last bits of a product depend on the layout.
        self.solution = torch.where(usable[:, None, None], found, self.solution).contiguous()
