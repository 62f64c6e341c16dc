"""A run directory belongs to one configuration."""

from __future__ import annotations

import json

import pytest

from dni_seq.app.runs.directory import RunDirectory, differences, new_run_path

CONFIG = {"bptt": 5, "hidden": 200, "epochs": 6}


def test_a_new_directory_is_made_with_its_configuration(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a")
    run.refuse_new_run(CONFIG)
    run.create(CONFIG)
    assert json.loads(run.config.read_text()) == CONFIG
    assert run.last.parent.is_dir()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (CONFIG, "holds a run already: add --resume auto"),
        (CONFIG | {"hidden": None}, "holds a run already"),
        (CONFIG | {"bptt": 7}, r"another configuration \(--bptt 5 there, 7 here\): choose another --run-dir"),
    ],
)
def test_a_used_directory_is_refused(tmp_path, wanted, message):
    run = RunDirectory(tmp_path)
    run.create(CONFIG)
    with pytest.raises(ValueError, match=message):
        run.refuse_new_run(wanted)
    assert json.loads(run.config.read_text()) == CONFIG


def test_files_that_are_no_run_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds files but no run"):
        RunDirectory(tmp_path).refuse_new_run(CONFIG)
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "thesis.tex").refuse_new_run(CONFIG)
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty").refuse_new_run(CONFIG)


def test_a_damaged_configuration_is_not_taken_for_this_run(tmp_path):
    run = RunDirectory(tmp_path)
    run.config.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="another configuration"):
        run.refuse_new_run(CONFIG)


def test_the_run_of_a_checkpoint(tmp_path):
    run = RunDirectory(tmp_path / "a")
    run.create(CONFIG)
    assert RunDirectory.of_checkpoint(run.best).config == run.config
    for stray in (tmp_path / "last.pt", tmp_path / "b" / "checkpoints" / "last.pt"):
        with pytest.raises(ValueError, match=r"RUN_DIR/checkpoints/NAME\.pt"):
            RunDirectory.of_checkpoint(stray)


def test_differences_name_what_may_not_change():
    wanted = {"bptt": 7, "epochs": 9, "synthetic_scale": 0.1}
    text = differences(CONFIG, wanted, may_change={"epochs"})
    assert text == "--bptt 5 there, 7 here, --synthetic-scale None there, 0.1 here"
    assert differences(CONFIG, {"bptt": 5}) == ""


def test_new_paths_are_unused(tmp_path):
    paths = set()
    for _ in range(3):
        path = new_run_path("ptb", tmp_path)
        path.mkdir()
        paths.add(path)
    assert len(paths) == 3
    assert all(path.name.startswith("ptb-") for path in paths)
