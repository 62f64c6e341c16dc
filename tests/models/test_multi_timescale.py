"""A fast and a slow network joined by synthetic gradients."""

from __future__ import annotations

import json

import pytest
import torch

from dni_seq.app.decoupled.train_multi_timescale import main
from dni_seq.models.multi_timescale import FAST_SYMBOL, JOINTS, SLOW_SYMBOL, SYMBOLS, Counting, MultiTimescale


def test_the_counts_are_those_of_the_symbols():
    task = Counting(3, 2, 4, seed=0)
    blocks = [task.block() for _ in range(3)]
    last = torch.cat([block.symbols for block in blocks[1:]])
    assert torch.allclose(blocks[-1].slow, (last == SLOW_SYMBOL).sum(0) / 3 - 2 / SYMBOLS)
    assert torch.allclose(blocks[-1].fast, (blocks[-1].symbols == FAST_SYMBOL).float().mean(0) - 1 / SYMBOLS)


@pytest.mark.parametrize("joint", ["synthetic", "message"])
def test_the_slow_loss_reaches_the_fast_network_by_synthetic_gradients_alone(joint):
    """The slow network's targets may be anything: without synthetic gradients the fast one never hears of them."""
    weights = []
    for factor in (1, -3):
        torch.manual_seed(0)
        network, task = MultiTimescale(6, 2, joint, 1e-2), Counting(3, 2, 4, seed=0)
        for _ in range(12):
            block = task.block()
            network.step(block._replace(slow=factor * block.slow))
        weights.append(network.fast.weight_hh_l0.detach())
    assert torch.equal(*weights) == (joint == "message")


def test_the_synthesizer_is_trained_with_the_gradients_of_the_slow_window():
    torch.manual_seed(0)
    network, task = MultiTimescale(6, 2, "synthetic", 1e-2), Counting(3, 2, 4, seed=0)
    output = network.interface.synthesizer.synthesizer.layers[-1].weight
    network.step(task.block())
    assert not output.any()
    assert "slow" in network.step(task.block())
    assert output.any()


@pytest.mark.parametrize("joint", JOINTS)
def test_the_script_measures_both_counts(joint, tmp_path, capsys):
    """How well each joint learns takes minutes; docs/distributed.md has it."""
    arguments = ["--joint", joint, "--steps", "3", "--ticks", "2", "--blocks", "200", "--lr", "1e-2"]
    assert main([*arguments, "--run-dir", str(tmp_path / joint)]) == 0
    error = json.loads((tmp_path / joint / "summary.json").read_text())["error"]
    assert error["fast"] < 0.7
    assert 0 < error["slow"] < 3
    assert "block 200: error of the fast count" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--blocks", "2", "--ticks", "3"]) == 2
    assert "must be at least --ticks" in capsys.readouterr().err
    with pytest.raises(ValueError, match="joint must be one of"):
        MultiTimescale(4, 2, "telepathy", 1e-3)
