"""The study of characters with a falling rate: which trials it runs, what its table says, and one of them in small."""

from __future__ import annotations

import importlib
import random

import pytest

from tests.paths import ROOT


@pytest.fixture
def study(monkeypatch):
    for folder in (ROOT / "benchmarks", ROOT / "benchmarks" / "studies"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("falling_rate")


def line_of(trial: dict, valid: float) -> dict:
    return {"trial": trial, "valid": valid, "test": valid - 0.05, "process_seconds": 50.0}


def test_each_method_is_tuned_and_then_has_three_seeds(study):
    """Until no trial is left; 4e-3 is the best rate of truncated BPTT, 3.2e-2, beyond the first ones, that of the others."""
    known: dict[str, dict] = {}
    while trials := [trial for trial in study.plan(known) if study.key_of(trial) not in known]:
        for trial in trials:
            best = 4e-3 if trial["method"] == "none" else 3.2e-2
            known[study.key_of(trial)] = line_of(trial, 1.9 + abs(trial["lr"] - best))
    of_none = [line["trial"] for line in known.values() if (line["trial"]["T"], line["trial"]["method"]) == (2, "none")]
    rates = [trial["lr"] for trial in of_none if trial["seed"] == 1]
    assert sorted(rates) == [2e-3, 4e-3, 8e-3, 1.6e-2], "the best one has a lower and a higher one beside it"
    assert [(trial["lr"], trial["seed"]) for trial in of_none if trial["seed"] != 1] == [(4e-3, 2), (4e-3, 3)]
    rows = [row.strip("| ").split(" | ") for row in study.table(known.values()).splitlines()]
    assert ["8", "`exact`", "0.032", "3", "1.900 ± 0.000", "1.850 ± 0.000", "+0.000", "50"] in rows
    changed = [row[1] for row in rows if "`, " in row[1]]
    assert len(changed) == len(study.CHANGED)


def test_a_changed_trial_runs_by_the_command(study, monkeypatch, tmp_path):
    draw = random.Random(0)
    (tmp_path / "ptb").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.{split}.txt").write_text("".join(draw.choices("abcd ", k=400)) + "\n")
    small = {"hidden": 4, "embed": 4, "batch-size": 2, "max-tokens": 160}
    monkeypatch.setattr(study, "COMMON", {**study.COMMON, **small})
    trial = {**study.trial_of(8, "multi-horizon", 8e-3), "changed": "c = 0.3"}
    found = study.run(trial, tmp_path / "trial.pt", tmp_path)
    assert found["steps"] == 10
    assert 1 < found["valid"] < 4
    assert found["command"].endswith(
        "--bptt 8 --synthesizer multi-horizon --horizons 2 --lr 0.008 --seed 1 --synthetic-scale 0.3"
    )
    assert not (tmp_path / "trial").exists()
