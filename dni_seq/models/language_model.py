"""A recurrent language model: embedding, LSTM or GRU, and a projection to the vocabulary.

The layout and the uniform initialisation are those of PyTorch's `word_language_model` example (Zaremba et al. 2014,
arXiv 1409.2329: dropout on the non-recurrent connections only); weight tying is Press & Wolf 2017, arXiv 1608.05859.

Legend: T = window length, B = lanes, V = vocabulary size, E = embedding size, H = hidden units, L = layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dni_seq.models.lstm_kernels import native_up_to, run_rnn

CELLS = ("lstm", "gru")
_INITIAL_RANGE = 0.1  # of the embedding's and the projection's weights, as in the example

LSTMState = tuple[Tensor, Tensor]
"""(h, c), each [L, B, H]."""


class LanguageModel(nn.Module):
    """Predict each next token of B lanes of text: `model(tokens, state) -> (logits, state)`.

    Args:
        vocabulary_size: V, the number of token ids.
        cell: "lstm", whose state is (h, c), each [L, B, H], or "gru", whose state is h [L, B, H].
        embed: E, the embedding's size.
        hidden: H, hidden units a layer.
        layers: L.
        dropout: share of activations zeroed after the embedding, between layers and before the projection.
        tied: the projection uses the embedding's weights.
        sparse_embedding: the embedding's gradient holds the rows that were read; see `optimization.JoinedOptimizer`.

    Attributes:
        native_steps: the longest window that PyTorch's native LSTM kernel runs on the CPU; see `kernels.native_up_to`.

    Raises:
        ValueError: unknown cell, sizes below 1, dropout outside [0, 1), tied weights with embed != hidden or a
            sparse embedding.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        cell: str = "lstm",
        embed: int = 200,
        hidden: int = 200,
        layers: int = 2,
        dropout: float = 0.0,
        tied: bool = False,
        sparse_embedding: bool = False,
    ):
        super().__init__()
        sizes = {"vocabulary_size": vocabulary_size, "embed": embed, "hidden": hidden, "layers": layers}
        _check_settings(sizes, cell, dropout, tied, sparse_embedding)
        self.cell, self.hidden, self.layers = cell, hidden, layers
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocabulary_size, embed, sparse=sparse_embedding)
        # nn.LSTM warns of dropout where there is no second layer to apply it to.
        between = dropout if layers > 1 else 0.0
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        self.rnn = kind(embed, hidden, layers, dropout=between)
        self.native_steps = native_up_to(0)
        self.projection = nn.Linear(hidden, vocabulary_size)
        nn.init.uniform_(self.embedding.weight, -_INITIAL_RANGE, _INITIAL_RANGE)
        nn.init.uniform_(self.projection.weight, -_INITIAL_RANGE, _INITIAL_RANGE)
        nn.init.zeros_(self.projection.bias)
        if tied:
            self.projection.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Tensor | LSTMState | None = None) -> tuple[Tensor, Tensor | LSTMState]:
        """Read tokens [T, B] int64 from `state` on; return logits [T, B, V] and the state behind the last token.

        `state` None means the initial one, zeros.
        """
        embedded = self.dropout(self.embedding(tokens))  # [T, B, E]
        outputs, state = run_rnn(self.rnn, embedded, state, self.native_steps)  # [T, B, H]
        return self.projection(self.dropout(outputs)), state

    def initial_state(self, lanes: int) -> Tensor | LSTMState:
        """Zeros for `lanes` lanes, in the parameters' dtype and on their device."""
        shape = (self.layers, lanes, self.hidden)
        hidden = self.projection.weight.new_zeros(shape)
        return hidden if self.cell == "gru" else (hidden, torch.zeros_like(hidden))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [T, B] in nats of logits [T, B, V] against targets [T, B]; half precision is summed in float32."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(precise.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _check_settings(sizes: dict[str, int], cell: str, dropout: float, tied: bool, sparse: bool) -> None:
    """Raise a ValueError that says which setting to change."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}")
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if tied and sizes["embed"] != sizes["hidden"]:
        raise ValueError(f"tied weights need embed equal to hidden, got embed {sizes['embed']} and hidden {sizes['hidden']}")
    if tied and sparse:
        raise ValueError(
            "the projection's gradient is not sparse, so tied weights and a sparse embedding exclude each other"
        )
