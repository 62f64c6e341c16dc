"""An error that nobody foresaw keeps its traceback and says what to report."""

from __future__ import annotations

import platform

import torch

from dni_seq.app.runs.crash_report import report_crash, versions


def test_what_ends_well_or_on_purpose_is_untouched(capsys):
    assert [report_crash(lambda status=status: status) for status in (0, 2, 130)] == [0, 2, 130]
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_reported_with_versions(capsys):
    def main() -> int:
        raise KeyError("lane")

    assert report_crash(main) == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    assert trace[-1] == "KeyError: 'lane'"
    for version in (torch.__version__, platform.python_version(), versions()["dni_seq"]):
        assert version in last
