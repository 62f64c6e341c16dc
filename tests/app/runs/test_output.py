"""Output is no condition of success: narrow encodings, closed streams, pipes without a reader, full disks."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dni_seq.app.runs.output import TolerantStream, output_status, tolerant_output
from tests.paths import ROOT

HEAD = "import sys\nfrom dni_seq.app.runs.program import run_program\n"

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


class FullDisk(io.StringIO):
    """A stream whose writes fail; without a descriptor."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def shell(line: str, tmp_path: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which `$program` is a program of `code`, which defines `main`."""
    (tmp_path / "program.py").write_text(f"{HEAD}{code}\nsys.exit(run_program(main))\n")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"program": f"{sys.executable} {tmp_path / 'program.py'}", "PYTHONPATH": paths}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path, timeout=120
    )


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "caf? ? ?\n"), ("cp1252", "café ? ?\n"), ("utf-8", "café � ?\n")],
)
def test_characters_that_the_encoding_lacks_become_question_marks(encoding, shown):
    """The last one is half a pair of surrogates, which JSON can hold and no encoding can."""
    content = io.BytesIO()
    stream = TolerantStream(io.TextIOWrapper(content, encoding, newline=""))
    print("café � \ud800", file=stream, flush=True)
    assert content.getvalue().decode(encoding) == shown
    assert stream.failure is None


def test_an_own_choice_of_the_error_handler_is_kept():
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, "ascii", "backslashreplace", newline="")
    print("é", file=TolerantStream(stream), flush=True)
    assert content.getvalue() == b"\\xe9\n"


def test_after_a_failure_text_is_discarded(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        stream = TolerantStream(file)
        stream.write("before\n")
        stream.flush()
        os.close(os.dup(file.fileno()))
        readonly = os.open(tmp_path / "log", os.O_RDONLY)
        os.dup2(readonly, file.fileno())  # writing to it fails
        os.close(readonly)
        assert stream.write("lost\n") == 5
        stream.flush()
        stream.write("lost too\n")
        stream.flush()
        assert stream.failure is not None
        assert stream.failure.errno == errno.EBADF
    assert (tmp_path / "log").read_text() == "before\n"


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 2), (errno.EPIPE, 0)])
def test_a_command_whose_result_is_its_output_has_failed_without_it(number, status, monkeypatch):
    """But a reader who leaves early has read what it wanted."""
    assert output_status() == 0
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", FullDisk(number))
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate_lm.py"])
    with tolerant_output():
        print("result")
        assert output_status() == status
    line = f"evaluate_lm: stdout could not be written ({os.strerror(number)}), so output is missing\n"
    assert errors.getvalue() == (line if status else "")


def divide(one: int, two: int) -> float:
    return one / two


def test_streams_are_as_before_afterwards(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), tolerant_output():
        divide(1, 0)
    assert (sys.stdout, sys.stderr) == before
    with tolerant_output():
        print("inside")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "inside\n"


def test_streams_that_are_closed_at_the_start(tmp_path):
    """The program's files must not get the numbers of stdin, stdout and stderr, where other code writes."""
    code = (
        "def main():\n"
        "    print('out'); print('err', file=sys.stderr)\n"
        "    file = open('result', 'w')\n"
        "    assert file.fileno() > 2\n"
        "    import os; os.system('echo from a child; echo from a child >&2')\n"
        "    file.write('done')\n"
        "    return 0\n"
    )
    for closed in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        (tmp_path / "result").unlink(missing_ok=True)
        result = shell(f"$program {closed}", tmp_path, code)
        assert result.returncode == 0, (closed, result.stderr)
        assert (tmp_path / "result").read_text() == "done"
        assert result.stdout == ("" if ">&-" in closed.split() else "out\nfrom a child\n")
        assert result.stderr == ("" if "2>&-" in closed else "err\nfrom a child\n")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    code = (
        "def main():\n"
        "    for number in range(100_000):\n"
        "        print(number, flush=True)\n"
        "    open('result', 'w').write('done')\n"
        "    return 0\n"
    )
    result = shell("$program | head -n 1; echo ${PIPESTATUS[0]}", tmp_path, code)
    assert (result.stdout, result.stderr) == ("0\n0\n", "")
    assert (tmp_path / "result").read_text() == "done"


@needs_full
def test_a_full_disk_is_one_line_on_stderr(tmp_path):
    code = "def main():\n    print('result')\n    return 0\n"
    result = shell("$program >/dev/full; echo $?", tmp_path, code)
    assert result.stdout == "0\n"
    assert result.stderr == "program: stdout could not be written (No space left on device), so output is missing\n"
