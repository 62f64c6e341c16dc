"""metrics.csv: one row a step, nothing doubled after a kill, and the same numbers as TensorBoard's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dni_seq.app.runs.metrics_file import MetricsFile, read_curves
from dni_seq.app.runs.tensorboard import FIRST
from dni_seq.app.runs.trackers import METRICS
from tests.events import points


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("name", ["none", "multi-horizon"])
def test_it_holds_every_curve_of_tensorboard(two_runs, name):
    curves = read_curves(two_runs / name / METRICS)
    shown = {key: curve for key, curve in points(two_runs / name).items() if key not in FIRST.values()}
    assert len(shown) > 10
    assert curves.keys() == shown.keys()
    for key, curve in curves.items():
        # Event files hold float32.
        assert curve == pytest.approx(shown[key], rel=1e-6), key


def test_pandas_reads_a_table_of_steps(tmp_path):
    pandas = pytest.importorskip("pandas")
    file = MetricsFile(tmp_path / "deep" / METRICS)
    file.add(1, {"train/loss": 0.1, "count": 3})
    file.add(1, {"train/perplexity": math.inf})
    file.add(2, {"train/loss": math.nan})
    file.add(3, {"valid/loss": 1 / 3, "step": 7.5})
    file.close()
    table = pandas.read_csv(tmp_path / "deep" / METRICS, index_col="step")
    assert list(table.index) == [1, 2, 3]
    assert list(table.columns) == ["train/loss", "count", "train/perplexity", "valid/loss"]
    assert table["train/loss"].dropna().to_dict() == {1: 0.1}
    assert table.loc[1, "train/perplexity"] == math.inf
    assert table["valid/loss"].dropna().to_dict() == {3: pytest.approx(1 / 3)}
    assert lines(tmp_path / "deep" / METRICS)[2] == "2,nan,,,"  # measured, and not a number


def test_points_after_a_flush_join_the_row_of_their_step(tmp_path):
    file = MetricsFile(tmp_path / METRICS)
    for step in (1, 2):
        file.add(step, {"a": step, "b": 0})
    file.flush()
    assert lines(tmp_path / METRICS) == ["step,a,b", "1,1,0", "2,2,0"]
    file.add(2, {"b": 5})
    file.flush()
    file.add(2, {"c": 6})
    file.close()
    assert lines(tmp_path / METRICS) == ["step,a,b,c", "1,1,0,", "2,2,5,6"]


def test_a_row_is_in_the_file_once_its_step_is_over(tmp_path):
    """So that a kill loses one row, and a user sees the curves of a run that trains."""
    file = MetricsFile(tmp_path / METRICS)
    for step in (1, 2, 3):
        file.add(step, {"a": step})
    assert lines(tmp_path / METRICS) == ["step,a", "1,1", "2,2"]
    file.close()


@pytest.mark.parametrize("unfinished", ["", "4", "10", "10,"])
def test_a_resumed_run_removes_what_was_logged_after_its_checkpoint(tmp_path, unfinished):
    """The unfinished line of a killed process may look like an earlier step."""
    path = tmp_path / METRICS
    path.write_text(f"step,a,b\n2,1,\n4,2,7\n6,3,\n8,4,8\n{unfinished}")
    file = MetricsFile(path, resumed_at=6)
    file.add(6, {"b": 9})
    file.add(8, {"a": 40})
    file.close()
    assert lines(path) == ["step,a,b", "2,1,", "4,2,7", "6,3,9", "8,40,"]
    MetricsFile(path).close()  # a run without a checkpoint starts from the beginning
    assert lines(path) == ["step"]


@pytest.mark.parametrize(
    "content", [b"step,a\nx,1\n", b"a\n1\n", b"step,a\n1,2,3\n", b"step,a,b\n1,2\n", b"\xff\xfe\n", b"2\n2\n"]
)
def test_another_file_of_that_name_is_left_alone(tmp_path, content):
    (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.csv is not a table of numbers by step"):
        MetricsFile(tmp_path / METRICS, resumed_at=5)
    assert (tmp_path / METRICS).read_bytes() == content
    assert list(tmp_path.iterdir()) == [tmp_path / METRICS]


def test_a_table_of_words_is_no_curve(tmp_path):
    (tmp_path / METRICS).write_text("step,a\n1,word\n")
    with pytest.raises(ValueError, match="is not a table of numbers by step"):
        read_curves(tmp_path / METRICS)
