"""What a run says at its start and at its end, and the values in force that it leaves."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dni_seq.app.build.backpropagation_options import BackpropagationOptions
from dni_seq.app.build.credit_options import CreditOptions
from dni_seq.app.build.method import brief_method, in_words
from dni_seq.app.lm import evaluate as evaluate_lm
from dni_seq.app.lm import sample as sample_lm
from dni_seq.app.lm import train as train_lm
from dni_seq.app.lm.options import LanguageModelOptions, resolve_options
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.resume import saved_options
from dni_seq.streams import load_tokenizer, open_corpus
from tests.app.runs.test_loading import hooked
from tests.events import event_accumulator
from tests.paths import SCRIPTS

TINY = ("--embed", "8", "--hidden", "8", "--bptt", "4", "--batch-size", "64", "--eval-tokens", "2048")

pytestmark = pytest.mark.usefixtures("one_thread")


def train(capsys, *arguments: object) -> list[str]:
    """The lines that a run prints on stdout."""
    capsys.readouterr()
    assert train_lm.main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_begins_with_its_text_its_model_and_its_method(tmp_path, capsys):
    run = tmp_path / "run"
    lines = train(capsys, *TINY, "--max-steps", "2", "--run-dir", run, "--layers", "2")
    summary = json.loads((run / "summary.json").read_text())
    vocabulary = load_tokenizer(run / "tokenizer.json").vocabulary_size
    text = sum(map(len, open_corpus().train))
    tokens = (text // 64 - 1) * 64
    expected = [
        f"text: pydoc, {tokens:,} characters to train on; a vocabulary of {vocabulary} characters",
        f"model: LSTM, 2 layers of 8 units, {in_words(summary['parameters'])} parameters",
        "method: synthetic gradients by multi-horizon, windows of T = 4, 2 horizons, lookahead 8; "
        f"device cpu; run directory {run}",
    ]
    assert lines[:3] == expected
    assert train(capsys, "--resume", run, "--max-steps", "3")[:3] == expected


def test_the_lines_name_what_was_chosen(tmp_path, capsys):
    choices = ("--tokenizer", "word", "--vocab-size", "500", "--model", "gru", "--layers", "1", "--synthesizer", "none")
    text, model, how = train(capsys, *TINY, *choices, "--max-steps", "1", "--run-dir", tmp_path / "run")[:3]
    assert text.endswith(" words to train on; a vocabulary of 500 words")
    assert model.startswith("model: GRU, 1 layer of 8 units, ")
    assert how == f"method: truncated BPTT, windows of T = 4; device cpu; run directory {tmp_path / 'run'}"


def test_a_method_in_words():
    def words(**options: object) -> str:
        given = {name: options.pop(name) for name in ("backward_steps", "checkpoint_every", "traces") if name in options}
        return brief_method(CreditOptions(**options).resolve(5), BackpropagationOptions(**given))

    assert words(synthesizer="basic") == "synthetic gradients by basic, windows of T = 5"
    assert words(synthesizer="exact", exact_steps=7) == "synthetic gradients by exact, windows of T = 5, lookahead 7"
    assert words(horizons=1) == "synthetic gradients by multi-horizon, windows of T = 5, 1 horizon, lookahead 5"
    inside = words(message_every=2, message_at_end=False, horizons=1)
    assert inside.endswith(", 1 horizon, lookahead 5, messages every 2 steps, not at the end")
    past = "synthetic gradients by multi-horizon, windows of T = 5, of the last 9 inputs"
    assert words(predict="past", predict_steps=9) == past
    plain = words(synthesizer="none", backward_steps=20, checkpoint_every=1)
    assert plain == "truncated BPTT, windows of T = 5, backward over 20 steps, recomputed in chunks of 1 step"
    assert words(synthesizer="none", traces="factored") == "truncated BPTT, windows of T = 5, factored traces"


def test_counts_in_words():
    counts = [in_words(count) for count in (870, 1000, 8_700, 9_960, 363_112, 1_234_567, 66_000_000, 2 * 10**9)]
    assert counts == ["870", "1.0 K", "8.7 K", "10 K", "363 K", "1.2 M", "66 M", "2.0 G"]


def test_the_lines_come_before_torchs_compiler_is_imported(tmp_path):
    """The optimizers import it, which takes as long as torch itself."""
    arguments = [str(SCRIPTS / "train_lm.py"), *TINY, "--run-dir", "run"]
    environment = hooked(tmp_path, then="os._exit(7)", module="torch._dynamo")
    result = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    starts = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert starts == ["train_lm", "text", "model", "method", "import of torch._dynamo"]
    assert (result.returncode, result.stderr) == (7, "")


@pytest.mark.parametrize("called", ["script", "dni-seq"])
def test_a_run_ends_with_the_next_commands(called, tmp_path, capsys, monkeypatch):
    """And they work."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "train_lm.py") if called == "script" else "dni-seq train"])
    run = tmp_path / "a run"
    lines = train(capsys, *TINY, "--max-steps", "2", "--run-dir", run)
    quoted = shlex.quote(str(run))

    def command(name: str, script: str) -> str:
        return f"python {SCRIPTS / script}.py" if called == "script" else f"dni-seq {name}"

    further = f"--resume {quoted} --max-steps 4"
    assert lines[-3:] == [
        f"to train on (the learning rate rises to what a run of that length has): {command('train', 'train_lm')} {further}",
        f"to sample: {command('sample', 'sample_lm')} {quoted}; to score: {command('evaluate', 'evaluate_lm')} {quoted}",
        f"to compare: {command('compare', 'compare_runs')} {quoted} OTHER_RUN; curves: tensorboard --logdir {tmp_path}",
    ]
    if called == "script":
        return
    train(capsys, *shlex.split(further))
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert sample_lm.main(shlex.split(quoted)) == evaluate_lm.main(shlex.split(quoted)) == 0


def test_the_limit_that_is_there_is_raised(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i % 97}\n" for i in range(40)))
    own = ("--data-file", tmp_path / "text.txt", "--hidden", "8", "--embed", "8", "--batch-size", "2")
    assert "--epochs 2" in train(capsys, *own, "--epochs", "1", "--run-dir", tmp_path / "epochs")[-3]
    assert "--max-tokens 128" in train(capsys, *own, "--max-tokens", "64", "--run-dir", tmp_path / "tokens")[-3]


@pytest.mark.parametrize("name", ["none", "multi-horizon"])
def test_a_run_leaves_the_values_in_force(two_runs, name):
    """In its summary and in TensorBoard's table; config.json keeps what follows from other options open."""
    run = RunDirectory(two_runs / name)
    options = saved_options(LanguageModelOptions, run)
    in_force = json.loads(run.summary.read_text())["in_force"]
    config = json.loads(run.config.read_text())
    assert in_force.keys() == config.keys()
    resolved = dataclasses.asdict(options.resolve(options.bptt))
    if name == "none":
        assert {each for each in ("horizons", "fit", "discount", "synthesizer_lr") if in_force[each] is not None} == set()
    else:
        for each in ("fit", "discount", "synthetic_scale", "horizons", "lookahead", "regress_every", "future_units"):
            assert in_force[each] == resolved[each]
        assert (in_force["fit"], in_force["discount"], in_force["synthetic_scale"]) == ("future", 1.0, 1.0)
        assert in_force["exact_steps"] is None, "an option without effect"
        assert [config[each] for each in ("fit", "discount", "synthetic_scale")] == [None] * 3
    assert (in_force["synthesizer"], in_force["dataset"], in_force["device"]) == (name, "pydoc", "cpu")
    assert (in_force["vocab_size"], in_force["eval_every"]) == (load_tokenizer(run.tokenizer).vocabulary_size, 20)
    assert table(run.path).items() >= {each: "" if value is None else str(value) for each, value in in_force.items()}.items()


def table(run: Path) -> dict[str, str]:
    """The rows of the table "config" in TensorBoard."""
    events = event_accumulator.EventAccumulator(str(run))
    events.Reload()
    text = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {name: value for name, value, *_ in ([*row, ""] for row in rows)}


def test_defaults_in_force_are_not_pinned_by_a_configuration(two_runs, tmp_path, capsys):
    """A new run from a run's config.json with another window derives its own."""
    config = two_runs / "multi-horizon" / "config.json"
    plain = {name: value for name, value in json.loads(config.read_text()).items() if name not in ("horizons", "lookahead")}
    (tmp_path / "config.json").write_text(json.dumps(plain | {"eval_every": None}))
    train(capsys, "--config", tmp_path / "config.json", "--max-steps", "1", "--run-dir", tmp_path / "first")
    change = ("--bptt", "1", "--synthesizer", "multi-horizon", "--max-steps", "1")
    train(capsys, "--config", tmp_path / "first" / "config.json", *change, "--run-dir", tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "summary.json").read_text())["in_force"] for name in ("first", "second"))
    assert (first["horizons"], first["lookahead"]) == (2, 8)
    assert (second["horizons"], second["lookahead"]) == (4, 4)
    assert first["synthetic_scale"] == 1.0
    assert second["synthetic_scale"] == 0.5
    assert second["eval_every"] > first["eval_every"]
    corpus = open_corpus()
    assert resolve_options(LanguageModelOptions(bptt=1), corpus).resolve(1).synthetic_scale == 0.5


@pytest.mark.parametrize(("tokenizer", "shown"), [("word", True), ("char", False)])
def test_perplexity_per_word_is_for_words(tokenizer, shown, tmp_path, capsys):
    run = tmp_path / "run"
    lines = train(capsys, *TINY, "--tokenizer", tokenizer, "--max-steps", "1", "--run-dir", run)
    assert evaluate_lm.main([str(run)]) == 0
    lines += capsys.readouterr().out.splitlines()
    scores = [line for line in lines if " nats per token" in line]
    assert len(scores) == 3
    assert all(("ppl per word" in line) == shown for line in scores)
    assert json.loads((run / "summary.json").read_text())["test"]["word_ppl"] > 1
