"""The commands with a terminal that cannot show everything, without one, and with one that closes: nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dni_seq.app.runs.checkpoint import load_checkpoint
from tests.events import points
from tests.paths import SCRIPTS

RUN = "--synthesizer none --hidden 8 --embed 8 --batch-size 4 --bptt 8 --max-steps 6 --data-file text.txt --run-dir"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a text of plain letters; a sample of it has U+FFFD, the unknown character."""
    directory = tmp_path_factory.mktemp("terminal")
    (directory / "text.txt").write_text("".join(f"line {i} of plain letters\n" for i in range(300)))
    return directory


def bash(line: str, place: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of bash in which `$train` and `$sample` are commands."""
    commands = {name: f"{sys.executable} {SCRIPTS}/{name}_lm.py" for name in ("train", "sample")}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | commands | variables
    return subprocess.run(["bash", "-c", line], capture_output=True, check=False, cwd=place, env=environment, timeout=300)


def test_a_narrow_encoding_shows_question_marks(place):
    result = bash(f"$train {RUN} narrow", place, PYTHONIOENCODING="cp1252")
    assert (result.returncode, result.stderr) == (0, b"")
    assert json.loads((place / "narrow" / "summary.json").read_text())["steps"] == 6
    sample = result.stdout.split(b"--- sample at step 6 ---")[1]
    assert b"?" in sample
    assert b"\xef\xbf\xbd" not in sample
    result = bash("$sample narrow", place, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"?" in result.stdout


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "| head -n 1"])
def test_a_run_needs_no_stream_and_no_reader(streams, place, tmp_path):
    result = bash(f"$train {RUN} {tmp_path} {streams}; echo status ${{PIPESTATUS[0]}}", place)
    assert result.stdout.endswith(b"status 0\n")
    assert result.stderr == b""
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6


def test_a_finished_run_that_is_queued_again_has_no_point_twice(place):
    for _ in range(2):
        result = bash(f"$train {RUN} queued --resume auto", place)
        assert result.returncode == 0
    hint = b"to train on, raise --epochs, --max-steps, --max-tokens or --patience"
    assert result.stdout.endswith(b"\nfinished at step 6, results in queued; " + hint + b"\n")
    assert points(place / "queued")["test/loss"].keys() == {6}


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_under_nohup_goes_on_when_the_terminal_closes(place):
    line = f"nohup $train {RUN} nohup --max-steps 1000000 >log 2>&1 & echo $!"
    pid = int(bash(line, place).stdout)
    try:
        wait_until(lambda: bool(list(place.glob("nohup/events.*"))))
        time.sleep(0.5)
        os.kill(pid, signal.SIGHUP)
        time.sleep(0.5)
        os.kill(pid, 0)  # it is still there
        assert b"stopped at step" not in (place / "log").read_bytes()
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: b"stopped at step" in (place / "log").read_bytes())
    assert load_checkpoint(place / "nohup" / "checkpoints" / "last.pt")["trainer"]["steps"] > 0
