"""The training of a language model: what its run measures, validates, samples and saves."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dni_seq.app.build.credit_options import default_values
from dni_seq.app.build.method import describe_method, unwritten_keys
from dni_seq.app.build.optimization_options import optimization_without_effect
from dni_seq.app.build.schedule import Schedule
from dni_seq.app.build.unused_options import credit_in_force
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_schedule import build_schedule, total_steps, windows_behind
from dni_seq.app.lm.build_trainer import cell_size, messages
from dni_seq.app.lm.evaluation import Score
from dni_seq.app.lm.options import DEFAULTS, LanguageModelOptions, as_given
from dni_seq.app.lm.scoring import check_held_out, held_out
from dni_seq.app.runs.checkpoint import CheckpointError, random_state, set_random_state
from dni_seq.app.runs.dashboard import Dashboard, changed_options, charts
from dni_seq.app.runs.invocation import command_line, curves_command
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.loop import Counters, Measured, TrainingRun, measurements
from dni_seq.app.runs.options import flag
from dni_seq.app.runs.resume import Plan
from dni_seq.app.runs.tensorboard import FINAL, LAYOUT, perplexity
from dni_seq.core.windows import Window
from dni_seq.credit.results import StepResult
from dni_seq.models.language_model import LanguageModel
from dni_seq.streams import Tokenizer, WindowStream
from dni_seq.streams.corpus import EMBEDDED

RANK_SEED = 1_000_003
"""Distance between the seeds of two ranks, so large that a rank's seed is not the seed of another run of a study."""


EVAL_EVERY_OF_STREAM = 1000
"""Steps between validations for streamed text, whose epoch length is unknown."""


@dataclass
class LanguageModelCounters(Counters):
    """The counters of a language-model run; part of its checkpoint.

    Attributes:
        curve: a row (tokens, seconds, process seconds, bits per character) for each validation. Both
            times include the validation itself.
        tokens: number of tokens trained on so far.
        best: lowest validation loss so far, None before the first.
        validated_at: step of the latest validation.
        since_best: number of validations since the best one.
    """

    tokens: int = 0
    best: float | None = None
    validated_at: int = 0
    since_best: int = 0

    def check(self) -> None:
        """Raises a TypeError if a counter has the wrong type, as in a checkpoint of another program."""
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, list if name == "curve" else (int, float)) and (name, value) != ("best", None):
                raise TypeError(f"the counter {name} has the invalid value {value!r}")


@dataclass(kw_only=True)
class LanguageModelRun(TrainingRun):
    """A training run of a language model.

    Attributes:
        HISTOGRAM_EVERY: steps between two histograms of the synthesizer's messages.
        tokenizer: converts the text to token ids.
        valid: the validation split.
        test: the test split.
        model: the model that `trainer` trains.
        schedule: changes the learning rate, None if it is constant.
        held_out: what identifies the texts of `valid` and `test` if they are local files; see `scoring.held_out`.
    """

    LIMIT: ClassVar[str] = "--epochs, --max-steps, --max-tokens or --patience"
    LOG_EVERY: ClassVar[int] = 50
    HISTOGRAM_EVERY: ClassVar[int] = 1000

    options: LanguageModelOptions
    stream: WindowStream
    counters: LanguageModelCounters = field(default_factory=LanguageModelCounters)
    tokenizer: Tokenizer
    valid: WindowStream
    test: WindowStream
    model: LanguageModel
    schedule: Schedule | None = field(init=False)
    held_out: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.schedule = build_schedule(self.options, self.trainer, self.stream)
        self.held_out = held_out(self.options, {"valid": self.valid, "test": self.test})

    @property
    def eval_every(self) -> int:
        """Steps between validations."""
        return self.options.eval_every or self.stream.windows_per_epoch or EVAL_EVERY_OF_STREAM

    def done(self) -> bool:
        """Returns whether the limit of steps, tokens, epochs or validations without improvement is reached."""
        limits = (
            (self.options.patience, self.counters.since_best),
            (self.options.max_steps, self.steps),
            (self.options.max_tokens, self.counters.tokens),
            (self.options.epochs, self.stream.epoch),
        )
        return any(limit is not None and reached >= limit for limit, reached in limits)

    def total_steps(self) -> int | None:
        """Returns the number of steps of the whole run, None if unknown."""
        return total_steps(self.options, self.stream)

    def measure(self, window: Window, result: StepResult) -> Measured:
        """Returns the measurements of a step. Each token that counts has the same weight in the averages."""
        tokens = window.targets.numel() if window.mask is None else int(window.mask.sum())
        return Measured({"train/loss": result.loss, **measurements(result)}, weight=tokens, tokens=tokens)

    def after_step(self, window: Window, result: StepResult, measured: Measured) -> None:
        """Counts the tokens of a step, and every `HISTOGRAM_EVERY` steps logs histograms of the synthesizer's messages."""
        self.counters.tokens += measured.tokens
        if self.schedule is not None:
            self.schedule.after_window(self.trainer.updates, self.stream.epoch)
        if self.steps % self.HISTOGRAM_EVERY == 0:
            for horizon, message in enumerate(messages(self.trainer, self.own_lanes(window).lookahead), start=1):
                self.log.histogram(self.steps, f"messages/horizon_{horizon}", message)

    def point(self) -> dict[str, float]:
        """Returns the speed, an LSTM's cell size, the rate if it has a schedule, the updates if gradients accumulate."""
        values = {} if self.schedule is None else {"train/lr": self.schedule.rate}
        if self.options.accumulate > 1:
            values["train/updates"] = self.trainer.updates
        return {**values, **cell_size(self.trainer), "speed/tokens_per_second": self.progress.tokens_per_second()}

    def figures(self) -> str:
        """Returns the loss since the last point as a short text."""
        loss = self.log.mean("train/loss")
        return f"loss {loss:.3f}, ppl {perplexity(loss):.1f}"

    def dashboard(self) -> Dashboard:
        """Returns the charts that this run fills, its method, and the options whose values are not the defaults."""
        options = self.options
        credit = options.resolve(options.bptt)
        moves = options.has_schedule and options.scale_schedule == "follow"
        absent = [*([] if options.model == "lstm" else ["state/"]), *([] if options.has_schedule else ["train/lr"])]
        defaults = default_values(options, as_given, DEFAULTS["char" if options.tokenizer == "char" else "word"])
        return Dashboard(
            charts(LAYOUT, [*unwritten_keys(credit, measures=self.probe.active, moves=moves), *absent]),
            describe_method(credit, options),
            FINAL,
            changed_options(options, defaults),
        )

    def evaluate(self) -> bool:
        """Validates every `eval_every` steps and prints a sample every `--sample-every`. Returns whether it validated."""
        due = self.steps % self.eval_every == 0
        if due:
            self.validate()
        if self.options.sample_every and self.steps % self.options.sample_every == 0:
            self.log.text(self.steps, "sample/regular", self.sample(self.model))
        return due

    def complete_curves(self) -> None:
        """Writes the points of the last step that are not written yet. Validates if this step was not validated."""
        super().complete_curves()
        if self.counters.validated_at != self.steps:
            self.validate()

    def validate(self) -> None:
        """Scores the validation split and saves the best checkpoint if the score is the best so far."""
        result = lm.score(self.model, self.valid, self.options, self.trainer.parallel)
        self.counters.validated_at = self.steps
        self.tick()
        names = ("tokens", "seconds", "process_seconds")
        progress = {name: getattr(self.counters, name) for name in names}
        self.counters.curve.append([*progress.values(), result.bpc])
        self.log.scalars(self.steps, {f"progress/{name}": value for name, value in progress.items()})
        self.log_score("valid", result)
        self.counters.since_best += 1
        if self.schedule is not None and self.schedule.after_validation(result.loss):
            self.progress.write_line(f"learning rate lowered to {self.schedule.rate:.3g}")
        if self.counters.best is None or result.loss < self.counters.best:
            self.counters.best, self.counters.since_best = result.loss, 0
            self.log.text(self.steps, "sample/best", lm.sample_text(self.model, self.tokenizer, seed=self.options.seed))
            self.save(self.run.best)

    def log_score(self, split: str, result: Score) -> None:
        """Writes a score to TensorBoard and to stdout."""
        self.log.scalars(
            self.steps,
            {
                f"{split}/loss": result.loss,
                f"{split}/perplexity": result.ppl,
                f"{split}/bpc": result.bpc,
                f"{split}/word_perplexity": result.word_ppl,
            },
        )
        shown = lm.describe(split, result, self.tokenizer.kind)
        self.progress.write_line(f"step {self.steps}, epoch {self.stream.epoch}, {shown}")

    def sample(self, model: LanguageModel) -> str:
        """Generates a text sample, prints it and returns it."""
        text = lm.sample_text(model, self.tokenizer, seed=self.options.seed)
        self.progress.write_line(f"--- sample at step {self.steps} ---\n{text}\n---")
        return text

    def report_unknown_words(self) -> None:
        """Prints the share of tokens outside the vocabulary, in the text read so far. Prints nothing if there are none."""
        if unknown := lm.describe_unknown({"train": self.stream, "valid": self.valid, "test": self.test}):
            self.progress.write_line(unknown)

    def outcome(self) -> str:
        """Returns why the run has ended early, for the last message; empty if it has not."""
        patience, since = self.options.patience, self.counters.since_best
        return "" if patience is None or since < patience else f", stopped by --patience {patience}"

    def scores(self) -> dict[str, Any]:
        """Returns the scores of the best checkpoint by split. Prints the test score and a sample."""
        best = self.best_model()
        valid, test = (lm.score(best, split, self.options) for split in (self.valid, self.test))
        self.log_score("test", test)
        # As text: curves of these scores would be charts with one point.
        shown = (lm.describe(name, split, self.tokenizer.kind) for name, split in (("valid", valid), ("test", test)))
        self.log.paragraph(self.steps, "about/result", f"Best checkpoint: {'; '.join(shown)}")
        self.report_unknown_words()
        self.sample(best)
        return {"valid": valid._asdict(), "test": test._asdict()}

    def best_model(self) -> LanguageModel:
        """Returns the model of the best checkpoint, or the current model if that checkpoint is damaged."""
        try:
            return lm.load_run(self.run, self.run.best, self.device).model
        except CheckpointError as error:
            self.progress.write_line(f"{error}: the scores are those of the last checkpoint instead")
            return self.model

    def initialize_dir(self, plan: Plan[Any], lock: RunLock) -> None:
        """Creates the run's directory and writes the tokenizer."""
        super().initialize_dir(plan, lock)
        self.tokenizer.save(self.run.tokenizer)

    def content(self) -> dict[str, Any]:
        """Returns the content of a checkpoint, with the random generators of all ranks. A collective call."""
        _, *others = self.ranks.gather(random_state())
        schedule = {} if self.schedule is None else {"schedule": {**self.schedule.state_dict(), "bptt": self.options.bptt}}
        return {**super().content(), **schedule, "random_of_other_ranks": others, "held_out": self.held_out}

    def restore(self, checkpoint: dict[str, Any] | None) -> None:
        """Restores the run. Every rank draws different dropout: a rank without a saved random state gets a seed of its own.

        Raises:
            DataError: the training, validation or test text is not the run's.
            TypeError: a counter has the wrong type. Other exceptions are those of `TrainingRun.restore`.
        """
        super().restore(checkpoint)
        if self.trainer.credit is not None:
            self.trainer.credit.window = self.options.bptt  # not that of the first window, shorter at an epoch's end
        check_held_out(checkpoint or {}, self.held_out, self.options.data_file)
        self.counters.check()
        if checkpoint is not None and self.schedule is not None:
            saved = checkpoint["schedule"]
            self.schedule.load_state_dict(saved)
            if saved.get("bptt", self.options.bptt) != self.options.bptt:
                behind = windows_behind(self.options, self.stream, self.steps, self.counters.tokens)
                self.schedule.go_on_at(behind // self.options.accumulate)
        if self.ranks.first:
            return
        torch.manual_seed(self.options.seed + RANK_SEED * self.ranks.rank + self.steps)
        others = [] if checkpoint is None else checkpoint.get("random_of_other_ranks", [])
        if self.ranks.rank <= len(others):
            set_random_state(others[self.ranks.rank - 1])

    def in_force(self) -> dict[str, Any]:
        """Returns the value in force of every option that config.json stores; None for an option without effect."""
        return super().in_force() | {
            **credit_in_force(self.options, self.options.bptt, cells=self.options.model == "lstm"),
            **dict.fromkeys(optimization_without_effect(self.options)),
            "dataset": None if self.options.data_file else self.options.dataset or EMBEDDED,
            "trace_decay": self.options.decay_in_force,
            "vocab_size": self.tokenizer.vocabulary_size,
            "eval_every": self.eval_every,
            "eval_tokens": lm.token_limit(self.valid, self.options),
        }

    def next_commands(self) -> list[str]:
        """Returns lines with the commands that train the run further, sample from it, score it, and show its curves."""
        run = shlex.quote(str(self.run.path))
        limits = ("epochs", "max_steps", "max_tokens")
        limit = next(name for name in limits if getattr(self.options, name) is not None)
        if self.outcome():
            limit = "patience"
        further = f"--resume {run} {flag(limit)} {2 * getattr(self.options, limit)}"
        falls = " (the learning rate rises to what a run of that length has)" if self.options.falls_to_the_end else ""
        return [
            f"to train on{falls}: {command_line('train')} {further}",
            f"to sample: {command_line('sample')} {run}; to score: {command_line('evaluate')} {run}",
            f"to compare: {command_line('compare')} {run} OTHER_RUN; {curves_command(self.run.path, self.options.logger)}",
        ]

    def summary(self) -> dict[str, Any]:
        """Returns the content of summary.json without the scores."""
        essentials = ("seed", "model", "tokenizer", "synthesizer", "bptt")
        return {
            "dataset": self.options.data_file or self.options.dataset or EMBEDDED,
            **{name: getattr(self.options, name) for name in essentials},
            "vocabulary": self.tokenizer.vocabulary_size,
            "unknown": {
                "train": self.stream.unknown_share,
                "valid": self.valid.unknown_share,
                "test": self.test.unknown_share,
            },
            "ranks": self.ranks.size,
            "updates": self.trainer.updates,
            "tokens": self.counters.tokens,
            "tokens_per_second": self.counters.tokens / self.counters.seconds,
            **super().summary(),
        }
