"""A step's result prints as one line: numbers, and the shapes of the outputs."""

from __future__ import annotations

import re

import torch
from torch import nn

import dni_seq as dni


class Net(nn.Module):
    """An RNN whose outputs are a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.readout = nn.LSTM(3, 8), nn.Linear(8, 4)

    def forward(self, inputs, state):
        features, state = self.rnn(inputs, state)
        return {"scores": self.readout(features), "rest": [features, 3]}, state


def start(lanes):
    return torch.zeros(1, lanes, 8), torch.zeros(1, lanes, 8)


def steps(synthesizer=None, **settings) -> list[dni.StepResult]:
    """The results of thirty windows of 5 steps in 2 lanes."""
    torch.manual_seed(1)
    net = Net()
    trainer = dni.SequenceTrainer(
        net,
        torch.optim.Adam(net.parameters()),
        lambda outputs, targets: (outputs["scores"] - targets).square().mean(),
        synthesizer=synthesizer,
        synthesizer_optimizer=None if synthesizer is None else torch.optim.Adam(synthesizer.parameters()),
        initial_state=start,
        **settings,
    )
    return [trainer.step(torch.randn(5, 2, 3), torch.randn(5, 2, 4)) for _ in range(30)]


NUMBER = r"-?(nan|\d[\d.e-]*)"


def test_without_a_synthesizer():
    result = steps()[-1]
    pattern = (
        rf"StepResult\(loss={NUMBER}, outputs=\{{'scores': \[5, 2, 4\], 'rest': \(\[5, 2, 8\], int\)\}}, "
        rf"gradient_norm={NUMBER}, synthetic=None, skipped=False, events=\(\)\)"
    )
    assert re.fullmatch(pattern, str(result))
    assert f"loss={float(result.loss):.4g}," in str(result)


def test_with_a_synthesizer_and_a_comparison():
    synthesizer = dni.StateSynthesizer(start(1), cells=dni.LSTM_CELLS, hidden=(8,))
    config = dni.SyntheticGradientConfig(regress_every=1, fidelity_every=1)
    results = steps(synthesizer, config=config)
    for result in results:
        assert "\n" not in repr(result)
        assert "tensor" not in repr(result)
        assert repr(result.synthetic) in repr(result)
    compared = [result.synthetic for result in results if result.synthetic.fidelity is not None]
    assert compared
    pattern = (
        rf"Synthetic\(loss={NUMBER}, gradient_norm={NUMBER}, injected_ratio={NUMBER}, cosine=\[{NUMBER}\], r2=\[{NUMBER}\], "
        rf"scale=\[{NUMBER}\], fidelity=StateFidelity\(cosine=\[{NUMBER}\], r2=\[{NUMBER}\]\)\)"
    )
    assert re.fullmatch(pattern, repr(compared[-1])), compared[-1]


def test_a_skipped_step():
    result = steps()[0]._replace(skipped=torch.tensor(True), events=("step 3 skipped",), loss=torch.tensor(torch.nan))
    assert str(result).startswith("StepResult(loss=nan, ")
    assert str(result).endswith("skipped=True, events=('step 3 skipped',))")
