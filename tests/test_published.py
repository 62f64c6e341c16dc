"""The study of the published figure: which trials it runs, and one of them in small."""

from __future__ import annotations

import importlib
import json
import random

import pytest

from tests.paths import ROOT


@pytest.fixture
def published(monkeypatch):
    for folder in (ROOT / "benchmarks", ROOT / "benchmarks" / "studies"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("published")


def line(published, trial, valid: float) -> tuple[str, dict]:
    return published.key_of(trial), {"trial": trial, "valid": valid}


def test_a_rate_is_bracketed_before_all_epochs_are_run(published):
    """The best one has a lower and a higher one beside it; all epochs follow with both seeds."""
    known: dict[str, dict] = {}
    scores = {"none": 40.0, "multi-horizon": 5.0}
    while trials := [
        trial for trial in published.plan(known) if trial["epochs"] == 3 and published.key_of(trial) not in known
    ]:
        known |= dict(line(published, trial, abs(trial["lr"] - scores[trial["method"]])) for trial in trials)
    tried = [one["trial"] for one in known.values()]
    rates = {method: sorted(trial["lr"] for trial in tried if trial["method"] == method) for method in scores}
    assert rates == {"none": [10, 20, 40, 80], "multi-horizon": [2.5, 5, 10, 20, 40]}
    trials = [trial for trial in published.plan(known) if trial["epochs"] != 3]
    assert [(trial["method"], trial["lr"], trial["epochs"], trial["seed"]) for trial in trials] == [
        ("none", 40, 13, 1),
        ("multi-horizon", 5, 13, 1),
        ("none", 40, 13, 2),
        ("multi-horizon", 5, 13, 2),
    ]


def test_a_trial_is_scored_at_equal_time_and_at_its_end(published, monkeypatch, tmp_path):
    words, draw = [f"w{i}" for i in range(9)], random.Random(0)
    for split, lines in (("train", 200), ("valid", 9), ("test", 9)):
        text = "".join(" ".join(draw.choices(words, k=20)) + "\n" for _ in range(lines))
        (tmp_path / "ptb").mkdir(exist_ok=True)
        (tmp_path / "ptb" / f"ptb.{split}.txt").write_text(text)
    results = tmp_path / "lines.jsonl"
    results.write_text(json.dumps({"study": "published", "step_seconds": {"none": 1.0, "multi-horizon": 2.0}}) + "\n")
    monkeypatch.setattr(published, "EPOCHS", 1)
    trial = published.trial_of("multi-horizon", 20.0, 1)
    found = published.Runner(tmp_path, results)(trial, tmp_path / "trial.pt")
    windows = published.windows_of_epoch(tmp_path)
    assert (found["steps"], found["at_equal_time"]["steps"]) == (windows, round(windows / 2))
    assert 8 < found["test"] != found["at_equal_time"]["test"]
    assert found["command"].startswith("python scripts/train_lm.py --dataset ptb --preset small --synthesizer multi-horizon")
    assert not (tmp_path / "trial").exists()
    with results.open("a") as file:
        file.write(json.dumps({"trial": trial, **found}) + "\n")
    *_, at_equal_time, at_the_end = published.table(published.read_lines(results)).splitlines()
    assert at_equal_time.startswith("| `multi-horizon` | 20 | the CPU time of `none` | 1 |")
    assert at_the_end.startswith(f"| `multi-horizon` | 20 | 1 | 1 | {windows} |")
