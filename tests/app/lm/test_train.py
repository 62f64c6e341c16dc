"""The language-model scripts, run for real: three steps on the embedded corpus."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.tensorboard import KEYS
from dni_seq.distributed.process_group import Ranks
from tests.events import points
from tests.nests import assert_same
from tests.paths import SCRIPTS

TINY = ("--embed", "8", "--hidden", "8", "--layers", "2", "--dropout", "0.5", "--bptt", "4", "--batch-size", "64")


MEASURED = ("--regress-every", "1", "--schedule", "constant")
"""In six steps the default would hardly measure a message. A rate that falls depends on the run's length."""


def start(script: str, *arguments: str, cwd: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    process = start(script, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of six steps with validations at 2, 4 and 6, never stopped."""
    cwd = tmp_path_factory.mktemp("trained")
    result = call("train_lm", *TINY, *MEASURED, "--max-steps", "6", "--eval-every", "2", "--run-dir", "run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "run"


def test_a_run_leaves_everything_it_promises(trained):
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("events.")}
    assert len(events) == 1
    assert names - events == {
        "config.json",
        "metrics.csv",
        "tokenizer.json",
        "summary.json",
        "lock",
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "checkpoints/best.pt",
    }
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (6, 6 * 4 * 64)
    assert (summary["dataset"], summary["synthesizer"], summary["seed"]) == ("pydoc", "multi-horizon", 1111)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert summary["peak_memory_mb"] > 50
    assert summary["process_seconds"] > 0
    for split in ("valid", "test"):
        score = summary[split]
        assert score["ppl"] == pytest.approx(torch.tensor(score["loss"]).exp().item(), rel=1e-5)
        # A character is a token here, so bits a character are nats a token over ln 2.
        assert score["bpc"] == pytest.approx(score["loss"] / 0.6931471805599453)


def test_the_curves_have_the_keys_of_the_design(trained):
    curves = points(trained)
    # Fidelity is measured only where it is asked for. Two horizons have a curve each of what is told of each.
    of_all = {re.sub("/horizon_[12]$", "", key) for key in curves}
    assert of_all == {key for key in KEYS if not key.startswith(("fidelity/", "train/lr", "train/updates"))}
    for end in ("/horizon_1", "/horizon_2"):
        assert {key for key in curves if key.endswith(end)} == {
            f"synthetic/{name}{end}" for name in ("cosine", "r2", "scale")
        }
    for key in ("train/loss", "train/perplexity", "gradient/norm", "synthetic/loss", "speed/tokens_per_second"):
        assert list(curves[key]) == [6]
    assert list(curves["valid/loss"]) == [2, 4, 6]
    summary = json.loads((trained / "summary.json").read_text())
    assert curves["test/loss"] == {6: pytest.approx(summary["test"]["loss"])}
    assert summary["valid"]["loss"] == pytest.approx(min(curves["valid/loss"].values()))
    tokens, seconds, process_seconds, bpc = zip(*summary["curve"], strict=True)
    assert tokens == (512, 1024, 1536)
    assert bpc == pytest.approx(list(curves["valid/bpc"].values()))
    for name, times in (("seconds", seconds), ("process_seconds", process_seconds)):
        assert 0 < times[0] < times[1] < times[2] < summary[name]
        assert times == pytest.approx(list(curves[f"progress/{name}"].values()))


@pytest.mark.parametrize("synthesizer", ["none", "multi-horizon"])
def test_three_steps_and_three_more_are_six(trained, synthesizer, tmp_path):
    whole = trained
    options = ("--eval-every", "2", "--run-dir", "run", "--resume", "auto")
    if synthesizer == "none":
        whole = tmp_path / "whole"
        arguments = ("--max-steps", "6", "--eval-every", "2", "--run-dir", "whole", "--synthesizer", "none")
        assert call("train_lm", *TINY, *MEASURED, *arguments, cwd=tmp_path).returncode == 0
    begun = (*TINY, *MEASURED, *options, "--max-steps", "3", "--synthesizer", synthesizer)
    first = call("train_lm", *begun, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = call("train_lm", *options, "--max-steps", "6", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    one, two = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, tmp_path / "run"))
    assert_same(one["trainer"], two["trainer"], "trainer")
    assert_same(one["log"], two["log"], "log")
    assert_same(one["stream"], two["stream"], "stream")
    assert_same(one["random"], two["random"], "random")
    assert [point[0] for point in two["counters"]["curve"]] == [512, 768, 1024, 1536]  # the first session's end is a point
    assert two["counters"]["process_seconds"] > two["counters"]["curve"][1][2]
    curves, resumed = points(whole), points(tmp_path / "run")
    of_the_machine = {"speed/tokens_per_second", "memory/peak_mb", "progress/seconds", "progress/process_seconds"}
    for key in set(curves) - of_the_machine:
        # The first session ended at step 3, which gave it a point of its own; all others are equal, bit for bit.
        assert resumed[key] == curves[key] | {step: value for step, value in resumed[key].items() if step == 3}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_with_a_checkpoint(tmp_path, number, status):
    process = start("train_lm", *TINY, "--max-steps", "1000000", "--run-dir", "run", cwd=tmp_path)
    run = tmp_path / "run"
    # The event file is opened when everything is ready, just before the first step.
    while not list(run.glob("events.*")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    assert "--resume auto" in out
    assert not (run / "summary.json").exists()
    steps = load_checkpoint(run / "checkpoints" / "last.pt")["trainer"]["steps"]
    assert f"stopped at step {steps}" in out
    points(run)


def test_a_signal_that_comes_while_ranks_agree_is_not_lost(tmp_path, monkeypatch):
    """The ranks compare what they have received at every step; the time they wait there is when most signals come."""
    steps = []

    def all_reduce_max(self, *numbers):
        steps.append(numbers)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return list(numbers)

    monkeypatch.setattr(Ranks, "all_reduce_max", all_reduce_max)
    status = importlib.import_module("dni_seq.app.lm.train").main(
        [*TINY, "--max-steps", "50", "--run-dir", str(tmp_path / "run")]
    )
    assert status == 143
    assert len(steps) == 4  # the step after it


def test_evaluation_and_samples_from_the_run_directory_alone(trained, tmp_path):
    summary = json.loads((trained / "summary.json").read_text())
    before = snapshot(trained)
    result = call("evaluate_lm", str(trained), cwd=tmp_path)
    assert result.stdout.startswith(f"test: loss {summary['test']['loss']:.4f} nats per token")
    result = call("train_lm", "--eval-only", "--run-dir", str(trained), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"ppl {summary['valid']['ppl']:.2f}" in result.stdout
    fewer = call("train_lm", "--eval-only", "--run-dir", str(trained), "--eval-tokens", "64", cwd=tmp_path)
    assert f"ppl {summary['valid']['ppl']:.2f}" not in fewer.stdout, "only the split's beginning is scored"
    sample = ("sample_lm", str(trained), "--prompt", "The", "--length", "40", "--top-k", "5", "--temperature", "0.5")
    first = call(*sample, "--seed", "3", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The")
    assert len(first.stdout) == len("The") + 40 + 1
    assert call(*sample, "--seed", "4", cwd=tmp_path).stdout != first.stdout
    assert snapshot(trained) == before


def test_bad_input_is_one_line_and_status_2(trained, tmp_path):
    """Every case in one process, because loading torch takes most of the time."""
    (tmp_path / "short.txt").write_text("abc\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 1000)
    (tmp_path / "utf16.txt").write_text("some words\n" * 1000, encoding="utf-16")
    (tmp_path / "blank.txt").write_text("\n" * 1000)
    (tmp_path / "table.csv").write_text("id,text\n1,some words\n" * 1000)
    (tmp_path / "null.jsonl").write_text('{"text": "some words"}\n{"text": null}\n' * 1000)
    (tmp_path / "long.txt").write_text("some words\n" * 1000)
    (tmp_path / "text.pt").write_text("no checkpoint")
    before = snapshot(trained)
    cases = {
        ("--bptt", "0"): "--bptt must be 1 or more",
        ("--hidden", "-3"): "--hidden must be 1 or more",
        ("--batch-size", "0"): "--batch-size must be 1 or more",
        ("--dropout", "1"): "--dropout must be at least 0 and below 1",
        ("--lr", "nan"): "--lr must be above 0",
        ("--nonsense",): "unrecognized arguments: --nonsense",
        ("--dataset", "pbt"): "ptb",
        ("--dataset", "ptb", "--data-file", "x"): "exclude each other",
        ("--data-file", "missing.txt"): "missing.txt",
        ("--data-file", "empty.txt"): "empty.txt",
        ("--data-file", "latin.txt"): "UTF-8",
        ("--data-file", "short.txt"): "short.txt",
        ("--data-file", "utf16.txt"): "UTF-16",
        ("--data-file", "blank.txt"): "no visible character",
        ("--data-file", "long.txt", "--valid-file", "blank.txt"): "no visible character",
        ("--data-file", "table.csv"): "convert it",
        ("--data-file", "null.jsonl"): "line 2 has no text",
        ("--data-file", "long.txt", "--text-column", "text"): "has no columns",
        ("--data-file", "~/no such folder/*.txt"): "no such file",
        ("--batch-size", "1000000"): "--batch-size",
        ("--batch-size", "1000000000", "--document-reset"): "--batch-size",
        ("--bptt", "1000000000"): "--bptt 1000000000 is too large",
        ("--bptt", "1000000000", "--document-reset"): "--bptt 1000000000 is too large",
        ("--lookahead", "1000000000"): "--lookahead 1000000000 is too large",
        ("--horizons", "1000000000"): "--horizons 1000000000 is too large",
        ("--synthesizer", "exact", "--exact-steps", "1000000000"): "--exact-steps 1000000000 is too large",
        ("--tokenizer", "letters"): "invalid choice: 'letters'",
        ("--tied", "--embed", "8"): "embed equal to hidden",
        ("--tied", "--embed", "8", "--hidden", "8", "--sparse-embedding"): "exclude each other",
        ("--device", "nothing"): "--device nothing",
        ("--resume", "text.pt"): "not a checkpoint",
        ("--resume", "auto"): "needs --run-dir",
        ("--resume", "."): "is a directory without a run: give RUN_DIR",
        ("--eval-only",): "--eval-only needs --run-dir, the directory of a run that has a checkpoint",
        ("--eval-only", "--run-dir", "typo"): "--run-dir typo holds none",
        ("--eval-only", "--dry-run"): "remove one of them",
        ("--config", "missing.json"): "cannot read the configuration",
        ("--run-dir", str(trained)): "holds a run already: add --resume auto",
        ("--run-dir", str(trained), "--hidden", "9"): "another configuration (--hidden 8 there, 9 here)",
        ("--run-dir", str(trained), "--resume", "auto", "--seed", "2"): "--seed 1111 there, 2 here",
        ("--run-dir", str(tmp_path)): "holds files but no run",
    }
    program = (
        "import runpy, sys\n"
        "main = runpy.run_path(sys.argv[1])['main']\n"
        f"for arguments in {list(cases)!r}:\n"
        "    try:\n"
        "        status = main([*arguments])\n"
        "    except SystemExit as end:\n"
        "        status = end.code\n"
        "    print(f'status {status}', file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPTS / "train_lm.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    lines = result.stderr.splitlines()
    assert lines[1::2] == ["status 2"] * len(cases)
    for (arguments, message), line in zip(cases.items(), lines[::2], strict=True):
        assert re.match(r"train_lm: error: .", line), arguments
        assert message in line, arguments
    assert snapshot(trained) == before
    assert not (tmp_path / "runs").exists()


def test_options_reach_a_run_through_its_config(trained, tmp_path):
    arguments = ("--config", str(trained / "config.json"), "--max-steps", "3", "--eval-every", "5", "--seed", "7")
    result = call("train_lm", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("pydoc-char-lstm2x8-multi-horizon-T4-seed7-")
    config, earlier = (json.loads((path / "config.json").read_text()) for path in (run, trained))
    changed = {"max_steps": 3, "eval_every": 5, "seed": 7}
    assert config == earlier | changed


def test_ptb_from_local_files(tmp_path):
    if "DNI_SEQ_DATA" not in os.environ or not Path(os.environ["DNI_SEQ_DATA"], "ptb", "ptb.train.txt").is_file():
        pytest.skip("DNI_SEQ_DATA names no directory with ptb/ptb.train.txt")
    arguments = ("--dataset", "ptb", "--embed", "8", "--hidden", "8", "--max-steps", "3", "--run-dir", "run")
    result = call("train_lm", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["tokenizer"], summary["vocabulary"], summary["bptt"]) == ("word", 10_000, 5)
    # Three steps from scratch: below the uniform 10,000, above what a trained model reaches.
    assert 1000 < summary["test"]["ppl"] < 10_000
