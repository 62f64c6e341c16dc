"""Benchmarks append their lines to a file, and print the lines of a file as a table."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time

import pytest
import torch

from dni_seq.models import diagonal_cells, recurrences
from tests.paths import ROOT


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Imports a benchmark and returns it with a function that runs its command, which returns what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()

    def load(name):
        module = importlib.import_module(name)
        # The allocator keeps its settings until the process ends.
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None, raising=False)

        def command(*arguments):
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
            module.main()
            return capsys.readouterr().out

        return module, command

    yield load
    torch.set_num_threads(threads)


def cells(table):
    """The cells of a table of Markdown, row by row, without the line below its header."""
    header, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    assert all(len(row) == len(header) for row in rows)
    return header, rows


def test_lines_are_appended_and_printed(benchmark, tmp_path, capsys):
    lines, _ = benchmark("result_lines")
    path = tmp_path / "lines.jsonl"
    lines.record({"case": "a", "ms": 1}, path)
    lines.record({"case": "b", "ms": 2}, path)
    lines.record({"case": "a", "ms": 3}, None)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in path.read_text().splitlines()] == printed[:2]
    assert lines.newest(printed, "case") == [{"case": "a", "ms": 3}, {"case": "b", "ms": 2}]
    assert lines.machine()["torch"] == torch.__version__.split("+")[0] or lines.machine()["torch"] == torch.__version__
    assert lines.machine()["date"] == time.strftime("%Y-%m-%d")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no lines"), ("not JSON\n", "cannot be read"), ('{"other": 1}\n', "a line without 'case'")],
)
def test_a_file_without_lines_of_the_benchmark_is_refused(benchmark, tmp_path, capsys, content, message):
    _, start_up = benchmark("start_up")
    path = tmp_path / "lines.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        start_up("--table", path)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert message in line


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(benchmark, tmp_path, capsys):
    lines, _ = benchmark("result_lines")
    with pytest.raises(SystemExit) as stop:
        lines.check_output(argparse.ArgumentParser(), tmp_path / "no folder" / "lines.jsonl")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.endswith("give a file in a directory that exists")


def test_scans_are_measured_and_leave_the_cells_as_they_were(benchmark, tmp_path, monkeypatch):
    scans, command = benchmark("scans")
    monkeypatch.setattr(scans, "SIZES", ((2, 4),))
    before = recurrences.SCAN_STEPS, recurrences.SCAN_NUMBERS, diagonal_cells.gated
    printed = command("--bptt", 25, 50, "--rounds", 1, "--output", tmp_path / "scans.jsonl")
    assert (recurrences.SCAN_STEPS, recurrences.SCAN_NUMBERS, diagonal_cells.gated) == before
    found = [json.loads(line) for line in printed.splitlines()]
    assert [(line["cell"], line["T"]) for line in found] == [("lru", 25), ("lru", 50), ("mingru", 25), ("mingru", 50)]
    header, rows = cells(command("--table", tmp_path / "scans.jsonl"))
    assert [row[:4] for row in rows] == [[line["cell"], "4", "2", str(line["T"])] for line in found]
    assert rows[1][header.index("recurrence: scan, ms")] == f"{found[1]['ms']['recurrence: scan']:.2f}"


def test_a_scan_runs_where_it_is_measured(benchmark):
    scans, _ = benchmark("scans")
    b = torch.zeros(5, 2, 4)
    with scans.all_windows(scan=True):
        assert recurrences.scans(b)
        assert diagonal_cells.gated is not recurrences.gated
    with scans.all_windows(scan=False):
        assert not recurrences.scans(b)
        assert diagonal_cells.gated is recurrences.gated


def test_long_windows_stand_beside_their_bases(benchmark, tmp_path, monkeypatch):
    """The processes that measure memory are real: recomputed activations need less."""
    windows, command = benchmark("long_windows")
    monkeypatch.setattr(windows, "SETTINGS", dict(list(windows.SETTINGS.items())[:2]))
    path = tmp_path / "long_windows.jsonl"
    whole, chunks = map(json.loads, command("--only", "characters", "--rounds", 1, "--output", path).splitlines())
    assert chunks["mib"] < 0.4 * whole["mib"]
    header, rows = cells(command("--table", path))
    ratios = [row[header.index("memory / base")] for row in rows]
    assert ratios == ["–", f"{chunks['mib'] / whole['mib']:.2f}"]
    assert rows[1][header.index("time / base")] == f"{chunks['ms'] / whole['ms']:.2f}"


def test_a_profile_is_put_on_record(benchmark, tmp_path):
    steps, command = benchmark("steps")
    path = tmp_path / "profile.jsonl"
    printed = command("--profile", "char-gru", "--bptt", 1, "--way", "none", "--output", path)
    line = json.loads(path.read_text())
    assert json.dumps(line) in printed
    assert sum(line["operators"].values()) == pytest.approx(1, abs=0.02)
    assert line["operators"]["aten::addmm"] > 0.02
    header, rows = cells(command("--tables", path))
    assert header == ["operator", "char-gru, T = 1, none"]
    shares = dict(rows)
    assert shares["`aten::addmm`"] == f"{line['operators']['aten::addmm']:.0%}"
    assert min(int(share.rstrip(" %")) for share in shares.values()) >= steps.step_profile.LEAST * 100
