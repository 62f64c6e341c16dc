"""One writer a run directory, and no lock that outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dni_seq.app.runs.lock import LOCK_NAME, RunLock

HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from dni_seq.app.runs.lock import RunLock\n"
    "with RunLock() as lock:\n"
    "    lock.take(Path(sys.argv[1]))\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_with_the_first_ones_number(tmp_path, holder):
    with RunLock() as lock, pytest.raises(ValueError, match=f"process {holder.pid} on .* is training in --run-dir"):
        lock.take(tmp_path)


def test_sigkill_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).is_file()
    with RunLock() as lock:
        lock.take(tmp_path)
        assert lock.missing is None
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_ends_with_its_context_and_is_taken_once(tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)
        with RunLock() as other, pytest.raises(ValueError, match="is training in"):
            other.take(tmp_path)
    with RunLock() as lock:
        lock.take(tmp_path)


def test_a_child_that_executes_another_program_does_not_keep_it(tmp_path):
    """As compilers and data loaders are: the file is closed on exec."""
    with RunLock() as lock:
        lock.take(tmp_path)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    try:
        time.sleep(0.2)
        with RunLock() as lock:
            lock.take(tmp_path)
    finally:
        child.kill()
        child.wait()


def test_a_directory_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with RunLock() as lock, pytest.raises(FileNotFoundError):
        lock.take(tmp_path / "absent")
    assert list(Path(tmp_path).iterdir()) == []
