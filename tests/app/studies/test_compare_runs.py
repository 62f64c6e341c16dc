"""Real runs side by side: the table's numbers are those of the runs, at equal text and equal CPU time too."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from dni_seq.app.runs.checkpoint import save_checkpoint
from dni_seq.app.runs.run_log import RunLog
from dni_seq.app.runs.trackers import METRICS
from dni_seq.app.studies import compare_runs, compared_runs
from dni_seq.app.studies.compare_runs import AXES, score_at, table
from dni_seq.app.studies.compared_runs import Run, Validation, common_point, differing_options, read_run

pytest.importorskip("tensorboard")

NAMES = ("none", "multi-horizon")


def paths(two_runs) -> list[str]:
    return [str(two_runs / name) for name in NAMES]


def run_of(*validations: Validation, config=None, summary=None) -> Run:
    return Run(Path("somewhere"), config or {}, validations, summary or {})


def old_run(two_runs, path: Path, *, tokens: int = 1000) -> Path:
    """A run of an older version, without CPU seconds in its events. A step is `tokens` tokens, a validation a CPU second."""
    path.mkdir()
    shutil.copy(two_runs / "none" / "config.json", path)
    log = RunLog(path)
    for place in (1, 2, 3):
        progress = {"progress/tokens": place * tokens + 2**24, "progress/seconds": 2.0 * place}
        log.scalars(place, {"valid/perplexity": 9.0 - place, **progress})
    log.close()
    (path / METRICS).unlink()
    return path


def test_a_run_without_events_is_read_from_its_metrics(two_runs, tmp_path):
    """As with --logger none: the validations are the same."""
    path = tmp_path / "none"
    shutil.copytree(two_runs / "none", path, ignore=shutil.ignore_patterns("events.*"))
    whole = read_run(two_runs / "none")
    assert len(whole.validations) == 3
    assert read_run(path).validations == whole.validations


def curve_of(tokens: int = 1000) -> list[list[float]]:
    return [[place * tokens + 2**24, 2.0 * place, 1.0 * place, 3.0] for place in (1, 2, 3)]


def test_the_table_says_what_differs_and_the_scores(two_runs, capsys, tmp_path):
    target = tmp_path / "table.md"
    assert compare_runs.main([*paths(two_runs), "--markdown", str(target)]) == 0
    lines = [line for line in target.read_text().splitlines() if line.startswith("|")]
    heading, dashes, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(dashes)) == {"-"}
    # Two horizons are the default, and --synthesizer-hidden has no effect on the gradient of a predictor.
    differing = ["fidelity_every", "regress_every", "synthesizer"]
    assert heading[: len(differing) + 4] == ["run", *differing, "valid ppl", "test ppl", "ppl at 15,360 tokens"]
    assert heading[-5:] == ["tokens", "seconds", "CPU s", "tokens/s", "peak MiB"]
    for name, row in zip(NAMES, rows, strict=True):
        cells = dict(zip(heading, row, strict=True))
        summary = json.loads((two_runs / name / "summary.json").read_text())
        assert (cells["run"], cells["synthesizer"]) == (name, name)
        assert cells["fidelity_every"] == {"none": "0", "multi-horizon": "8"}[name]
        assert (cells["valid ppl"], cells["test ppl"]) == tuple(f"{summary[s]['ppl']:.2f}" for s in ("valid", "test"))
        assert cells["ppl at 15,360 tokens"] == f"{read_run(two_runs / name).validations[-1].perplexity:.2f}"
        assert cells["tokens"] == "15,360"
        assert cells["seconds"] == f"{summary['seconds']:,.0f}"
        assert cells["CPU s"] == f"{summary['process_seconds']:,.0f}"
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:3]] == ["run", *NAMES]
    assert shown[3:] == [compare_runs.EXPLANATION]
    assert compare_runs.EXPLANATION in target.read_text()


def test_validations_run_over_tokens_seconds_and_cpu_seconds(two_runs):
    run = read_run(two_runs / "none")
    assert [each.step for each in run.validations] == [20, 40, 60]
    assert [each.tokens for each in run.validations] == [20 * 256, 40 * 256, 60 * 256]
    for name, axis in (("seconds", AXES["seconds"]), ("process_seconds", AXES["CPU seconds"])):
        places = [axis(each) for each in run.validations]
        assert places == sorted(places)
        assert 0 < places[0] < places[-1] <= run.summary[name]


def test_runs_are_compared_at_the_last_validation_before_the_common_point():
    fast = run_of(Validation(1, 9.0, 100, 1, 1.0), Validation(2, 8.0, 200, 2, 2.0), Validation(3, 7.0, 300, 3, 3.0))
    slow = run_of(Validation(1, 6.0, 150, 9, 2.5), Validation(2, 5.0, 250, 9, 9.0))
    late = run_of(Validation(1, 4.0, 250, 9, 8.0))
    assert common_point([fast, slow], AXES["tokens"]) == 250
    assert [score_at(run, "tokens", 250) for run in (fast, slow)] == ["8.00 (at 200)", "5.00"]
    assert common_point([fast, slow, late], AXES["CPU seconds"]) == 3.0
    assert [score_at(run, "CPU seconds", 3.0) for run in (fast, slow, late)] == ["7.00", "6.00 (at 2.5)", ""]
    unknown = run_of(Validation(1, 3.0, 250, 9, None))
    assert common_point([unknown, slow], AXES["CPU seconds"]) == 9.0
    assert common_point([unknown], AXES["CPU seconds"]) is None
    assert score_at(unknown, "CPU seconds", 9.0) == ""


@pytest.mark.parametrize("saved", ["summary", "checkpoint", "nothing"])
def test_an_older_run_takes_cpu_seconds_from_where_they_were_saved(saved, two_runs, tmp_path):
    run = old_run(two_runs, tmp_path / "old", tokens=999)  # float32 rounds such sums
    if saved == "summary":
        (run / "summary.json").write_text(json.dumps({"curve": curve_of(999), "valid": {"ppl": 6}, "test": {"ppl": 7}}))
    elif saved == "checkpoint":
        (run / "checkpoints").mkdir()
        save_checkpoint(run / "checkpoints" / "last.pt", {"counters": {"curve": curve_of(999)}})
    known = [None, None, None] if saved == "nothing" else [1.0, 2.0, 3.0]
    assert [each.cpu_seconds for each in read_run(run).validations] == known
    heading, _, row = table([read_run(two_runs / "none"), read_run(run)])
    cells = dict(zip(heading, row, strict=True))
    (at,) = (name for name in heading if name.startswith("ppl at ") and name.endswith(" CPU s"))
    assert (cells[at] == "") == (saved == "nothing" or not read_run(run).at(AXES["CPU seconds"], common(two_runs)))
    assert cells["CPU s"] == {"nothing": ""}.get(saved, "3")


def common(two_runs) -> float:
    place = common_point([read_run(two_runs / "none")], AXES["CPU seconds"])
    assert place is not None
    return place


def test_what_follows_from_another_option_is_no_difference(two_runs):
    config = json.loads((two_runs / "multi-horizon" / "config.json").read_text())
    assert config["lookahead"] == 8

    def differing(*changes) -> dict:
        return differing_options([run_of(config={**config, **change}) for change in changes])

    assert differing({}, {"bptt": 2, "lookahead": 4}) == {"bptt": [4, 2]}
    assert differing({}, {"lookahead": 4}) == {"lookahead": [8, 4]}
    # A default that is given, a new option that is missing, and the place of a file.
    assert differing({}, {"discount": 1.0, "dataset": "pydoc"}) == {}
    assert differing({"data_file": "/a/book.txt", "data_dir": "/a"}, {"data_file": "/b/book.txt", "data_dir": "/b"}) == {}
    assert differing({"data_file": "/a/book.txt"}, {"data_file": "/a/other.txt"}) == {"data_file": ["book.txt", "other.txt"]}
    older = {name: value for name, value in config.items() if name != "message_clip"}
    assert differing_options([run_of(config=config), run_of(config=older)]) == {}
    # Of another version.
    assert differing({}, {"depth": 3}) == {"depth": [None, 3]}
    assert differing({}, {"fit": "gone"}) == {"fit": ["future", "gone"]}


def test_runs_of_different_tokens_are_not_comparable(two_runs):
    config = json.loads((two_runs / "none" / "config.json").read_text())
    words = run_of(config={**config, "tokenizer": "word"})
    assert "differ in tokenizer" in compare_runs.notes([run_of(config=config), words])[-1]
    assert compare_runs.notes([words]) == []


def test_a_plot_has_a_line_for_each_run(two_runs, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extras plots and dev, is not installed")
    picture, page = tmp_path / "runs.png", tmp_path / "pages" / "runs.md"
    page.parent.mkdir()
    assert compare_runs.main([*paths(two_runs), "--png", str(picture), "--markdown", str(page)]) == 0
    assert "](../runs.png)" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    for panel in range(3):  # over tokens, CPU seconds and seconds
        part = pixels[:, panel * pixels.shape[1] // 3 : (panel + 1) * pixels.shape[1] // 3].reshape(-1, 3)
        for color in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib's colours
            assert (abs(part * 255 - color).max(axis=1) < 3).sum() > 50
    compare_runs.plot([run_of(Validation(1, 9.0, 100, 1, None))], str(picture))
    assert imread(picture).shape[1] < pixels.shape[1] * 0.7  # without CPU seconds


def test_without_matplotlib_it_says_what_to_install(two_runs, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert compare_runs.main([*paths(two_runs), "--png", str(tmp_path / "runs.png")]) == 2
    assert "pip install 'dni-seq[plots]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_resumes_shows_its_best_so_far(two_runs, capsys, tmp_path):
    shutil.copytree(two_runs / "none", tmp_path / "none")
    (tmp_path / "none" / "summary.json").unlink()
    assert compare_runs.main([str(tmp_path / "none"), str(two_runs / "none")]) == 0
    best = min(each.perplexity for each in read_run(two_runs / "none").validations)
    unfinished, finished = capsys.readouterr().out.splitlines()[1:3]
    assert f"{best:.2f} so far" in unfinished
    # Two directories of one name are told by their paths.
    assert unfinished.startswith(f"{tmp_path / 'none'} ")
    assert finished.startswith(f"{two_runs / 'none'} ")


def test_a_summary_from_before_a_run_was_extended_does_not_count(two_runs, capsys, tmp_path):
    run = shutil.copytree(two_runs / "none", tmp_path / "none")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "steps": summary["steps"] - 1}))
    assert compare_runs.main([str(run), str(two_runs / "none")]) == 0
    extended, finished = capsys.readouterr().out.splitlines()[1:3]
    assert "so far" in extended
    assert "so far" not in finished


@pytest.mark.parametrize("made", ["nothing", "config", "list"])
def test_what_is_no_run_is_one_line_and_status_2(made, capsys, tmp_path):
    if made != "nothing":
        (tmp_path / "config.json").write_text({"config": "{}", "list": "[]"}[made])
    assert compare_runs.main([str(tmp_path), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare_runs: error: ")
    assert error.count("\n") == 1
    assert error.count("no validation yet" if made == "config" else "is not a run directory") == 2


def test_a_path_without_a_run_is_skipped(two_runs, capsys, tmp_path):
    assert compare_runs.main([str(tmp_path), *paths(two_runs)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()[:3]] == ["run", *NAMES]
    assert shown.err.startswith(f"compare_runs: skipped: {tmp_path} is not a run directory")
    assert shown.err.count("\n") == 1


def test_checkpoints_are_read_only_for_runs_without_cpu_seconds(two_runs, monkeypatch):
    """A checkpoint holds the whole model."""
    monkeypatch.setattr(compared_runs, "saved_cpu_seconds", lambda *_: pytest.fail("read"))
    assert read_run(two_runs / "none").validations[-1].cpu_seconds
