"""Optimizer, schedule, accumulation and patience of the command: each option reaches the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dni_seq as dni
from dni_seq.app.build.optimization_options import OptimizationOptions, optimization_remarks
from dni_seq.app.lm import build as lm
from dni_seq.app.lm import train as train_lm
from dni_seq.app.lm.build_schedule import build_schedule
from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import LanguageModelOptions, resolve_options
from dni_seq.app.lm.training import LanguageModelRun
from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.options import flag
from dni_seq.models.cells import TRACE_DECAY
from dni_seq.streams import open_corpus
from tests.events import points

TINY = ("--embed", "4", "--hidden", "6", "--layers", "1", "--bptt", "4", "--batch-size", "64", "--eval-tokens", "200")
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command and returns its directory. Every step is a point of the curves."""
    monkeypatch.setattr(LanguageModelRun, "LOG_EVERY", 1)

    def call(*arguments: str, status: int = 0, name: str = "run") -> Path:
        assert train_lm.main([*TINY, "--run-dir", str(tmp_path / name), *arguments]) == status
        return tmp_path / name

    return call


def trainer_of(**given):
    tiny = {"embed": 4, "hidden": 6, "layers": 1, "bptt": 4, "batch_size": 3, "synthesizer": "none"}
    options = resolve_options(LanguageModelOptions(**tiny | given), open_corpus())
    return build_trainer(options, lm.build_model(options, 9, CPU), CPU)


def text_of(directory: Path, lines: int) -> str:
    path = directory / "text.txt"
    path.write_text("".join(f"line {i} of {i * i % 97} words\n" for i in range(lines)))
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("adam", torch.optim.Adam, {"weight_decay": 0.25}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.25}),
        ("sgd", torch.optim.SGD, {"weight_decay": 0.25, "momentum": 0.5}),
    ],
)
def test_the_optimizer_is_pytorchs_with_the_given_settings(name, kind, settings):
    optimizer = trainer_of(optimizer=name, lr=0.125, **settings).optimizer
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in settings} == settings
    assert (group["lr"], group["fused"]) == (0.125, True)
    assert trainer_of().optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_makes_the_steps_of_the_plain_formula(momentum):
    """By hand in float64: v <- m v + (g + d w), w <- w - lr v, with the gradient clipped first."""
    given = {"lr": 0.5, "momentum": momentum, "weight_decay": 0.01, "clip": 0.05, "dtype": "float64"}
    trainer = trainer_of(optimizer="sgd", **given)
    model = trainer.model
    text = torch.arange(15).view(5, 3) % 9
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        result = trainer.step(text[:4], text[1:])
        gradients = [p.grad for p in model.parameters()]  # clipped in place in float64
        assert result.gradient_norm > 0.05
        for old, new, v, gradient in zip(before, model.parameters(), velocity, gradients, strict=True):
            v.mul_(momentum).add_(gradient + 0.01 * old)
            torch.testing.assert_close(new.detach(), old - 0.5 * v, rtol=1e-12, atol=1e-15)


def test_the_rate_of_a_run_is_a_curve(run):
    directory = run("--schedule", "linear", "--warmup", "2", "--lr", "0.01", "--max-steps", "8", "--synthesizer", "none")
    shares = [1.0, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]  # of the update after each step
    assert points(directory)["train/lr"] == pytest.approx(dict(enumerate((0.01 * s for s in shares), start=1)), rel=1e-6)


def test_a_constant_rate_has_no_curve(run):
    assert "train/lr" not in points(run("--schedule", "constant", "--max-steps", "2", "--synthesizer", "none"))


@pytest.mark.parametrize(("choice", "rate"), [("follow", 1e-3 / 2), ("constant", 1e-3)])
def test_the_synthesizer_follows_unless_told_otherwise(run, choice, rate):
    directory = run("--schedule", "linear", "--max-steps", "4", "--eval-every", "2", "--synthesizer-schedule", choice)
    saved = load_checkpoint(directory / "checkpoints" / "previous.pt")["trainer"]
    assert saved["steps"] == 2
    assert saved["synthesizer_optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(4e-3 / 2)


def test_step_counts_epochs_of_the_text(run, tmp_path):
    text = text_of(tmp_path, 300)
    directory = run("--data-file", text, "--epochs", "3", "--schedule", "step", "--decay", "0.1", "--synthesizer", "none")
    epoch = json.loads((directory / "summary.json").read_text())["steps"] // 3
    curve = points(directory)["train/lr"]
    assert [curve[epoch * n - 1] for n in (1, 2, 3)] == pytest.approx([2e-3, 2e-4, 2e-5])
    assert curve[epoch] == pytest.approx(2e-4)  # the rate of the next update


def test_plateau_watches_validations(run, capsys):
    """At a rate at which the loss soon rises."""
    directory = run("--optimizer", "sgd", "--lr", "500", "--clip", "0", "--schedule", "plateau", "--decay", "0.25",
                    "--max-steps", "12", "--eval-every", "2", "--synthesizer", "none")  # fmt: skip
    losses, curve = points(directory)["valid/loss"], points(directory)["train/lr"]
    best, expected = float("inf"), 500.0
    for step, loss in losses.items():
        expected *= 1 if loss < best else 0.25
        best = min(best, loss)
        assert curve.get(step + 1, expected) == pytest.approx(expected)
    assert expected < 500
    assert f"learning rate lowered to {500 / 4:.3g}" in capsys.readouterr().out


def test_patience_ends_a_run_and_resuming_with_more_trains_on(run, capsys):
    bad = (
        "--optimizer",
        "sgd",
        "--lr",
        "500",
        "--clip",
        "0",
        "--eval-every",
        "1",
        "--synthesizer",
        "none",
        "--max-steps",
        "40",
    )
    directory = run(*bad, "--patience", "3")
    steps = json.loads((directory / "summary.json").read_text())["steps"]
    losses = list(points(directory)["valid/loss"].values())
    assert steps < 40
    assert losses.index(min(losses)) == steps - 4
    assert "stopped by --patience 3" in capsys.readouterr().out
    run(*bad, "--patience", "3", "--resume", "auto")
    assert "to train on, raise --epochs, --max-steps, --max-tokens or --patience" in capsys.readouterr().out
    run(*bad, "--patience", "4", "--resume", "auto")
    assert json.loads((directory / "summary.json").read_text())["steps"] > steps


def test_accumulation_updates_once_in_n_windows(run):
    directory = run("--accumulate", "3", "--max-steps", "7", "--eval-every", "1", "--synthesizer", "none")
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["steps"], summary["updates"]) == (7, 2)
    assert points(directory)["train/updates"] == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}
    losses = points(directory)["valid/loss"]
    assert losses[1] == losses[2] != losses[3] == losses[4] == losses[5] != losses[6] == losses[7]
    assert load_checkpoint(directory / "checkpoints" / "last.pt")["trainer"]["gradients"]["collected"] == 1


def test_a_schedule_counts_updates(run):
    """Six windows by two are three updates."""
    directory = run("--accumulate", "2", "--schedule", "linear", "--max-steps", "6", "--lr", "0.03", "--synthesizer", "none")
    curve = list(points(directory)["train/lr"].values())
    assert curve == pytest.approx([0.03, 0.02, 0.02, 0.01, 0.01, 0.0], rel=1e-6)


def test_a_sparse_embedding_follows_the_schedule():
    trainer = trainer_of(sparse_embedding=True)
    options = resolve_options(
        LanguageModelOptions(schedule="linear", max_steps=4, sparse_embedding=True, bptt=4, batch_size=3), open_corpus()
    )
    corpus = open_corpus()
    stream = lm.open_training(corpus, lm.build_tokenizer(options, corpus), options)
    schedule = build_schedule(options, trainer, stream)
    text = torch.arange(15).view(5, 3) % 9
    trainer.step(text[:4], text[1:])
    schedule.after_window(trainer.updates, 0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([3e-3] * 2)


def test_long_windows_reach_the_trainer():
    trainer = trainer_of(checkpoint_every=2, backward_steps=12)
    assert (trainer.checkpoint_every, trainer.backward_windows) == (2, 3)
    assert (trainer_of().checkpoint_every, trainer_of().backward_windows) == (None, 1)


def test_backward_steps_train_otherwise_and_recomputed_activations_the_same(run):
    losses = {}
    for name, more in {"plain": [], "back": ["--backward-steps", "8"], "recomputed": ["--checkpoint-every", "2"]}.items():
        directory = run("--max-steps", "4", "--eval-every", "4", "--synthesizer", "none", "--lr", "0.1", *more, name=name)
        losses[name] = points(directory)["valid/loss"][4]
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["back"] != pytest.approx(losses["plain"], rel=1e-4)


def test_traces_and_their_decay_train_otherwise(run):
    losses, decays = [], []
    for i, more in enumerate(([], ["--traces", "factored"], ["--traces", "factored", "--trace-decay", "0.9"])):
        directory = run("--max-steps", "4", "--eval-every", "4", "--synthesizer", "none", "--lr", "0.1", *more, name=str(i))
        losses.append(points(directory)["valid/loss"][4])
        decays.append(json.loads((directory / "summary.json").read_text())["in_force"]["trace_decay"])
    assert len({round(loss, 5) for loss in losses}) == 3
    assert decays == [None, TRACE_DECAY, 0.9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "sgd"], "--optimizer sgd needs --lr"),
        (["--min-lr", "0.1", "--lr", "0.1"], "--min-lr 0.1 must be below --lr 0.1"),
        (["--sparse-embedding", "--optimizer", "adamw"], "--sparse-embedding works with --optimizer adam"),
        (
            ["--sparse-embedding", "--weight-decay", "0.1"],
            "--sparse-embedding works with --optimizer adam without --weight-decay",
        ),
        (["--warmup", "2", "--max-steps", "2"], "--warmup 2 must be shorter than the run, which has 2 updates"),
        (["--schedule", "linear", "--document-reset"], "give --max-steps or --max-tokens"),
        (["--decay", "1"], "--decay must be above 0 and below 1, got 1.0"),
        (["--backward-steps", "6"], "--backward-steps 6 must be a multiple of --bptt 4"),
        (["--backward-steps", "8", "--synthesizer", "exact"], "--backward-steps needs --synthesizer none"),
        (["--checkpoint-every", "2", "--synthesizer", "basic", "--auxiliary", "1"], "--checkpoint-every does not work with"),
        (["--message-every", "2", "--synthesizer", "exact"], "--message-every needs --synthesizer multi-horizon"),
        (["--message-every", "2", "--synthesizer", "multi-horizon", "--fit", "descent"], "--message-every needs"),
        (["--no-message-at-end", "--synthesizer", "multi-horizon"], "--no-message-at-end needs --message-every"),
        (["--trace-decay", "0.5"], "trace_decay needs factored traces, got traces=None: remove it"),
        (["--trace-decay", "1", "--traces", "factored"], "--trace-decay must be at least 0 and below 1, got 1.0"),
        (["--accumulate", "0"], "--accumulate must be 1 or more, got 0"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_options_that_contradict_each_other(run, arguments, message, dry, capsys, tmp_path):
    run("--synthesizer", "none", *arguments, *(["--dry-run"] if dry else []), status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def without_effect(**given) -> set[str]:
    lines = optimization_remarks(OptimizationOptions(**given))
    return {name for line in lines for name in line.split(": ")[1].split(", ")}


def test_options_without_effect_are_named(run, capsys):
    everything = {"momentum": 0.5, "min_lr": 1e-5, "decay": 0.7, "decay_after": 3}
    everything |= {"synthesizer_schedule": "constant", "scale_schedule": "follow"}
    names = {flag(name) for name in everything}
    assert without_effect(**everything) == names
    for schedule, used in {
        "linear": {"min_lr"},
        "cosine": {"min_lr"},
        "step": {"min_lr", "decay", "decay_after"},
        "plateau": {"min_lr", "decay"},
    }.items():
        used = {flag(name) for name in used | {"synthesizer_schedule", "scale_schedule", "momentum"}}
        assert without_effect(**everything, optimizer="sgd", schedule=schedule) == names - used
    assert without_effect(warmup=5, synthesizer_schedule="constant") == set()
    for more in ([], ["--dry-run"]):
        run(
            "--schedule",
            "constant",
            "--decay",
            "0.7",
            "--max-steps",
            "1",
            "--synthesizer",
            "none",
            *more,
            name=f"run{len(more)}",
        )
        assert "no effect with --schedule constant: --decay" in capsys.readouterr().out


def test_the_scale_of_messages_may_follow_the_learning_rate(run):
    """The share of step n of 8 is that of its learning rate, also after a resumption from step 4."""
    given = ("--synthetic-scale", "0.5", "--schedule", "linear", "--max-steps", "8", "--eval-every", "4")
    following = run(*given, "--scale-schedule", "follow", name="following")
    shares = [1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    expected = dict(enumerate((0.5 * share for share in shares), start=1))
    assert points(following)["synthetic/scale/horizon_1"] == pytest.approx(expected, rel=1e-6)
    constant = run(*given, name="constant")
    assert points(constant)["valid/loss"] != points(following)["valid/loss"]


def test_an_automatic_scale_does_not_follow(run, capsys):
    run("--synthetic-scale", "auto", "--schedule", "linear", "--max-steps", "4", "--scale-schedule", "follow", status=2)
    assert "--scale-schedule follow needs a number as --synthetic-scale" in capsys.readouterr().err


def test_a_trainer_takes_another_scale_between_two_steps():
    trainer = trainer_of(synthesizer="multi-horizon", bptt=2, synthetic_scale="0.5")
    assert trainer.synthetic_scale == 0.5
    trainer.synthetic_scale = 0.25
    text = torch.arange(18).view(6, 3) % 9
    ahead = dni.Lookahead(text[2:5], text[3:6], torch.ones(3, 3, dtype=torch.bool))
    padded = ahead.map(lambda tensor: torch.cat([tensor, tensor[:1]]))
    assert trainer.step(text[:2], text[1:3], lookahead=padded).synthetic.scale.tolist() == [0.25, 0.25]
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="synthetic_scale must be 0 or more"):
            trainer.synthetic_scale = wrong
    plain = trainer_of()
    assert plain.synthetic_scale is None
    with pytest.raises(ValueError, match="can be set for a trainer with a synthesizer"):
        plain.synthetic_scale = 0.5


WORDS = ("--tokenizer", "word", "--vocab-size", "50", "--synthesizer", "none")


def test_a_run_that_is_older_than_schedules_keeps_its_constant_rate(run, capsys):
    """Its config.json has no schedule. A new run from that file has a constant rate too."""
    directory = run(*WORDS, "--max-steps", "2", "--schedule", "constant")
    config = directory / "config.json"
    recorded = json.loads(config.read_text())
    del recorded["schedule"]
    config.write_text(json.dumps(recorded))
    run("--resume", "auto", "--max-steps", "4")
    assert json.loads(config.read_text())["schedule"] == "constant"
    assert "train/lr" not in points(directory)
    config.write_text(json.dumps(recorded))
    copied = run("--config", str(config), name="copied")
    assert json.loads((copied / "config.json").read_text())["schedule"] == "constant"
    capsys.readouterr()


def test_a_run_that_goes_on_in_longer_windows_keeps_its_rate(run, tmp_path):
    """Half of the text is read in windows of 4, so half of the rate is left for the other half, in windows of 8."""
    text = text_of(tmp_path, 4000)
    given = (*WORDS, "--data-file", text, "--lr", "0.01")
    whole = run(*given, "--epochs", "1", name="whole")
    epoch = json.loads((whole / "summary.json").read_text())["steps"]
    directory = run(*given, "--epochs", "2", "--max-steps", str(epoch))
    assert points(directory)["train/lr"][epoch] == pytest.approx(0, abs=1e-9)  # --max-steps decides the length
    directory = run(*given, "--epochs", "1", name="longer")
    run("--resume", "auto", "--epochs", "2", "--bptt", "8", name="longer")
    rates = points(directory)["train/lr"]
    steps = json.loads((directory / "summary.json").read_text())["steps"]
    assert steps - epoch == -(-epoch // 2)
    assert rates[epoch + 1] == pytest.approx(0.005, rel=0.03)
    assert rates[steps] == pytest.approx(0, abs=2e-4)
    assert load_checkpoint(directory / "checkpoints" / "last.pt")["schedule"]["ahead"] == pytest.approx(-epoch / 2, abs=1)


def test_a_run_whose_rate_has_fallen_says_that_more_text_raises_it(run, capsys):
    for schedule, note in (("linear", True), ("constant", False)):
        run(*WORDS, "--max-steps", "2", "--schedule", schedule, name=schedule)
        assert ("to train on (the learning rate rises" in capsys.readouterr().out) == note


def test_a_run_that_is_stopped_before_the_short_last_window_of_an_epoch_resumes_bit_identically(run, tmp_path):
    text = text_of(tmp_path, 400)
    given = ("--data-file", text, "--tokenizer", "char", "--bptt", "9", "--schedule", "constant", "--eval-every", "100")
    epoch = json.loads((run(*given, "--epochs", "1", name="epoch") / "summary.json").read_text())["steps"]
    limit = ("--max-steps", str(epoch + 3))
    whole = run(*given, *limit, name="whole")
    run(*given, "--max-steps", str(epoch - 1), name="stopped")
    stopped = run(*given, *limit, "--resume", "auto", name="stopped")
    one, two = (load_checkpoint(each / "checkpoints" / "last.pt")["trainer"]["model"] for each in (whole, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)
