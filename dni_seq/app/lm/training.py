"""The state of a running training: its parts, its counters, and its reports."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

import dni_seq as dni
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_trainer import cell_size
from dni_seq.app.lm.evaluation import Score
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.progress import Progress
from dni_seq.app.runs.tensorboard import RunLog, peak_memory_mb, perplexity
from dni_seq.distributed.process_group import Ranks
from dni_seq.models.language_model import LanguageModel
from dni_seq.streams import Tokenizer, WindowStream

LOG_EVERY = 50
"""Steps between two points of the training curves."""


HISTOGRAM_EVERY = 1000
"""Steps between two histograms of the synthesizer's messages."""


RANK_SEED = 1_000_003
"""Distance between the seeds of two ranks, large enough that they differ from the seeds of a study."""


EVAL_EVERY_OF_STREAM = 1000
"""Steps between validations for streamed text, whose epoch length is unknown."""


@dataclass
class Counters:
    """The counters of a run; part of its checkpoint.

    Attributes:
        tokens: number of tokens trained on so far.
        seconds: time of the run so far, over all sessions, validation included.
        process_seconds: CPU time of the process so far, which does not depend on other load of the machine.
        curve: (tokens, seconds, process seconds, bits per character) at each validation, its own time included.
        best: lowest validation loss so far, None before the first.
        validated_at: step of the latest validation.
        logged_at: step of the latest point of the training curves.
    """

    tokens: int = 0
    seconds: float = 0.0
    process_seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    best: float | None = None
    validated_at: int = 0
    logged_at: int = 0


@dataclass
class Training:
    """The parts of a run, ready to train. `resumed_at` is the step of the loaded checkpoint, None for a new run."""

    options: LanguageModelOptions
    run: RunDirectory
    device: torch.device
    tokenizer: Tokenizer
    stream: WindowStream
    valid: WindowStream
    test: WindowStream
    model: LanguageModel
    trainer: dni.SequenceTrainer
    counters: Counters
    log: RunLog
    progress: Progress
    ranks: Ranks = field(default_factory=Ranks)
    clock: float = field(default_factory=time.monotonic)
    process_clock: float = field(default_factory=time.process_time)
    saved_at: float = field(default_factory=time.monotonic)
    resumed_at: int | None = None

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.trainer.steps

    def done(self) -> bool:
        """Returns whether the limit of steps, tokens or epochs is reached."""
        limits = (
            (self.options.max_steps, self.steps),
            (self.options.max_tokens, self.counters.tokens),
            (self.options.epochs, self.stream.epoch),
        )
        return any(limit is not None and reached >= limit for limit, reached in limits)

    @property
    def eval_every(self) -> int:
        """Steps between validations."""
        return self.options.eval_every or self.stream.windows_per_epoch or EVAL_EVERY_OF_STREAM

    def tick(self) -> None:
        """Adds the time since the last call to the counters."""
        now, process_now = time.monotonic(), time.process_time()
        self.counters.seconds += now - self.clock
        self.counters.process_seconds += process_now - self.process_clock
        self.clock, self.process_clock = now, process_now


def measurements(result: dni.StepResult) -> dict[str, Tensor]:
    """Returns the measurements of a step by TensorBoard key."""
    values = {"train/loss": result.loss, "gradient/norm": result.gradient_norm}
    if result.synthetic is not None:
        values |= {
            "gradient/synthesizer_norm": result.synthetic.gradient_norm,
            "synthetic/loss": result.synthetic.loss,
            "synthetic/cosine": result.synthetic.cosine,
            "synthetic/r2": result.synthetic.r2,
            "synthetic/injected_ratio": result.synthetic.injected_ratio,
            "synthetic/scale": result.synthetic.scale,
        }
        if result.synthetic.fidelity is not None:
            horizons = result.synthetic.fidelity.horizons
            values["fidelity/cosine"] = torch.stack([horizon.cosine for horizon in horizons])
            values["fidelity/r2"] = torch.stack([horizon.r2 for horizon in horizons])
    return values


def figures(loss: float) -> str:
    """Returns the latest figures as a short text."""
    return f"loss {loss:.3f}, ppl {perplexity(loss):.1f}"


def log_point(t: Training) -> None:
    """Writes a point of the training curves: averages since the last point, size of the cells, speed and memory."""
    t.counters.logged_at = t.steps
    t.log.write(t.steps)
    t.log.scalars(t.steps, t.trainer.skip_counts())
    t.log.scalars(
        t.steps,
        {
            **cell_size(t.trainer),
            "speed/tokens_per_second": t.progress.tokens_per_second(),
            "memory/peak_mb": peak_memory_mb(t.device),
        },
    )


def log_score(t: Training, split: str, result: Score) -> None:
    """Writes a score to TensorBoard and to stdout."""
    t.log.scalars(
        t.steps,
        {
            f"{split}/loss": result.loss,
            f"{split}/perplexity": result.ppl,
            f"{split}/bpc": result.bpc,
            f"{split}/word_perplexity": result.word_ppl,
        },
    )
    t.progress.write_line(f"step {t.steps}, epoch {t.stream.epoch}, {lm.describe(split, result)}")


def sample(t: Training, model: LanguageModel) -> str:
    """Generates a text sample, prints it and returns it."""
    text = lm.sample_text(model, t.tokenizer, seed=t.options.seed)
    t.progress.write_line(f"--- sample at step {t.steps} ---\n{text}\n---")
    return text


def report_unknown_words(t: Training) -> None:
    """Prints the share of tokens outside the vocabulary, in the text read so far. Prints nothing if there are none."""
    if unknown := lm.describe_unknown({"train": t.stream, "valid": t.valid, "test": t.test}):
        t.progress.write_line(unknown)
