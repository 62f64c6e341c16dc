"""The examples, run for real with fewer steps: what they print has to show what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """A function that runs an example's main in an empty directory and gives the numbers of each line that it prints."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def of(name: str, *arguments: int) -> list[list[float]]:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)
        lines = capsys.readouterr().out.splitlines()
        return [[float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", line)] for line in lines]

    yield of
    torch.set_num_threads(threads)


def test_every_example_is_tested():
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.stem}"' in tests


def test_custom_rnn_learns_and_leaves_a_curve(run, tmp_path):
    points = run("custom_rnn", 480)
    assert [step for step, *_ in points] == [80, 160, 240, 320, 400, 480]
    plain, synthetic = [[row[column] for row in points] for column in (1, 2)]
    assert synthetic[-1] < 0.5 < 0.8 < synthetic[0]  # the full length ends near 0.04
    assert synthetic[-1] < 0.9 * plain[-1]
    assert list((tmp_path / "runs" / "custom_rnn").glob("events.*"))
    assert len((EXAMPLES / "custom_rnn.py").read_text().splitlines()) <= 75


def test_custom_synthesizer_sees_more_than_the_state(run):
    (truncated,), (plain, state_alone), (loss, reads_back) = run("custom_synthesizer", 150)
    assert reads_back > 0.15
    assert abs(state_alone) < 0.1
    # Uniform over the characters is 4.6 nats; in so short a run a synthesizer brings little.
    assert 2 < truncated < 3.6
    assert plain == pytest.approx(truncated, abs=0.2)
    assert loss == pytest.approx(truncated, abs=0.2)


def test_time_series_messages_get_truer_with_what_is_known(run):
    (truncated,), (future_model,), *fitted = run("time_series", 120)
    unknown, inputs, both = (row[-1] for row in fitted)
    assert unknown < inputs < both
    assert future_model < truncated


def test_recurrent_policy_learns_to_remember(run):
    points = run("recurrent_policy", 210)
    assert [(window, update) for window, update, _ in points[:6]] == [
        (20, update) for update in (35, 70, 105, 140, 175, 210)
    ]
    assert points[0][-1] < 80  # chance is 50
    assert points[5][-1] > 95
    assert points[-1][-1] < 80  # truncated BPTT cannot assign the cue
    assert len((EXAMPLES / "recurrent_policy.py").read_text().splitlines()) <= 60


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of Lightning, a name that torch has deprecated
def test_lightning_loop_resumes_and_learns(run):
    pytest.importorskip("lightning")
    (windows, truncated), (_, synthetic) = run("lightning_loop", 160)
    assert windows == 160
    # Uniform over the 92 characters is 4.5 nats.
    assert 2 < truncated < 3.6
    assert synthetic == pytest.approx(truncated, abs=0.2)
    assert synthetic != truncated


def test_datasets_windows_learn(run):
    pytest.importorskip("tokenizers")
    (truncated,), (synthetic,) = run("datasets_windows", 160)
    assert 10 < truncated < 40  # perplexity; uniform is 92
    assert synthetic == pytest.approx(truncated, rel=0.2)
    assert synthetic != truncated


def test_pretrained_weights_go_there_and_back(run, tmp_path):
    pytest.importorskip("safetensors")
    (plain, ours), (plain_after, ours_after) = run("pretrained_weights", 60)
    assert plain == ours
    assert plain_after == ours_after < 0.9 * ours
    assert (tmp_path / "runs" / "pretrained_weights" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["lightning_loop", "datasets_windows", "pretrained_weights"])
def test_bridges_fit_on_a_page(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


def test_bare_interfaces_train_in_time_and_in_depth(run):
    (_, cut), (_, injected), (plain,), (decoupled,) = run("bare_interfaces", 120, 150)
    # Uniform over the 90 characters is 4.5 nats.
    assert 2 < cut < 3
    assert injected == pytest.approx(cut, abs=0.2)
    assert plain > 90
    assert decoupled > 90


def test_streaming_sensor_gains_from_a_synthesizer(run):
    (plain, *_), (synthetic, *_) = run("streaming_sensor", 450)
    assert synthetic < 0.8 * plain < 0.2  # the temperature's variance is above 1
