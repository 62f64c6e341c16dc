"""`FutureGradient.for_model`: one line builds what the command builds, and the trainer tells it the rest."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dni_seq as dni
from dni_seq.app.build.credit import ModelSpec, build_synthesizer, trainer_settings
from dni_seq.app.lm.build_trainer import token_encoders
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.options import build
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.synthesizers.base import recommended
from dni_seq.synthesizers.defaults import HORIZONS
from dni_seq.synthesizers.for_model import example_state, lstm_cells, read_text, squared_error
from dni_seq.synthesizers.token_classes import FirstTokens
from tests.nests import assert_same

LANES = 4


def windows_of(vocabulary: int, window: int, lookahead: int, count: int = 12) -> list[dni.Window]:
    torch.manual_seed(1)
    text = torch.randint(vocabulary, (count * window + 1, LANES))
    cuts = range(0, count * window, window)
    pieces = [dni.Window(text[i : i + window], text[i + 1 : i + 1 + window]) for i in cuts]
    return list(dni.with_lookahead(pieces, lookahead))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("vocabulary", "window", "horizons"), [(30, 1, 4), (30, 3, 2), (700, 5, 1)])
def test_it_is_what_the_command_builds(cell, vocabulary, window, horizons):
    """The same weights, settings and losses over some windows: by characters at T = 1 and 3, and by words."""

    def model() -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(vocabulary, embed=8, hidden=6, layers=1, cell=cell)

    tokenizer = "word" if vocabulary > 500 else "char"
    options = build(LanguageModelOptions, {"model": cell, "bptt": window, "tokenizer": tokenizer})
    if tokenizer == "word":  # what the command derives from the tokenizer
        options = build(LanguageModelOptions, {"model": cell, "bptt": window, "tokenizer": tokenizer, "horizons": 1})
    credit = options.resolve(window)
    first = model()
    spec = ModelSpec(
        first,
        token_losses,
        example=first.initial_state(1),
        cells=dni.LSTM_CELLS if cell == "lstm" else False,
        encode=lambda: token_encoders(vocabulary, options.synthesizer_vocab_size),
        outputs=vocabulary,
        past_loss=token_losses,
        inputs=vocabulary,
        max_classes=options.synthesizer_vocab_size,
    )
    by_command = build_synthesizer(credit, spec)
    second = model()
    example = torch.zeros(window, LANES, dtype=torch.int64)
    in_one_line = dni.FutureGradient.for_model(second, token_losses, example_inputs=example, vocabulary=vocabulary)
    assert (in_one_line.network.horizons, in_one_line.lookahead) == (horizons, horizons * window)
    assert_same(
        dict(in_one_line.state_dict()),
        {name.removeprefix("heads."): value for name, value in by_command.state_dict().items() if name != "draws"},
    )

    def losses(network: nn.Module, synthesizer: nn.Module, **settings: Any) -> list[float]:
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        trainer = dni.SequenceTrainer(network, optimizer, token_losses, synthesizer=synthesizer, clip=1.0, **settings)
        windows = windows_of(vocabulary, window, in_one_line.lookahead)
        return [float(trainer.step(w.inputs, w.targets, lookahead=w.lookahead).loss) for w in windows]

    config = dni.SyntheticGradientConfig(**trainer_settings(credit))
    assert losses(second, in_one_line) == losses(first, by_command, config=config)
    assert_same(dict(first.state_dict()), dict(second.state_dict()))


def losses_of_vectors(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean(-1)


def test_vectors_and_sizes():
    model = VectorRNN(3, 2, hidden=8)
    inputs = torch.zeros(4, LANES, 3)
    found = dni.FutureGradient.for_model(model, losses_of_vectors, example_inputs=inputs, outputs=2, horizons=3, units=7)
    assert (found.lookahead, found.model.parts, found.model.units, found.model.inputs.in_features) == (12, 3, 7, 3)
    assert recommended(found) == (2 / 3, 1.0, float("inf"), 100)
    assert [span.start for span in found.cells] == [8]


class Own(nn.Module):
    """A user's model: no initial state, nn.LSTM, dropout and a running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 5)
        self.readout = nn.Linear(5, 20)

    def forward(self, ids, state=None):
        embedded = self.norm(self.embedding(ids).flatten(0, 1)).view(*ids.shape, 4)
        hidden, state = self.lstm(F.dropout(embedded, 0.5), state)
        return self.readout(hidden), state


def test_a_model_is_left_as_it_is():
    model = Own()
    before = copy.deepcopy(model.state_dict())
    ids = torch.zeros(5, 3, dtype=torch.int64)
    found = dni.FutureGradient.for_model(model, token_losses, example_inputs=ids, vocabulary=20)
    assert found.lookahead == 10
    assert_same(dict(model.state_dict()), dict(before))
    assert found.packing.size == 10
    assert [(span.start, span.stop) for span in found.cells] == [(5, 10)]


def test_an_example_state_draws_no_random_number():
    """Its dropout draws, but the random state is restored."""
    model, ids = Own(), torch.zeros(5, 3, dtype=torch.int64)
    before = torch.get_rng_state()
    leaves = example_state(model, ids)
    assert [leaf.shape for leaf in leaves] == [(1, 1, 5)] * 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_vocabulary_of_as_many_words_as_classes_shares_no_class():
    """With one word more the last words share a class, and the default is one horizon."""
    model, ids = LanguageModel(21, embed=4, hidden=5), torch.zeros(3, 2, dtype=torch.int64)
    for vocabulary, horizons in ((20, HORIZONS), (21, 1)):
        found = dni.FutureGradient.for_model(model, token_losses, example_inputs=ids, vocabulary=vocabulary, classes=20)
        assert (found.lookahead, found.model.inputs.num_embeddings) == (3 * horizons, 20)
        assert isinstance(found.model.inputs, FirstTokens) == (vocabulary == 21)


def test_in_a_long_window_token_ids_are_predicted_four_steps_ahead():
    """In one part, unless the horizons or the steps are given; vectors keep the next two windows."""

    def reach(window, **given):
        ids = torch.zeros(window, 2, dtype=torch.int64)
        model = LanguageModel(20, embed=4, hidden=5)
        found = dni.FutureGradient.for_model(model, token_losses, example_inputs=ids, vocabulary=20, **given)
        return getattr(found.model, "parts", 1), found.lookahead

    assert [reach(window) for window in (1, 7, 8, 20)] == [(4, 4), (2, 14), (1, 4), (1, 4)]
    assert [reach(8, horizons=2), reach(8, predict_steps=9), reach(8, predict="future")] == [(2, 16), (1, 9), (1, 40)]
    vectors = read_text(squared_error, torch.zeros(8, 2, 3), None, 4, 500)
    assert (vectors.parts, vectors.reach) == (2, 16)


class Cells(nn.Module):
    """A model with the given recurrent parts."""

    def __init__(self, *cells: nn.Module) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)


def test_only_a_pair_of_an_lstm_has_cell_states():
    pair = (torch.zeros(1, 1, 5), torch.zeros(1, 1, 5))
    assert lstm_cells(Cells(nn.LSTMCell(2, 5)), pair) == lstm_cells(Cells(nn.LSTM(2, 5)), pair) == dni.LSTM_CELLS
    assert lstm_cells(Cells(nn.GRU(2, 5), nn.GRU(5, 5)), pair) is False
    assert lstm_cells(Cells(nn.LSTM(2, 5), nn.GRU(5, 5)), (*pair, pair[0])) is False
    assert lstm_cells(Cells(nn.LSTM(2, 5), nn.GRU(5, 5)), (pair, pair[0])) is False


def test_half_precision_and_double():
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model = LanguageModel(20, embed=4, hidden=5).to(dtype)
        ids = torch.zeros(2, 3, dtype=torch.int64)
        found = dni.FutureGradient.for_model(model, token_losses, example_inputs=ids, vocabulary=20)
        assert {parameter.dtype for parameter in found.parameters()} == {expected}


def test_what_does_not_fit_is_said():
    model, ids, vectors = LanguageModel(20, embed=4, hidden=5), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 1)
    make = dni.FutureGradient.for_model
    with pytest.raises(ValueError, match="give either vocabulary"):
        make(model, token_losses, example_inputs=ids)
    with pytest.raises(ValueError, match="give either vocabulary"):
        make(model, token_losses, example_inputs=ids, vocabulary=20, outputs=20)
    with pytest.raises(ValueError, match=r"for token ids \[T, B\], example_inputs is torch.float32 \[2, 3, 1\]"):
        make(model, token_losses, example_inputs=vectors, vocabulary=20)
    with pytest.raises(ValueError, match=r"outputs is for vectors \[T, B, E\], example_inputs is torch.int64 \[2, 3\]"):
        make(model, token_losses, example_inputs=ids, outputs=20)
    with pytest.raises(ValueError, match=r"for token ids \[T, B\], example_inputs is torch.int64 \[2, 3, 1\]"):
        make(model, token_losses, example_inputs=ids[..., None], vocabulary=20)
    with pytest.raises(ValueError, match=r"outputs is for vectors \[T, B, E\], example_inputs is torch.float32 \[2, 3\]"):
        make(model, token_losses, example_inputs=vectors[..., 0], outputs=20)


PLAIN = """
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
state = None
for inputs, targets in windows:
    optimizer.zero_grad()
    outputs, state = model(inputs, state)
    loss = losses(outputs, targets).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    state = state.detach()
    history.append(loss.item())
"""

SYNTHETIC = """
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
synthesizer = dni.FutureGradient.for_model(model, losses, example_inputs=windows[0][0], vocabulary=20)
trainer = dni.SequenceTrainer(model, optimizer, losses, synthesizer=synthesizer, clip=1.0)
for window in dni.with_lookahead(windows, synthesizer.lookahead):
    loss = trainer.step(window.inputs, window.targets, lookahead=window.lookahead).loss
    history.append(float(loss))
"""


class OwnGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.readout = nn.Embedding(20, 8), nn.GRU(8, 16), nn.Linear(16, 20)

    def forward(self, ids, state):
        hidden, state = self.gru(self.embedding(ids), state)
        return self.readout(hidden), state


def test_an_own_loop_changes_by_five_lines():
    """The lines are counted and run: a new loop of at most five new lines, which learns what spans its windows."""
    new = [line for line in difflib.ndiff(PLAIN.splitlines(), SYNTHETIC.splitlines()) if line.startswith("+ ")]
    assert len(new) <= 5
    torch.manual_seed(0)
    # The second half of ten ids repeats the first, five windows of one step later.
    halves = torch.randint(20, (60, 5, 8))
    text = torch.cat([halves, halves], dim=1).flatten(0, 1)
    windows = [(text[i : i + 1], text[i + 1 : i + 2]) for i in range(len(text) - 1)]
    ends = {}
    for name, loop in (("plain", PLAIN), ("synthetic", SYNTHETIC)):
        torch.manual_seed(0)
        history: list[float] = []
        names = {"model": OwnGRU(), "windows": windows, "losses": token_losses, "history": history}
        exec(loop, {**names, "torch": torch, "nn": nn, "dni": dni})
        assert len(history) == len(windows)
        ends[name] = history
    assert ends["plain"][0] == ends["synthetic"][0]  # the first window's loss: nothing has been injected yet
    assert ends["plain"][9] != ends["synthetic"][9]


class Memory(nn.Module):
    """Keeps a matrix and a number for each lane, [B, 3, 2] and [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.readout = nn.Linear(4, 6), nn.Linear(6, 5)

    def initial_state(self, lanes: int) -> dict[str, torch.Tensor]:
        return {"matrix": torch.zeros(lanes, 3, 2), "count": torch.zeros(lanes)}

    def forward(self, inputs: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        outputs, matrix, count = [], state["matrix"], state["count"]
        for row in inputs:
            matrix = torch.tanh(0.5 * matrix + self.write(row).unflatten(1, (3, 2)) + 0.1 * count[:, None, None])
            count = torch.tanh(count + matrix.mean((1, 2)))
            outputs.append(self.readout(matrix.flatten(1)))
        return torch.stack(outputs), {"matrix": matrix, "count": count}


@pytest.mark.parametrize("predict", ["horizons", "past"])
def test_states_of_other_shapes_need_the_dimension_of_their_lanes(predict):
    torch.manual_seed(0)
    model = Memory()

    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).square().mean(-1)

    given = {"example_inputs": torch.zeros(2, 3, 4), "outputs": 5, "predict": predict}
    with pytest.raises(ValueError, match="pass batch_dim, the dimension of its lanes"):
        dni.FutureGradient.for_model(model, losses, **given)
    synthesizer = dni.FutureGradient.for_model(model, losses, batch_dim=0, **given)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    trainer = dni.SequenceTrainer(model, optimizer, losses, synthesizer=synthesizer, state_batch_dim=0)
    windows = [dni.Window(torch.randn(2, 3, 4), torch.randn(2, 3, 5)) for _ in range(4)]
    for window in dni.with_lookahead(windows, synthesizer.lookahead):
        result = trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
        assert not result.skipped
    assert result.synthetic.injected_ratio != 0
