"""--dry-run says what a run would be, and presets are the settings they are named after."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dni_seq.app.lm import dry_run
from dni_seq.app.lm import train as train_lm
from dni_seq.app.lm.options import DEFAULTS, PRESETS, LanguageModelOptions
from dni_seq.app.runs.options import build

SIZES = ("--embed", "6", "--hidden", "8", "--layers", "2", "--bptt", "4", "--batch-size", "64", "--eval-tokens", "4096")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(dry_run, "SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)


def test_it_says_shapes_parameters_memory_and_time_and_writes_nothing(capsys, tmp_path):
    line = [*SIZES, "--synthesizer", "multi-horizon", "--synthesizer-hidden", "16", "--horizons", "2", "--dry-run"]
    assert train_lm.main([*line, "--epochs", "3", "--run-dir", "run"]) == 0
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    vocabulary = int(re.search(r"vocabulary (\d+)", text)[1])
    assert "inputs and targets [T, B]: [4, 64]\n" in text
    assert f"outputs [T, B, V]: [4, 64, {vocabulary}]\n" in text
    assert "state, each [L, B, H]: [2, 64, 8], [2, 64, 8]\n" in text
    assert "lookahead [m, B]: [8, 64]\n" in text
    # Four gates in each layer, from 6 inputs and 8 units, with two biases; the projection has a bias too.
    rnn = 4 * 8 * (6 + 8 + 2) + 4 * 8 * (8 + 8 + 2)
    parameters = 6 * vocabulary + rnn + 9 * vocabulary
    assert f"parameters of the model: {parameters:,} (embedding {6 * vocabulary:,}, rnn {rnn:,}, " in text
    assert "parameters of the synthesizer: " in text
    assert re.search(rf"^model.rnn +8 \({rnn:,} values\) ", text, re.MULTILINE)
    assert re.search(r"^model.projection +2 .* model's +window$", text, re.MULTILINE)
    assert re.search(r"^model.rnn .* model's +window \+ message$", text, re.MULTILINE)
    assert re.search(r"^synthesizer.*synthesizer's +own loss$", text, re.MULTILINE)
    assert int(re.search(r"memory: ([\d,]+) MiB at its peak", text)[1].replace(",", "")) > 50
    step = float(re.search(r"speed: ([\d.]+) ms per step", text)[1])
    steps = int(re.search(r"an epoch of ([\d,]+) steps", text)[1].replace(",", ""))
    minutes, seconds = re.search(r"^time: (?:(\d+) min )?(\d+) s for", text, re.MULTILINE).groups(default="0")
    assert 60 * int(minutes) + int(seconds) == pytest.approx(steps * step / 1000, abs=0.6 + 0.06 * steps / 1000)
    assert re.search(r"total time: .* for 3 epochs", text)


def test_it_refuses_what_a_run_would_refuse(capsys):
    assert train_lm.main(["--dry-run", "--tied", "--embed", "8", "--hidden", "9"]) == 2
    assert "embed equal to hidden" in capsys.readouterr().err


def test_durations():
    assert [dry_run.duration(seconds) for seconds in (0.4, 59, 61, 3599.6, 7322)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 2 min",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built(name):
    options = build(LanguageModelOptions, PRESETS[name])
    assert dataclasses.asdict(options).items() >= PRESETS[name].items()


def test_presets_are_the_known_settings():
    """dni-pytorch's example and Zaremba et al. 2014, section 4.1, which sums a window's losses where we take the mean."""
    names = ("layers", "hidden", "dropout", "bptt", "batch_size", "epochs")
    assert [PRESETS["seed"][name] for name in (*names[:-1], "clip")] == [2, 200, 0.2, 5, 20, 0.25]
    published = {"small": ([2, 200, 0.0, 20, 20, 13], 5, 0.5, 4), "medium": ([2, 650, 0.5, 35, 20, 39], 5, 1 / 1.2, 6)}
    for name, (sizes, clip, decay, after) in published.items():
        preset = PRESETS[name]
        assert [preset[key] for key in names] == sizes
        assert (preset["lr"] / preset["bptt"], preset["clip"] * preset["bptt"]) == pytest.approx((1.0, clip))
        assert [preset[key] for key in ("optimizer", "schedule", "decay", "decay_after")] == ["sgd", "step", decay, after]
    assert PRESETS["char"].items() >= DEFAULTS["char"].items()


def test_a_preset_reaches_the_run(capsys):
    smaller = ["--embed", "6", "--hidden", "8", "--vocab-size", "50", "--eval-tokens", "2048"]
    assert train_lm.main(["--preset", "medium", *smaller, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "by word" in text
    assert "inputs and targets [T, B]: [35, 20]" in text
    assert "for 39 epochs" in text
