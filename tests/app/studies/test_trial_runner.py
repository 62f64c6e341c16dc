"""Cells of a study, real trainings of a tiny network in processes of their own."""

from __future__ import annotations

import json
import math
import threading
import time

import pytest

from dni_seq.app.runs.checkpoint import load_checkpoint, save_checkpoint
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.studies.records import read_lines
from dni_seq.app.studies.trial_runner import Outcome, Study, Trial, finite
from dni_seq.synthesizers.defaults import HORIZONS

TINY = {"task": "copy", "bptt": 2, "hidden": 8, "batch_size": 4, "synthesizer_hidden": 8, "threads": 1, "device": "cpu"}


def trial(seed: int, **options) -> Trial:
    return Trial("train_tasks", {"part": "table1", "task": "copy", "seed": seed}, {**TINY, "seed": seed, **options})


def measure(trial, summary):
    return {"result": {"length": summary["length"]}, "updates": summary["updates"], "curve": summary["curve"]}


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path / "scratch", tmp_path / "results.jsonl", 2, measure)


def run(study, trials, minutes=lambda trial: 1.0, limit=None) -> Outcome:
    return study.run(trials, minutes, limit, StopSignals())


def test_each_trial_is_a_line_once(study):
    good = trial(
        1, updates=30, synthesizer="multi-horizon", regress_every=2, fidelity_every=7, synthetic_scale="0.5", start=3
    )
    bad = trial(2, updates=30, synthesizer="none", start=0)
    outcome = run(study, [good, bad])
    assert outcome.done == 1
    (failed,) = outcome.failed
    assert "--start must be 1 or more" in failed
    (line,) = read_lines(study.results)
    assert line["key"] == good.key()
    assert (line["part"], line["seed"], line["options"]) == ("table1", 1, good.options)
    assert (line["result"], line["updates"], line["curve"]) == ({"length": 0}, 30, [])
    assert line["config"]["horizons"] == HORIZONS  # what nobody gave is on record too
    assert "run_dir" not in line["config"]
    assert line["process_seconds"] > 0
    assert line["peak_memory_mb"] > 50
    assert line["injected_ratio"] > 0
    assert len(line["fidelity"]["cosine"]) == len(line["fidelity"]["r2"]) == HORIZONS
    assert set(line["versions"]) == {"dni_seq", "commit", "torch", "python"}
    # A failed cell keeps its log; nothing else stays.
    assert {path.name for path in study.scratch.iterdir()} == {f"{bad.name()}.{ending}" for ending in ("log", "lock")}

    started = time.monotonic()
    assert run(study, [good]) == Outcome()
    assert time.monotonic() - started < 1
    assert len(read_lines(study.results)) == 1


def test_a_stopped_trial_resumes_where_it_was(study):
    """One vector is learned within 120 updates at this rate, which the log tells: then the cell is stopped."""
    learning = {"bptt": 4, "hidden": 32, "batch_size": 32, "lr": 0.02, "updates": 500, "synthesizer": "none"}
    one, other = trial(1, **learning), trial(2, **learning)
    study.jobs = 1
    stop, log = StopSignals(), study.scratch / f"{one.name()}.log"

    def stop_when_it_has_learned():
        while not log.exists() or "length 1 solved" not in log.read_text():
            time.sleep(0.01)
        stop.received = 15

    watcher = threading.Thread(target=stop_when_it_has_learned)
    watcher.start()
    outcome = study.run([one, other], lambda trial: 1.0, None, stop)
    watcher.join()
    assert outcome == Outcome(stopped=2)
    assert read_lines(study.results) == []
    saved = study.scratch / one.name() / "checkpoints" / "last.pt"
    content = load_checkpoint(saved)
    curve = content["counters"]["curve"]
    assert content["trainer"]["steps"] < 500
    content["counters"]["seconds"] += 1000  # a run that began anew would know nothing of these
    save_checkpoint(saved, {name: value for name, value in content.items() if name not in ("format", "version")})
    assert run(study, [one]).done == 1
    (line,) = read_lines(study.results)
    assert line["updates"] == 500
    assert line["seconds"] > 1000
    assert line["curve"][: len(curve)] == curve != []
    assert line["result"]["length"] == line["curve"][-1][1]


def test_a_trial_is_locked_as_long_as_its_process_lives(study):
    """Be the study gone that started it."""
    study.scratch.mkdir()
    only = trial(1, updates=10_000, synthesizer="none")
    (running,) = study._begin(only, Outcome())
    running.release()
    assert run(study, [only]) == Outcome(locked_elsewhere=1)
    running.process.kill()
    running.process.wait()
    lock = study._lock(only)
    assert lock is not None
    lock.close()


def test_no_trial_starts_that_would_end_too_late(study):
    trials = [trial(seed, updates=10, synthesizer="none") for seed in range(3)]
    assert run(study, trials, minutes=lambda trial: 2.0, limit=1.0) == Outcome(out_of_time=3)
    assert list(study.scratch.iterdir()) == []


def test_names_and_arguments():
    one = trial(1, tail=True, normalize=False, lr=1e-3)
    assert one.name() != trial(1, tail=True, normalize=False, lr=2e-3).name()
    assert one.name().startswith("table1-copy-1-")
    assert one.arguments()[-4:] == ["--tail", "--no-normalize", "--lr", "0.001"]
    moved = one._replace(unkeyed={"data_file": "elsewhere/text.txt"})
    assert moved.key() == one.key()
    assert moved.arguments()[-2:] == ["--data-file", "elsewhere/text.txt"]


def test_numbers_that_are_not_finite_become_none():
    assert (
        json.dumps(finite({"a": [math.nan, 1.0], "b": {"c": math.inf}}), allow_nan=False)
        == '{"a": [null, 1.0], "b": {"c": null}}'
    )
