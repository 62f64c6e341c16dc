"""A recurrent language model: embedding, recurrent cell, and a projection to the vocabulary.

The layout and the uniform initialisation are those of PyTorch's `word_language_model` example. As in Zaremba et al. 2014,
arXiv 1409.2329, dropout is on the non-recurrent connections only. Weight tying is from Press & Wolf 2017, arXiv 1608.05859.

Legend: T = window length, B = lanes, V = vocabulary size, E = embedding size, H = hidden units, L = layers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dni_seq.models.cells import CELLS
from dni_seq.models.lstm_kernels import native_up_to, run_rnn, run_rnn_in_parts
from dni_seq.models.recurrent import build_rnn, initial_state

_INITIAL_RANGE = 0.1  # weights of embedding and projection are uniform in [-0.1, 0.1], as in PyTorch's example


class LanguageModel(nn.Module):
    """Predicts the next token at each step of B lanes of text: `model(tokens, state) -> (logits, state)`.

    Args:
        vocabulary_size: V, the number of token ids.
        cell: "lstm", whose state is (h, c), each [L, B, H]; "gru", whose state is h [L, B, H]; or a diagonal cell, "mingru"
            or "lru", see `DiagonalRNN`.
        embed: E, the size of the embedding.
        hidden: H, the number of hidden units in a layer.
        layers: L, the number of recurrent layers.
        dropout: share of activations zeroed after the embedding, between layers and before the projection.
        tied: whether the projection uses the weights of the embedding.
        sparse_embedding: whether the gradient of the embedding is a sparse tensor of the rows that were read. The embedding
            then needs an optimizer for sparse gradients, see `core.optimizer_step.JoinedOptimizer`.
        traces: the traces that the state carries, for credit from before the window: see `build_rnn`. None for no traces.
        trace_decay: α of factored traces, see `build_rnn`; None for the default.

    Attributes:
        embedding: nn.Embedding(V, E).
        rnn: the recurrent network.
        projection: nn.Linear(H, V).
        settings: the arguments of the constructor, by name.
        native_steps: longest window, in steps, that runs on PyTorch's native LSTM kernel on the CPU; see
            `lstm_kernels.native_up_to`.

    Raises:
        ValueError: the cell is unknown, a size is below 1, dropout is outside [0, 1), tied weights are combined with
            embed != hidden or with a sparse embedding, or `build_rnn` rejects the traces or their decay.
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
        traces: str | None = None,
        trace_decay: float | None = None,
    ):
        super().__init__()
        sizes = {"vocabulary_size": vocabulary_size, "embed": embed, "hidden": hidden, "layers": layers}
        _check_settings(sizes, cell, dropout, tied, sparse_embedding)
        options = {"dropout": dropout, "tied": tied, "sparse_embedding": sparse_embedding, "traces": traces}
        options["trace_decay"] = trace_decay
        self.settings: dict[str, Any] = {"cell": cell, **sizes, **options}
        self.cell, self.hidden, self.layers = cell, hidden, layers
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocabulary_size, embed, sparse=sparse_embedding)
        self.rnn = build_rnn(cell, embed, hidden, layers, dropout, traces, trace_decay)
        self.native_steps = native_up_to(0)
        self.projection = nn.Linear(hidden, vocabulary_size)
        nn.init.uniform_(self.embedding.weight, -_INITIAL_RANGE, _INITIAL_RANGE)
        nn.init.uniform_(self.projection.weight, -_INITIAL_RANGE, _INITIAL_RANGE)
        nn.init.zeros_(self.projection.bias)
        if tied:
            self.projection.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns logits [T, B, V] and the state after the last token.

        Args:
            tokens: int64 [T, B].
            state: state before the first token; None for zeros.
        """
        embedded = self.dropout(self.embedding(tokens))  # [T, B, E]
        outputs, state = run_rnn(self.rnn, embedded, state, self.native_steps)  # [T, B, H]
        return self.projection(self.dropout(outputs)), state

    def run_in_parts(self, tokens: Tensor, state: Any, steps: int) -> tuple[Tensor, list[Any]]:
        """Does what `forward` does, and returns the logits [T, B, V] and the state after every `steps` tokens.

        Only the recurrent network runs in parts, since embedding and projection cost less for all tokens at once.
        """
        embedded = self.dropout(self.embedding(tokens))
        outputs, found = run_rnn_in_parts(self.rnn, embedded, state, self.native_steps, steps)
        return self.projection(self.dropout(outputs)), found

    def initial_state(self, lanes: int) -> Any:
        """Returns a zero state for `lanes` lanes, with the dtype and the device of the parameters."""
        return initial_state(self.rnn, lanes)

    def save_pretrained(self, directory: str | Path) -> None:
        """Does what `dni_seq.integrations.pretrained.save` does: writes config.json and model.safetensors."""
        _pretrained().save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: torch.device | str = "cpu") -> LanguageModel:
        """Does what `dni_seq.integrations.pretrained.load` does: loads a saved model, or the best checkpoint of a run."""
        model: LanguageModel = _pretrained().load(directory, device=device)
        return model


def _pretrained() -> Any:
    # Imported by name, since imports go one way: `models` must not depend on `integrations`, nor on safetensors.
    return importlib.import_module("dni_seq.integrations.pretrained")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy [T, B] in nats for logits [T, B, V] and targets [T, B], in float32 or higher precision."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(precise.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _check_settings(sizes: dict[str, int], cell: str, dropout: float, tied: bool, sparse: bool) -> None:
    """Raises a ValueError if a setting is unknown or out of its range."""
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
            "tied weights and a sparse embedding exclude each other, because the projection's gradient is dense: "
            "turn one of them off"
        )
