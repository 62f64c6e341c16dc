"""The benchmarks run, on cases small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def call(script: str, *arguments: str) -> list[dict]:
    """The lines of JSON that a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_step_times_stand_beside_each_other(tmp_path):
    lines = call(
        "steps.py", "--only", "char-gru", "--bptt", "1", "--way", "plain", "none", "--seconds", "0", "--threads", "2",
        "--output", str(tmp_path / "steps.jsonl"),
    )  # fmt: skip
    assert lines == [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    plain, none = lines
    assert (plain["way"], none["way"]) == ("plain", "none")
    assert none["over plain"] == none["ms"] / plain["ms"]
    assert none["steps"] >= 100
    assert none["threads"] == 2


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    (line,) = call("steps.py", "--memory", "--only", "char-gru", "--bptt", "1", "--way", "none", "--windows", "210")
    assert line["peak_mb"] <= line["peak_mb_at_end"] < 1.2 * line["peak_mb"]


def test_reading_is_measured(tmp_path):
    text = "the cat sat on the mat\n" * 2000
    for name in ("lines.txt", "valid.txt", "empty.txt"):
        (tmp_path / name).write_text(text if name != "empty.txt" else "")
    (line,) = call("streams.py", "--only", "lines", "--folder", str(tmp_path))
    assert line["tokens"] > 10_000
    assert line["peak_mb"] > 0


def test_a_point_of_growth_is_measured_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extras plots and dev, is not installed")
    (point,) = call("growth.py", "--one", "multi-horizon", json.dumps({"hidden": 8, "lanes": 4, "windows": 110}))
    assert point["ms"] > 0
    assert point["mb"] >= 0
    lines = [{"varied": name, "value": 5, "way": "none", **point} for name in ("lanes", "reach")]
    (tmp_path / "growth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("growth.py", "--draw", "--output", str(tmp_path / "growth.jsonl"), "--pictures", str(tmp_path))
    for picture in ("growth.png", "memory.png"):
        assert (tmp_path / picture).stat().st_size > 1000


def test_pairs_of_runs_stand_beside_each_other(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 200)
    output = tmp_path / "stability.jsonl"
    begin = ("stability.py", "--data-file", str(text), "--windows", "8", "--output", str(output))
    (line,) = call(*begin, "--pairs", "1")
    assert line["ratio"] == line["multi-horizon: loss"] / line["none: loss"]
    assert line["none: largest cell"] > 0
    (other,) = call(*begin, "--pairs", "2")  # that on record is not run again
    assert (line["bptt"], other["bptt"]) == (1, 2)
    assert [json.loads(row) for row in output.read_text().splitlines()] == [line, other]
