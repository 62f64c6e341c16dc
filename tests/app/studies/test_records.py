"""Lines of results that processes share, and the tables of a page."""

from __future__ import annotations

import threading

import pytest

from dni_seq.app.studies.records import append_line, around_tables, locked, markdown, mean_and_std, read_lines, write_tables


def test_lines_come_back_in_their_order(tmp_path):
    results = tmp_path / "new" / "results.jsonl"
    assert read_lines(results) == []
    for number in range(3):
        append_line(results, {"key": str(number), "γ": 0.1})
    assert read_lines(results) == [{"key": str(number), "γ": 0.1} for number in range(3)]
    assert results.read_text(encoding="utf-8").count("γ") == 3


def test_a_line_that_a_kill_has_broken_off_goes(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "a"}\n{"key": "b", "resu')
    assert read_lines(results) == [{"key": "a"}]
    append_line(results, {"key": "c"})
    assert results.read_text() == '{"key": "a"}\n{"key": "c"}\n'


def test_a_last_line_that_lacks_its_line_end_alone_stays(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "a"}')
    assert read_lines(results) == [{"key": "a"}]
    append_line(results, {"key": "b"})
    assert results.read_text() == '{"key": "a"}\n{"key": "b"}\n'


def test_bad_lines_are_named_and_numbers_must_be_finite(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "a"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"line 2 of .*results\.jsonl is not JSON"):
        read_lines(results)
    results.unlink()
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_line(results, {"loss": float("nan")})
    assert not results.exists()


def test_writers_wait_for_each_other(tmp_path):
    """The lock belongs to an open file, so that two in one process exclude each other as those of two processes do."""
    results = tmp_path / "results.jsonl"
    writer = threading.Thread(target=append_line, args=(results, {"key": "late"}))
    with results.open("a+b") as file, locked(file):
        writer.start()
        writer.join(timeout=0.3)
        assert writer.is_alive()
        file.write(b'{"key": "early"}\n')
        file.flush()
    writer.join(timeout=10)
    assert [line["key"] for line in read_lines(results)] == ["early", "late"]


def test_tables_stand_between_their_marks(tmp_path):
    page, marks = tmp_path / "page.md", ("<!-- from -->", "<!-- to -->")
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="insert them where the tables go"):
        write_tables(page, marks, "table")
    assert page.read_text() == "nothing\n"
    page.write_text("before\n<!-- from -->\nold\n<!-- to -->\nbehind\n")
    write_tables(page, marks, markdown(["a", "b"], [["1", "2"]]))
    assert page.read_text() == "before\n<!-- from -->\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n<!-- to -->\nbehind\n"
    assert around_tables(page, marks) == ("before\n", "\nbehind\n")


def test_spread():
    assert mean_and_std([]) == "–"
    assert mean_and_std([1.25], 2) == "1.25 (1)"
    assert mean_and_std([1.0, 3.0]) == "2.0 ± 1.4 (2)"
