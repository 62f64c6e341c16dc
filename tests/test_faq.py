"""docs/faq.md: twenty answers, whose options, functions and arguments exist, and which hold where no other test says so."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.options import flag
from dni_seq.models.language_model import LanguageModel, token_losses
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
ANSWERS = re.findall(r"^## (\d+)\. (.+)\n\n((?:.+\n)+)", PAGE, re.MULTILINE)
CODE = re.findall(r"`([^`]+)`", PAGE)
OF_TORCHRUN = "--nproc-per-node"


def test_twenty_numbered_answers():
    assert [int(number) for number, _, _ in ANSWERS] == list(range(1, 21))
    assert PAGE.count("\n## ") == 20
    for number, question, answer in ANSWERS:
        assert question.endswith("?"), number
        assert 2 <= len(answer.splitlines()) <= 4, number
        assert re.match(r"(Yes|Partly|No)\b", answer), number
        assert re.search(r"\([^()]*(#\d+|thread \d+)\)\n$", answer), f"{number} names no issue"
        assert "`" in answer, f"{number} names no function and no option"


def test_its_options_exist():
    named = {word for code in CODE for word in re.findall(r"--[a-z][a-z-]+", code)} - {OF_TORCHRUN}
    assert len(named) > 8
    assert named <= {flag(field.name) for field in dataclasses.fields(LanguageModelOptions)}


def test_its_functions_and_classes_exist():
    defined = {
        node.name
        for path in (ROOT / "dni_seq").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    public = {name for code in CODE for name in re.findall(r"\bdni\.(\w+)", code)}
    assert len(public) > 5
    assert {name for name in public if not hasattr(dni, name)} == set()
    modules = {name for code in CODE for name in re.findall(r"\bdni_seq\.[\w.]+", code)}
    assert len(modules) > 1
    for name in modules:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last) or importlib.import_module(name)
    classes = {code for code in CODE if re.fullmatch(r"[A-Z]\w+", code)}
    assert {"SequenceMixin", "SequenceTrainer"} <= classes <= defined
    for name in {name for code in CODE for name in re.findall(r"\btrainer\.(\w+)", code)}:
        assert hasattr(dni.SequenceTrainer, name), name
    for path in {code for code in CODE if code.startswith("examples/")}:
        assert Path(ROOT / path).is_file(), path


def test_its_arguments_exist():
    parameters = {
        "SequenceTrainer": inspect.signature(dni.SequenceTrainer).parameters,
        "step": inspect.signature(dni.SequenceTrainer.step).parameters,
    }
    found = 0
    for name, arguments in (call for code in CODE for call in re.findall(r"\b(SequenceTrainer|step)\(\.\.\., (.+)\)", code)):
        for argument in re.findall(r"(\w+)=", arguments):
            assert argument in parameters[name]
            found += 1
    assert found == 4
    assert "batch_dim" in inspect.signature(dni.FutureGradient.for_model).parameters
    assert "state_batch_dim" in parameters["SequenceTrainer"]


def windows(*lengths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    text = torch.randint(7, (sum(lengths) + 1, 3))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [(text[s : s + n], text[s + 1 : s + n + 1]) for s, n in zip(starts, lengths, strict=True)]


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(7, embed=4, hidden=6, layers=1)


@pytest.mark.parametrize("synthetic", [False, True])
def test_15_windows_of_several_lengths(synthetic):
    """Without a synthesizer they are the plain loop's; with one they all train."""
    net, plain, data = model(), model(), windows(4, 2, 7, 5, 3)
    example = torch.zeros(4, 3, dtype=torch.int64)
    future = dni.FutureGradient.for_model(net, token_losses, example_inputs=example, vocabulary=7, units=8)
    synthesizer = future if synthetic else None
    trainer = dni.SequenceTrainer(net, torch.optim.Adam(net.parameters()), token_losses, synthesizer=synthesizer)
    optimizer, state = torch.optim.Adam(plain.parameters()), None
    for window in dni.with_lookahead(data, future.lookahead):
        result = trainer.step(window.inputs, window.targets, lookahead=window.lookahead if synthetic else None)
        assert not result.skipped
        logits, state = plain(window.inputs, state)
        state = tuple(leaf.detach() for leaf in state)
        loss = token_losses(logits, window.targets).mean()
        if not synthetic:
            assert torch.equal(result.loss, loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same = torch.equal(net.embedding.weight, plain.embedding.weight)
    assert same != synthetic


class MatrixMemory(nn.Module):
    """A cell as xLSTM's mLSTM: a matrix memory, a normalizer, and a stabilizer of the exponential gates."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 3 * 4 + 2)

    def forward(self, inputs: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        memory, norm, limit, outputs = state["memory"], state["norm"], state["limit"], []
        for x in inputs:
            query, key, value, gates = self.project(x).split([4, 4, 4, 2], dim=-1)  # [B, 4], and [B, 2]
            write, keep = gates[:, :1], nn.functional.logsigmoid(gates[:, 1:])
            new = torch.maximum(keep + limit, write)
            keep, write, limit = (keep + limit - new).exp(), (write - new).exp(), new
            memory = keep[..., None] * memory + write[..., None] * value[:, :, None] * key[:, None, :]
            norm = keep * norm + write * key
            outputs.append((memory @ query[..., None])[..., 0] / (norm * query).sum(-1, keepdim=True).abs().clamp(min=1))
        return torch.stack(outputs), {"memory": memory, "norm": norm, "limit": limit}

    def initial_state(self, lanes: int) -> dict[str, torch.Tensor]:
        return {"memory": torch.zeros(lanes, 4, 4), "norm": torch.zeros(lanes, 4), "limit": torch.zeros(lanes, 1)}


def test_13_a_state_of_matrix_memories_and_stabilizers():
    torch.manual_seed(0)
    net = MatrixMemory()
    synthesizer = dni.StateSynthesizer(net.initial_state(1), batch_dim=0, hidden=(8,))
    squares = lambda outputs, targets: (outputs - targets).square().mean(-1)  # noqa: E731
    settings = {"synthesizer": synthesizer, "state_batch_dim": 0}
    trainer = dni.SequenceTrainer(net, torch.optim.Adam(net.parameters()), squares, **settings)
    for _ in range(6):
        result = trainer.step(torch.randn(3, 5, 2), torch.randn(3, 5, 4))
    assert trainer.state["memory"].shape == (5, 4, 4)
    assert result.synthetic.injected_ratio > 0  # a target has arrived at the matrix memory, and a message left it
    report = str(dni.check_model(net, torch.randn(3, 5, 2)))
    assert re.search(r"state gradient +ok .*'memory'", report)


class DropsGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rnn(inputs, None if state is None else state.detach())


def test_12_a_kernel_that_drops_the_states_gradient_is_named():
    assert re.search(r"state gradient +PROBLEM", str(dni.check_model(DropsGradient(), torch.zeros(4, 2, 2))))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of the compiler itself
def test_18_the_compiler_takes_diagonal_cells_as_one_graph():
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    for cell in ("mingru", "lru"):
        net = LanguageModel(7, embed=4, hidden=6, layers=1, cell=cell)
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        state = net.initial_state(2)
        torch.testing.assert_close(compiled(tokens, state)[0], net(tokens, state)[0])
    for cell in ("lstm", "gru"):
        net = LanguageModel(7, embed=4, hidden=6, layers=1, cell=cell)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(net, fullgraph=True, backend="eager")(tokens, net.initial_state(2))


def test_20_a_synthesizer_trains_first_and_is_injected_later():
    net, data = model(), windows(4, 4, 4, 4)
    synthesizer = dni.Normalized(dni.BasicSynthesizer(12, n_hidden=1))
    adam = torch.optim.Adam(net.parameters())
    first = dni.SequenceTrainer(net, adam, token_losses, synthesizer=synthesizer, synthetic_scale=0.0)
    before = [parameter.clone() for parameter in synthesizer.parameters()]
    for inputs, targets in data[:3]:
        assert first.step(inputs, targets).synthetic.scale == 0
    assert any(not torch.equal(one, two) for one, two in zip(before, synthesizer.parameters(), strict=True))
    second = dni.SequenceTrainer(net, adam, token_losses, synthesizer=synthesizer, synthetic_scale=0.5)
    second.load_state_dict(first.state_dict())
    assert second.step(*data[3]).synthetic.scale == 0.5
    assert second.steps == 4
