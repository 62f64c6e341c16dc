"""Exact resumption: runs killed by SIGKILL, in mid-checkpoint too, end as if nothing had been; the soak in small.

docs/reliability.md has the figures of the whole soak, `python scripts/soak.py`.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dni_seq.app.lm import build_trainer, train
from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.studies import soak
from tests.paths import SCRIPTS

KINDS = (
    "none by documents",
    "multi-horizon, tail, drawn",
    "lambda, target network",
    "accumulation",
    "adamw, linear",
    "past and future",
)
"""Lanes that end, every place where chance is drawn, and everything that waits in a checkpoint: ring, targets, averages,
schedule, sums of gradients."""


@pytest.fixture(scope="module")
def soaked(tmp_path_factory) -> dict:
    """What the soak says of a few kinds, two kills each, on a small text."""
    directory = tmp_path_factory.mktemp("soak")
    text = "".join(f"line {i} of {i * i % 97} words, and {'so' * (i % 5)} on\n" for i in range(600))
    (directory / "text.txt").write_text(text)
    command = [sys.executable, str(SCRIPTS / "soak.py"), "--data-file", str(directory / "text.txt")]
    command += ["--kills", "2", "--seed", "1", "--out", str(directory / "soak.json"), "--kinds", *KINDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((directory / "soak.json").read_text())


def test_killed_runs_end_as_if_they_had_not_been(soaked):
    assert set(soaked["kinds"]) == set(KINDS)
    for kind, result in soaked["kinds"].items():
        assert result["kills"] == 2, kind
        assert result["differences"] == [], kind
        assert result["failures"] == [], kind


def test_the_kills_fell_while_training_and_while_saving(soaked):
    assert soaked["all"]["while saving"] >= 1  # a quick disk may have finished before the signal comes
    assert any(0 < steps < 170 for steps in soaked["all"]["kept steps"])


def test_a_soak_of_short_runs(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i % 97} words\n" for i in range(300)))
    arguments = ["--kinds", "none", "--kills", "1", "--max-steps", "20", "--data-file", str(tmp_path / "text.txt")]
    assert soak.main([*arguments, "--out", str(tmp_path / "soak.json")]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["options"].endswith("--max-steps 20")
    assert found["all"]["kills"] == 1
    assert all(steps <= 20 for steps in found["all"]["kept steps"])


def test_the_soak_finds_a_difference(tmp_path):
    """One bit of one parameter, one moment, one point of a curve."""
    differences_of = soak.differences_of
    one = {
        "w": torch.arange(4.0),
        "moments": [torch.ones(2), None],
        "points": {"train/loss": [(50, 1.5)]},
        "nan": float("nan"),
    }
    assert list(differences_of(one, copy.deepcopy(one), "run")) == []
    for name, change in {
        "run.w": lambda two: two["w"].view(torch.int32)[2].bitwise_xor_(1),
        "run.moments[0]": lambda two: two["moments"][0].add_(1e-7),
        "run.moments[1]": lambda two: two["moments"].__setitem__(1, 0),
        "run.points.train/loss": lambda two: two["points"]["train/loss"].append((50, 1.5)),
        "run.points.train/loss[0][1]": lambda two: two["points"]["train/loss"].__setitem__(0, (50, 1.5000001)),
        "run.nan": lambda two: two.__setitem__("nan", 0.0),
        "run.more": lambda two: two.__setitem__("more", 1),
    }.items():
        two = copy.deepcopy(one)
        change(two)
        (difference,) = differences_of(one, two, "run")
        assert difference.startswith(name + ":"), difference


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path):
    """Checkpoints, curves and scores of a run in this process, of one in a process of its own, and of another seed."""
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i % 7}\n" for i in range(2000)))
    options = [*soak.TINY, *soak.LENGTH, *soak.KINDS["multi-horizon"], "--data-file", str(tmp_path / "text.txt")]
    options += ["--max-steps", "55"]
    script = SCRIPTS / "train_lm.py"
    main = train.main
    runs = {name: RunDirectory(tmp_path / name) for name in ("first", "again", "other")}
    assert main([*options, "--seed", "5", "--run-dir", str(runs["first"].path)]) == 0
    assert main([*options, "--seed", "6", "--run-dir", str(runs["other"].path)]) == 0
    command = [sys.executable, str(script), *options, "--seed", "5", "--run-dir", str(runs["again"].path)]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert list(soak.compare(runs["first"], runs["again"])) == []
    assert any("trainer.model" in difference for difference in soak.compare(runs["first"], runs["other"]))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command in this process, with the options of a tiny run in `run`, where there is nothing yet."""
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i % 7}\n" for i in range(2000)))
    monkeypatch.chdir(tmp_path)
    options = [*soak.TINY, *soak.LENGTH, "--data-file", "text.txt", "--run-dir", "run"]
    return train.main, options


def test_a_run_that_diverges_stops_with_a_diagnosis_and_a_whole_checkpoint(small, capsys):
    """Weights of 1e37 after the first step, whose products overflow: every later window is left out."""
    main, options = small
    assert main([*options, "--synthesizer", "none", "--lr", "1e37", "--clip", "0"]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("train_lm: error: ")]
    assert "windows in a row were skipped, from step" in line
    assert "first NaN or infinity in the " in line
    assert "to resume: --run-dir run --resume auto" in line
    assert "skipped; first NaN or infinity in the " in out
    saved = load_checkpoint(RunDirectory("run").last)
    assert all(value.isfinite().all() for value in saved["trainer"]["model"].values())
    assert saved["trainer"]["skipped"]["in_a_row"] == 10


def test_a_sparse_embedding_is_resumed_bit_identically(small):
    main, options = small
    options = [*options, "--sparse-embedding", "--schedule", "constant"]  # the same rates, whatever the length
    assert main([*options, "--max-steps", "60"]) == 0
    RunDirectory("run").path.rename("whole")
    assert main([*options, "--max-steps", "40"]) == 0
    assert main(["--run-dir", "run", "--resume", "auto", "--max-steps", "60"]) == 0
    one, two = (load_checkpoint(RunDirectory(each).last)["trainer"] for each in ("whole", "run"))
    assert len(one["optimizer"]["parts"]) == 2
    assert list(soak.differences_of(one, two, "trainer")) == []


@pytest.mark.parametrize("more", [(), ("--sparse-embedding",)])
def test_skipped_steps_are_on_the_curve_and_not_in_its_averages(small, more, monkeypatch):
    _, options = small
    options = [*options, *more]
    losses = build_trainer.token_losses
    calls = []

    def sometimes(logits, targets):
        calls.append(None)
        return losses(logits, targets) * (float("nan") if len(calls) % 10 == 5 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(build_trainer, "token_losses", sometimes)
        assert train.main([*options, "--synthesizer", "none", "--max-steps", "50"]) == 0
    curves = soak.points(Path("run"))
    assert curves["train/skipped"] == [(50, 5.0)]
    assert 0 < curves["train/loss"][0][1] < 10


def test_a_full_disk_ends_the_run_and_loses_nothing(small, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    main, options = small
    assert main([*options, "--max-steps", "20"]) == 0
    run = RunDirectory("run")
    run.last.with_name("last.pt.tmp").symlink_to("/dev/full")
    capsys.readouterr()
    assert main(["--run-dir", "run", "--resume", "auto", "--max-steps", "60"]) == 2
    err = capsys.readouterr().err
    assert "train_lm: error: [Errno 28] cannot write: No space left on device: 'run/checkpoints/last.pt'" in err
    assert load_checkpoint(run.last)["trainer"]["steps"] == 20
    assert main(["--run-dir", "run", "--resume", "auto", "--max-steps", "60"]) == 0


def test_a_damaged_last_checkpoint_costs_the_steps_since_the_one_before(small, capsys):
    """And no difference in the end."""
    main, options = small
    options = [*options, "--schedule", "constant"]
    assert main([*options, "--max-steps", "60"]) == 0
    whole = RunDirectory("whole")
    run = RunDirectory("run")
    run.path.rename("whole")
    assert main([*options, "--max-steps", "40"]) == 0
    data = bytearray(run.last.read_bytes())
    data[len(data) // 2] ^= 1
    run.last.write_bytes(data)
    capsys.readouterr()
    assert main(["--run-dir", "run", "--resume", "auto", "--max-steps", "60"]) == 0
    assert f"is damaged: resuming from {run.previous}" in capsys.readouterr().out
    one, two = (load_checkpoint(each.last) for each in (whole, run))
    assert list(soak.differences_of(one["trainer"], two["trainer"], "trainer")) == []
    assert run.last.with_name("last.pt.damaged").exists()


def test_a_damaged_best_checkpoint_costs_its_scores_alone(small, capsys):
    main, options = small
    assert main([*options, "--max-steps", "20"]) == 0
    run = RunDirectory("run")
    run.best.write_bytes(run.best.read_bytes()[:1000])
    run.summary.unlink()  # as if killed while it scored; a finished run is left alone
    assert main(["--run-dir", "run", "--resume", "auto"]) == 0
    assert (
        "best.pt is not a checkpoint, or is damaged: the scores are those of the last checkpoint instead"
        in capsys.readouterr().out
    )


def test_a_second_run_in_a_directory_is_refused(small, capsys):
    main, options = small
    assert main([*options, "--max-steps", "5"]) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "lock"}
    with RunLock() as lock:
        lock.take(Path("run"))
        assert main(["--run-dir", "run", "--resume", "auto"]) == 2
        assert "is training in --run-dir" in capsys.readouterr().err
        assert main(["--run-dir", "run", "--eval-only"]) == 0  # reading is free
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before
