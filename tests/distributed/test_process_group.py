"""Ranks: that they agree, that they fail together and in bounded time, and the command on several of them."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from dni_seq.app.runs.lock import RunLock
from dni_seq.distributed import process_group as distributed
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.distributed.process_group import RankError, Ranks, init_distributed
from tests.events import points
from tests.paths import SCRIPTS
from tests.ranks import environment, finish, free_port, start_ranks

TINY = ("--embed", "8", "--hidden", "8", "--layers", "2", "--bptt", "4", "--batch-size", "64", "--eval-tokens", "4000")
EXACT = (
    "--schedule",
    "constant",
    "--dtype",
    "float64",
    "--dropout",
    "0",
    "--synthesizer",
    "multi-horizon",
    "--horizons",
    "2",
    "--eval-every",
    "2",
)


def text_of(work: Any) -> str:
    try:
        work()
    except (ValueError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def agreement(ranks: Ranks) -> dict[str, Any]:
    """What ranks say where something differs or fails on one of them, and where rank 1 does not answer."""

    def fails_on_second() -> None:
        if not ranks.first:
            raise ValueError("no such file")

    def fails() -> None:
        raise ValueError("no such option")

    found: dict[str, Any] = {
        "same": text_of(lambda: ranks.check_same({"text": 3})),
        "other": text_of(lambda: ranks.check_same({"text": 3, "torch": "2.13" if ranks.first else "2.12"})),
        "second": text_of(lambda: ranks.run_on_all(fails_on_second)),
        "first": text_of(lambda: ranks.broadcast_from_rank0(fails)),
        "from first": ranks.broadcast_from_rank0(lambda: ranks.rank + 7),
        "largest": ranks.all_reduce_max(ranks.rank, -ranks.rank),
        "lanes": text_of(lambda: ranks.run_on_all(lambda: DataParallel(ranks).lanes(7))),
    }
    impatient = Ranks(dist.new_group(timeout=timedelta(seconds=2)))
    began = time.monotonic()
    if ranks.first:
        found["silent"] = text_of(lambda: impatient.all_reduce_max(0))
        found["waited"] = time.monotonic() - began
    else:
        time.sleep(3)
    return found


def test_ranks_agree_and_fail_together(two_ranks):
    both = [found["agreement"] for found in two_ranks]
    for found in both:
        assert found["same"] == ""
        assert "rank 1 has a different torch than rank 0 (2.12 there, 2.13 on rank 0)" in found["other"]
        assert found["second"] == "ValueError: rank 1: no such file"
        assert found["first"] == "ValueError: no such option"
        assert found["from first"] == 7
        assert found["largest"] == [1, 0]
        assert "7 lanes cannot be divided among 2 ranks: make the batch size a multiple of 2" in found["lanes"]
    assert "RankError: another rank has ended, or does not answer" in both[0]["silent"]
    assert 1.5 < both[0]["waited"] < 20


def test_a_process_alone_talks_to_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed() as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert ranks.run_on_all(lambda: 3) == ranks.broadcast_from_rank0(lambda: 3) == 3
        assert ranks.gather("a") == ["a"]
        assert ranks.all_reduce_max(3, 4) == [3, 4]
        with pytest.raises(ValueError, match="no such"):
            ranks.run_on_all(lambda: Path("no such file").read_text())


def test_a_port_in_use_and_ranks_that_do_not_come(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        for name, value in environment(0, 2, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(ValueError, match=r"the port of 127.0.0.1:[0-9]+ is in use: give torchrun another"),
            init_distributed(5),
        ):
            pass
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"the 2 ranks have not met at 127.0.0.1:[0-9]+ within 2 s"), init_distributed(2):
        pass
    assert time.monotonic() - began < 20
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="WORLD_SIZE is set, but not MASTER_PORT"), init_distributed(2):
        pass


def test_the_program_is_told_by_its_source():
    assert set(distributed.program()) == {"torch", "source of dni_seq"}


def train(*arguments: str) -> list[str]:
    return [str(SCRIPTS / "train_lm.py"), *TINY, *arguments]


def test_two_ranks_and_then_one_train_as_one(tmp_path, monkeypatch):
    """By torchrun, as users start it; in float64, so that only the order of sums differs."""
    train_lm = runpy.run_path(str(SCRIPTS / "train_lm.py"))["main"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train_lm([*TINY, *EXACT, "--max-steps", "8", "--run-dir", "whole"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    half = train(*EXACT, "--max-steps", "4", "--run-dir", "shared")
    paths = os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*torchrun, *half]
    first = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert first.returncode == 0, first.stderr
    # Rank 0 alone speaks.
    for line in ("train_lm: loading PyTorch ...", "text: pydoc", "model: LSTM", "method: ", "step 4, epoch 0, test"):
        assert first.stdout.count(line) == 1
    summary = json.loads((tmp_path / "shared/summary.json").read_text())
    assert (summary["ranks"], summary["tokens"]) == (2, 4 * 4 * 64)
    assert train_lm(["--max-steps", "8", "--run-dir", "shared", "--resume", "auto"]) == 0
    found, wanted = points(tmp_path / "shared"), points(tmp_path / "whole")
    assert found["valid/loss"].keys() == {2, 4, 6, 8}
    for key in ("valid/loss", "test/loss", "train/loss"):
        last = {step: value for step, value in found[key].items() if step in wanted[key]}
        assert last == pytest.approx(wanted[key], rel=1e-6), key  # TensorBoard keeps float32
    scores = [json.loads((tmp_path / name / "summary.json").read_text())["test"]["loss"] for name in ("shared", "whole")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-11)


THREADS = """
import os, time
from dni_seq.distributed.process_group import init_distributed
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
with init_distributed(100.0) as ranks:
    ranks.check_same({"seed": 1})
    import torch.distributed.fsdp  # as torch's optimizers do at their first step
    assert threads() > before
deadline = time.monotonic() + 10
while threads() > before and time.monotonic() < deadline:
    time.sleep(0.05)
assert threads() == before, threads()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_no_thread_of_a_group_outlives_it(tmp_path):
    """One that lets go of a message while Python ends would abort the process: once in a hundred runs or so."""
    for result in finish(start_ranks(["-c", THREADS], 2, tmp_path)):
        assert result.returncode == 0, result.stderr


def test_ranks_end_where_another_run_is_in_the_directory(tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock() as lock:
        lock.take(tmp_path / "run")
        results = finish(start_ranks(train("--max-steps", "2", "--run-dir", "run"), 2, tmp_path))
    assert [result.returncode for result in results] == [2, 2], results[1].stderr
    assert f"process {os.getpid()} on " in results[0].stderr
    assert "is training in --run-dir" in results[0].stderr.strip().splitlines()[-1]
    assert results[1].stderr == ""
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock"]


def test_a_rank_that_dies_ends_the_others_and_the_run_resumes(tmp_path):
    arguments = train("--synthesizer", "none", "--max-steps", "1000000", "--eval-every", "5", "--run-dir", "run")
    processes = start_ranks(arguments, 2, tmp_path)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "run/checkpoints/last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        processes[0].wait(timeout=30)
        assert time.monotonic() - died < 20
    finally:
        survivor = finish(processes)[0]
    assert survivor.returncode == 2
    (line,) = survivor.stderr.strip().splitlines()[-1:]
    assert re.search("rank 0 stopped at step [0-9]+: another rank has ended, or does not answer", line), survivor.stderr
    assert "to resume from the last checkpoint: --run-dir run --resume auto" in line
    # Both ranks again, and a signal that reaches one of them alone: they stop at the same step, and save.
    processes = start_ranks([*arguments, "--resume", "auto"], 2, tmp_path)
    before = (tmp_path / "run/checkpoints/last.pt").stat().st_mtime_ns
    try:
        deadline = time.monotonic() + 100
        while (tmp_path / "run/checkpoints/last.pt").stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        results = finish(processes, timeout=60)
    assert [result.returncode for result in results] == [143, 143], results[0].stderr
    assert re.search("stopped at step [0-9]+; to resume", results[0].stdout)
    assert results[1].stdout == ""
