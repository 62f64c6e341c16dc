"""Limits a vocabulary to its first ids, so that a predictor stays small. The first ids should be the most frequent ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FirstTokens(nn.Embedding):
    """An embedding of the first ids of a vocabulary. Ids from `num_embeddings - 1` on share the last row."""

    def forward(self, ids: Tensor) -> Tensor:
        """Returns embeddings [..., E] of ids [...]."""
        return super().forward(ids.clamp(max=self.num_embeddings - 1))


def token_embedding(vocabulary: int, classes: int, width: int) -> nn.Embedding:
    """Returns an embedding of a vocabulary's ids with at most `classes` rows.

    If the vocabulary is larger, ids from classes - 1 on share the last row.
    """
    return FirstTokens(classes, width) if vocabulary > classes else nn.Embedding(vocabulary, width)


def among_the_first(loss_fn: Callable[[Any, Tensor], Tensor], count: int) -> Callable[[Any, Tensor], Tensor]:
    """Returns `loss_fn` for `count` classes: target ids from count - 1 on share the last class."""

    def losses(outputs: Any, targets: Tensor) -> Tensor:
        return loss_fn(outputs, targets.clamp(max=count - 1))

    return losses
