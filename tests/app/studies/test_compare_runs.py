"""Real runs side by side: the table's numbers are those of the runs, the plot has a line for each."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from dni_seq.app.studies import compare_runs

pytest.importorskip("tensorboard")


def paths(two_runs) -> list[str]:
    return [str(two_runs / name) for name in ("none", "multi-horizon")]


def test_the_table_says_what_differs_and_the_scores(two_runs, capsys, tmp_path):
    target = tmp_path / "table.md"
    assert compare_runs.main([*paths(two_runs), "--markdown", str(target)]) == 0
    lines = target.read_text().splitlines()
    heading, dashes, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(dashes)) == {"-"}
    one, two = (json.loads((two_runs / name / "config.json").read_text()) for name in ("none", "multi-horizon"))
    differing = sorted(name for name in one if one[name] != two[name])
    assert {"fidelity_every", "horizons", "synthesizer", "synthesizer_hidden"} <= set(differing)
    assert heading == ["run", *differing, "valid ppl", "test ppl", "tokens", "seconds", "tokens/s", "peak MiB"]
    for name, row in zip(("none", "multi-horizon"), rows, strict=True):
        cells = dict(zip(heading, row, strict=True))
        summary = json.loads((two_runs / name / "summary.json").read_text())
        assert (cells["run"], cells["synthesizer"]) == (name, name)
        assert (cells["valid ppl"], cells["test ppl"]) == tuple(f"{summary[s]['ppl']:.2f}" for s in ("valid", "test"))
        assert cells["tokens"] == "15,360"
        assert cells["seconds"] == f"{summary['seconds']:,.0f}"
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["run", "none", "multi-horizon"]


def test_curves_run_over_tokens_and_seconds(two_runs):
    run = compare_runs.read_run(two_runs / "none")
    assert list(run.curve) == [20, 40, 60]
    assert list(run.axes["progress/tokens"].values()) == [20 * 256, 40 * 256, 60 * 256]
    seconds = list(run.axes["progress/seconds"].values())
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] <= run.summary["seconds"]


def test_a_plot_has_a_line_for_each_run(two_runs, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extras plots and dev, is not installed")
    picture, page = tmp_path / "runs.png", tmp_path / "pages" / "runs.md"
    page.parent.mkdir()
    assert compare_runs.main([*paths(two_runs), "--png", str(picture), "--markdown", str(page)]) == 0
    assert "](../runs.png)" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3].reshape(-1, 3)
    for color in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib's colours
        assert (abs(pixels * 255 - color).max(axis=1) < 3).sum() > 50


def test_without_matplotlib_it_says_what_to_install(two_runs, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert compare_runs.main([*paths(two_runs), "--png", str(tmp_path / "runs.png")]) == 2
    assert "pip install 'dni-seq[plots]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_resumes_shows_its_best_so_far(two_runs, capsys, tmp_path):
    shutil.copytree(two_runs / "none", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "summary.json").unlink()
    assert compare_runs.main([str(tmp_path / "unfinished"), str(two_runs / "none")]) == 0
    best = min(compare_runs.read_run(two_runs / "none").curve.values())
    assert f"{best:.2f} so far" in capsys.readouterr().out


@pytest.mark.parametrize("made", ["nothing", "config"])
def test_what_is_no_run_is_one_line_and_status_2(made, capsys, tmp_path):
    if made == "config":
        (tmp_path / "config.json").write_text("{}")
    assert compare_runs.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare_runs: error: ")
    assert error.count("\n") == 1
    assert ("no validation yet" if made == "config" else "is not a run directory") in error
