"""The benchmark against compiled rivals runs, and says what it lacks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.paths import ROOT

SCRIPT = str(ROOT / "benchmarks" / "peers.py")


def without(package, tmp_path):
    """An environment in which Python does not find a package, installed or not."""
    code = f"""
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name == {package!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("peers")


def test_without_jax_the_command_says_what_to_install(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--bptt", "1", "--way", "none", "jax"],
        capture_output=True,
        text=True,
        check=False,
        env=without("jax", tmp_path),
    )
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line == "jax is not installed: pip install 'dni-seq[peers]', or leave jax out of --way"


def test_braintrace_is_skipped_where_it_is_missing_and_in_longer_windows(peers, monkeypatch, capsys):
    monkeypatch.setattr(peers, "installed", lambda package: False)
    assert peers.chosen(peers.WAYS, 1) == ["none", "default", "plain loop", "jax"]
    assert capsys.readouterr().err == "skipped braintrace, which is not installed: pip install braintrace\n"
    monkeypatch.setattr(peers, "installed", lambda package: True)
    assert peers.chosen(peers.WAYS, 1) == list(peers.WAYS)
    assert peers.chosen(peers.WAYS, 8) == ["none", "default", "plain loop", "jax"]
    assert capsys.readouterr().err == ""


def test_our_way_is_measured_in_a_process_of_its_own(tmp_path):
    output = tmp_path / "peers.jsonl"
    command = [sys.executable, SCRIPT, "--bptt", "1", "--way", "none", "--seconds", "0", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = map(json.loads, output.read_text().splitlines())
    assert line == json.loads(result.stdout)
    assert (line["bptt"], line["way"], line["over none"], line["torch"]) == (1, "none", 1.0, torch.__version__)
    assert line["ms"] > 0
    assert line["peak_mb"] > 100
    assert line["start_up_s"] >= 0.9 * line["start_up_cpu_s"] > 0


def test_lines_become_a_table(peers):
    line = {
        "bptt": 8,
        "way": "jax",
        "ms": 27.66,
        "over jax": 1.0,
        "peak_mb": 511.2,
        "start_up_s": 2.04,
        "start_up_cpu_s": 1.5,
    }
    header, _, row = peers.table([line]).splitlines()
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["8", "jax", "27.7", "–", "1.00", "511", "2.0", "1.5"]
    assert header.count("|") == row.count("|")


def test_a_core_that_is_not_there_is_refused():
    command = [sys.executable, SCRIPT, "--way", "none", "--core", "9999"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("--core must be one of 0")


@pytest.mark.parametrize("bptt", [1, 8])
def test_jax_trains_as_the_plain_loop_does(peers, bptt):
    pytest.importorskip("jax", reason="jax, of the extra peers, is not installed")
    ways, rival = importlib.import_module("step_ways"), importlib.import_module("peers_jax")
    setting = ways.Setting(50, "lstm", 6, 8, 1, 0.0, 4, (bptt,))
    torch.manual_seed(3)
    tokens = torch.randint(setting.vocabulary, (bptt, setting.lanes))
    torch.manual_seed(3)  # the rival draws the same window
    step = rival.truncated_bptt(setting, bptt)
    model = ways.model_of(setting)
    optimizer, state = torch.optim.Adam(model.parameters(), lr=1e-3), model.initial_state(setting.lanes)
    for _ in range(20):
        logits, last = model(tokens, state)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        assert float(step()) == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ways.CLIP)
        optimizer.step()
        state = tuple(leaf.detach() for leaf in last)
