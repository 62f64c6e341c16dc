"""Parts of a network in two processes that do not wait for each other."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dni_seq.app.decoupled import train
from dni_seq.app.runs.metrics_file import read_curves
from dni_seq.app.runs.trackers import METRICS
from dni_seq.distributed.decoupled_parts import RemoteEnd, remote_end
from dni_seq.distributed.process_group import Ranks
from dni_seq.models.two_part import RecentTokens, two_part_language_model
from tests.events import points
from tests.paths import SCRIPTS
from tests.ranks import finish, start_ranks

TINY = {"network": "lm", "hidden": 8, "batch_size": 64, "bptt": 8, "exchange_every": 5, "seed": 3}
UPDATES = 200
PAUSE = {"pause_at": 1, "pause_seconds": 2.0}


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, value)
    return layer


def on_both_ends(ranks: Ranks) -> dict[str, Any]:
    """A thousand messages while the other part sleeps, and the script in its three modes, in this directory."""
    own, other = linear(10.0 + ranks.rank), linear(0.0)
    came = None
    with remote_end(ranks, own, other, every=1) as end:
        began = time.monotonic()
        if ranks.first:
            for i in range(1000):
                nn.init.constant_(own.weight, float(i))
                end.exchange({"number": torch.tensor(i)})
            took = time.monotonic() - began
            while not end.heard:  # until part B has one of them
                time.sleep(0.01)
                end.take()
        else:
            time.sleep(2)
            took = 0.0
            while came is None:
                time.sleep(0.01)
                came = end.take()
            end.exchange()
    options = train.DecoupledOptions
    modes: dict[str, Any] = {"unlocked": PAUSE, "locked": {}, "alone": {}}
    for mode, further in modes.items():
        chosen = options(mode=mode, updates=UPDATES, run_dir=mode, **TINY, **further)
        assert train.run(chosen, ranks) == 0
    found = {"took": took, "heard": end.heard, "own": own.weight, "other": other.weight, "came": came}
    if ranks.first:
        found["files"] = {
            mode: {name: (Path(mode) / name).read_text() for name in ("summary.json", "timeline.jsonl")} for mode in modes
        }
        found["curves"] = {name: points(Path("unlocked") / name) for name in ("A", "B")}
        found["metrics"] = {name: read_curves(Path("unlocked") / name / METRICS) for name in ("A", "B")}
    return found


@pytest.fixture(scope="module")
def ends(two_ranks) -> list[dict[str, Any]]:
    return [found["ends"] for found in two_ranks]


def test_messages_replace_each_other_and_the_last_one_arrives(ends):
    a, b = ends
    assert a["took"] < 1.9  # a thousand messages while part B slept for two seconds
    assert torch.equal(b["other"], a["own"])
    assert torch.equal(a["other"], b["own"])
    assert b["heard"] == 1000
    assert b["came"]["number"].dim() == 0  # part A's message came with its parameters


def test_a_pause_that_never_comes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--pause-at 11 is more than --updates 10"):
        train.new_directory(train.DecoupledOptions(pause_at=11, updates=10, run_dir=str(tmp_path / "run")))
    assert list(tmp_path.iterdir()) == []


def test_part_a_continues_while_part_b_is_paused(ends):
    files = ends[0]["files"]["unlocked"]
    summary = json.loads(files["summary.json"])
    rows = [json.loads(line) for line in files["timeline.jsonl"].splitlines()]
    before, after = (row["seconds"] for row in rows if row["part"] == "B" and row["updates"] == PAUSE["pause_at"])
    assert after - before >= PAUSE["pause_seconds"]
    assert summary["updates_of_a_in_pause"] > 0
    assert rows[-1]["part"] == "B"
    assert rows[-1]["updates"] == UPDATES  # part B catches up
    for name in ("A", "B"):
        assert max(ends[0]["curves"][name]["decoupled/updates"].values()) == UPDATES
        assert ends[0]["metrics"][name]["decoupled/updates"] == ends[0]["curves"][name]["decoupled/updates"]


def test_locked_parts_train_as_one_network(ends):
    work = train.prepare(train.DecoupledOptions(**TINY))
    a, b = work.halves.a, work.halves.b
    optimizer = torch.optim.Adam([*a.parameters(), *b.parameters()], lr=3e-4, fused=True)
    states: list[Any] = [None, None]
    for _ in range(UPDATES):
        batch = next(work.batches)
        optimizer.zero_grad()
        message, states[0] = a(batch.inputs, states[0])
        logits, states[1] = b(message, states[1])
        F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten()).backward()
        optimizer.step()
    wanted = train.score(work.halves, work.test, synthetic=False)
    found = json.loads(ends[0]["files"]["locked"]["summary.json"])["test"]
    assert found == pytest.approx(wanted, rel=1e-4)  # float32


def test_each_part_alone_does_its_updates(ends):
    rows = [json.loads(line) for line in ends[0]["files"]["alone"]["timeline.jsonl"].splitlines()]
    assert {row["part"]: row["updates"] for row in rows} == {"A": UPDATES, "B": UPDATES}


def test_a_part_that_dies_ends_the_other(tmp_path):
    arguments = [
        str(SCRIPTS / "train_decoupled.py"),
        "--network",
        "lm",
        "--hidden",
        "8",
        "--updates",
        "1000000",
        "--rank-timeout",
        "15",
    ]
    processes = start_ranks([*arguments, "--batch-size", "64", "--run-dir", "run"], 2, tmp_path)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "run/config.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(3)
        processes[1].send_signal(signal.SIGKILL)
        processes[0].wait(timeout=30)
    finally:
        survivor = finish(processes)[0]
    assert survivor.returncode == 2
    assert "train_decoupled: error: another rank has ended, or does not answer" in survivor.stderr
    assert "Traceback" not in survivor.stderr


def test_a_synthetic_input_sees_no_later_token():
    torch.manual_seed(0)
    module = RecentTokens(9, 4)
    nn.init.normal_(module.output.weight)
    tokens = torch.randint(9, (20, 3))
    changed = tokens.clone()
    changed[12] = (changed[12] + 1) % 9
    first, second = (module(each).unflatten(0, (20, 3)) for each in (tokens, changed))
    assert torch.equal(first[:12], second[:12])
    assert not torch.equal(first[12:], second[12:])


def test_both_ends_of_a_language_model_learn_their_own_synthesizer():
    halves = two_part_language_model(9, 4, lanes=3)
    tokens = torch.randint(9, (6, 3))
    forward, gradient = halves.interface.forward_interface, halves.interface.backward_interface
    batch = train.Batch(tokens, tokens, tokens)
    options = train.DecoupledOptions(network="lm")
    train.update_a(train.PartRun("A", halves.a, forward.synthesizer, options), halves, batch)
    assert all(p.grad is None for p in [*gradient.parameters(), *halves.b.parameters()])
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in forward.parameters())
    for module in halves:
        module.zero_grad()
    train.update_b(train.PartRun("B", halves.b, gradient.synthesizer, options), halves, batch)
    assert all(p.grad is None for p in [*forward.parameters(), *halves.a.parameters()])
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in gradient.parameters())


def test_messages_need_a_distance():
    with pytest.raises(ValueError, match="every must be 1 update or more"):
        RemoteEnd(linear(0), linear(0), None, None, 0)  # type: ignore[arg-type]


def test_a_picture_that_cannot_be_drawn_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    options = train.DecoupledOptions(**TINY, plot=True, run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="needs matplotlib"):
        train.new_directory(options)
    assert not (tmp_path / "run").exists()
