"""Trains a recurrent language model by truncated BPTT, with or without synthetic gradients.

python scripts/train_lm.py
    Train on the embedded corpus by characters, then print a text sample; two minutes on two cores.
python scripts/train_lm.py --dataset ptb
    Train a 2x200 LSTM on Penn Treebank words, windows of 5 steps, 6 epochs; an hour or more on one core.
python scripts/train_lm.py --dataset ptb --synthesizer none
    The same with plain truncated BPTT.
python scripts/train_lm.py --run-dir runs/mine --resume auto
    Resume runs/mine if it was stopped or killed, else start it.
torchrun --standalone --nproc-per-node 2 scripts/train_lm.py --dataset ptb
    Train in two processes, each with half of the lanes; see docs/distributed.md.
tensorboard --logdir runs
    Show the curves.

A run writes to its directory: TensorBoard events, config.json, tokenizer.json, checkpoints/last.pt, previous.pt and best.pt
(lowest validation loss), and summary.json. Ctrl-C saves a checkpoint and exits with status 130, SIGTERM with 143. Invalid
input, a full disk and a loss that stays NaN print one line on stderr and exit with status 2. docs/reliability.md lists the
failures that a run survives.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import dni_seq as dni
from dni_seq.app.build.unused_options import remarks
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_trainer import build_trainer, messages
from dni_seq.app.lm.dry_run import dry_run
from dni_seq.app.lm.evaluation import Score
from dni_seq.app.lm.options import PRESETS, LanguageModelOptions, as_given, resolve_options
from dni_seq.app.lm.training import (
    HISTOGRAM_EVERY,
    LOG_EVERY,
    RANK_SEED,
    Counters,
    Training,
    figures,
    log_point,
    log_score,
    measurements,
    report_unknown_words,
    sample,
)
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.runs.checkpoint import (
    CheckpointError,
    checkpoint_errors,
    random_state,
    save_checkpoint,
    set_random_state,
    write_json,
)
from dni_seq.app.runs.directory import RunDirectory, new_run_path
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.options import parse, report
from dni_seq.app.runs.progress import NullProgress, Progress
from dni_seq.app.runs.resume import Plan, config_of, plan_run
from dni_seq.app.runs.signals import StopSignals
from dni_seq.app.runs.tensorboard import FINAL, LAYOUT, RunLog, peak_memory_mb
from dni_seq.core.nonfinite import NonFiniteError
from dni_seq.core.windows import Window
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.distributed.process_group import TIMEOUT, RankError, Ranks, init_distributed, local_device, program
from dni_seq.models.language_model import LanguageModel
from dni_seq.streams import Corpus, DataError, Tokenizer, WindowStream, load_tokenizer
from dni_seq.streams.corpus import EMBEDDED

SAVE_SECONDS = 60.0
"""Seconds between two checkpoints, the most work that a kill loses. Each validation writes a checkpoint too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    keep_freed_memory()
    with RunLock() as lock:
        return command(arguments, lock)


def command(arguments: Sequence[str] | None, lock: RunLock) -> int:
    """Runs the command with the lock of the run's directory and returns its exit status."""
    try:
        given = parse(
            LanguageModelOptions,
            arguments,
            prog="train_lm",
            description=__doc__ or "",
            presets=PRESETS,
            as_given=as_given,
        )
        if given.get("dry_run") and given.get("eval_only"):
            raise ValueError("--dry-run and --eval-only exclude each other: remove one of them")
        if given.get("dry_run"):
            for line in dry_run(plan_run(LanguageModelOptions, given).options):
                print(line, flush=True)
            return 0
        if given.get("eval_only"):
            return evaluate_only(plan_run(LanguageModelOptions, {"resume": "auto"} | given))
        with init_distributed(float(given.get("rank_timeout", TIMEOUT))) as ranks:
            return run(given, ranks, lock)
    except (ValueError, OSError) as error:
        return report("train_lm", error)


def run(given: dict[str, Any], ranks: Ranks, lock: RunLock) -> int:
    """Trains on one or several ranks and returns the exit status. Only the first rank takes the lock."""
    try:
        ranks.check_same({"version of python": sys.version.split()[0], **program(), "set of options": given})
        plan = ranks.broadcast_from_rank0(lambda: plan_run(LanguageModelOptions, given, lock))
        training = prepare(plan, ranks, lock)
    except (ValueError, OSError) as error:
        return report("train_lm", error) if ranks.first else 2  # all ranks raise the same error
    except RankError as error:
        return report("train_lm", error)
    try:
        with StopSignals() as stop:
            return train(training, stop)
    except RankError as error:
        going_on = f"to resume from the last checkpoint: --run-dir {training.run.path} --resume auto"
        return report("train_lm", RankError(f"rank {ranks.rank} stopped at step {training.steps}: {error}; {going_on}"))
    except DataError as error:
        if ranks.size > 1:  # a checkpoint needs all ranks, and the others may not have this error
            return report("train_lm", DataError(f"rank {ranks.rank} stopped at step {training.steps}: {error}"))
        return report("train_lm", stopped(training, error))
    except NonFiniteError as error:  # on all ranks at the same step
        end = stopped(training, error)
        return report("train_lm", end) if ranks.first else 2
    except (CheckpointError, OSError) as error:
        return report("train_lm", error)
    finally:
        training.progress.close()
        training.log.close()


def stopped(t: Training, error: Exception) -> Exception:
    """Saves a run that cannot continue and returns the error to report."""
    try:
        save(t, t.run.last)
    except (OSError, RankError) as other:
        return OSError(f"{error} ({other})")
    return ValueError(f"{error} (saved at step {t.steps}; to resume: --run-dir {t.run.path} --resume auto)")


def train(t: Training, stop: StopSignals) -> int:
    """Trains until the run is done or a signal arrives, and returns the exit status."""
    while not t.done():
        for window in t.stream:
            with checkpoint_errors(t.run.path) if t.steps == t.resumed_at else nullcontext():
                step(t, window)
            if t.steps % LOG_EVERY == 0:
                log_point(t)
                t.log.clear()
            validation_due = t.steps % t.eval_every == 0
            if validation_due:
                validate(t)
            if t.options.sample_every and t.steps % t.options.sample_every == 0:
                t.log.text(t.steps, "sample/regular", sample(t, t.model))
            if t.done():
                break
            # A signal reaches ranks at different steps, and their clocks differ, so they agree when to stop and save.
            late = time.monotonic() - t.saved_at > SAVE_SECONDS
            signal, save_due = agreed(t.ranks, stop.received, late or validation_due)
            if signal is not None:
                stop.received = signal  # only here: a signal that arrives during the agreement must survive until the next
                save(t, t.run.last)
                t.progress.write_line(f"stopped at step {t.steps}; to resume: --run-dir {t.run.path} --resume auto")
                return stop.exit_status
            if save_due:
                save(t, t.run.last)
    finish(t)
    return 0


def agreed(ranks: Ranks, signal: int | None, save_due: bool) -> tuple[int | None, bool]:
    """Returns a signal that any rank has received, and whether a checkpoint is due on any rank. A collective call."""
    number, due = ranks.all_reduce_max(signal or 0, int(save_due))
    return number or None, bool(due)


def step(t: Training, window: Window) -> None:
    """Trains on one window and logs its measurements."""
    tokens = window.targets.numel() if window.mask is None else int(window.mask.sum())
    if t.trainer.parallel is not None:
        window = t.trainer.parallel.window(window)
    window = lm.on_device(window, t.device)
    result = t.trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask, lookahead=window.lookahead)
    t.counters.tokens += tokens
    t.log.add(measurements(result), weight=tokens, skipped=result.skipped)
    for event in result.events:
        t.progress.write_line(event)
    if t.steps % HISTOGRAM_EVERY == 0:
        for horizon, message in enumerate(messages(t.trainer, window.lookahead), start=1):
            t.log.histogram(t.steps, f"messages/horizon_{horizon}", message)
    t.progress.step(tokens, lambda: figures(t.log.mean("train/loss")))


def validate(t: Training) -> Score:
    """Scores the validation split and saves the best checkpoint if the score is the best so far."""
    result = lm.score(t.model, t.valid, t.options, t.trainer.parallel)
    t.counters.validated_at = t.steps
    t.tick()
    t.counters.curve.append([t.counters.tokens, t.counters.seconds, t.counters.process_seconds, result.bpc])
    t.log.scalars(t.steps, {"progress/tokens": t.counters.tokens, "progress/seconds": t.counters.seconds})
    log_score(t, "valid", result)
    if t.counters.best is None or result.loss < t.counters.best:
        t.counters.best = result.loss
        t.log.text(t.steps, "sample/best", lm.sample_text(t.model, t.tokenizer, seed=t.options.seed))
        save(t, t.run.best)
    return result


def save(t: Training, path: Path) -> None:
    """Writes a checkpoint. The log is flushed first, so it has every step that the checkpoint has.

    The last checkpoint before this one is kept as previous.pt. A collective call: rank 0 writes the file, with the lanes and
    the random generators of all ranks.
    """
    t.tick()
    t.log.flush()
    own, *others = t.ranks.gather(random_state())
    content = {
        "trainer": t.trainer.state_dict(),
        "stream": t.stream.state_dict(),
        "random": own,
        "random_of_other_ranks": others,
        "counters": dataclasses.asdict(t.counters),
        "log": t.log.state_dict(),
        "config": config_of(t.options),
    }
    if t.ranks.first:
        save_checkpoint(path, content, keep=t.run.previous if path == t.run.last else None)
    t.saved_at = time.monotonic()


def finish(t: Training) -> None:
    """Ends a run: last validation and checkpoint, then the scores of the best checkpoint, a sample, and the summary."""
    if t.counters.logged_at != t.steps:
        log_point(t)
    if t.counters.validated_at != t.steps:
        validate(t)
    save(t, t.run.last)
    if not t.ranks.first:
        return
    best = best_model(t)
    scores = {"valid": lm.score(best, t.valid, t.options), "test": lm.score(best, t.test, t.options)}
    log_score(t, "test", scores["test"])
    t.log.scalars(t.steps, {"best/valid_perplexity": scores["valid"].ppl, "best/valid_bpc": scores["valid"].bpc})
    deciding = {name: value for name, value in config_of(t.options).items() if name not in t.options.MAY_CHANGE}
    t.log.hyperparameters(deciding, FINAL)
    report_unknown_words(t)
    sample(t, best)
    t.tick()
    write_json(t.run.summary, summary(t, scores))
    t.progress.write_line(f"{t.steps} steps in {t.counters.seconds:.0f} s; results in {t.run.path}")


def best_model(t: Training) -> LanguageModel:
    """Returns the model of the best checkpoint, or the current model if that checkpoint is damaged."""
    try:
        return lm.load_run(t.run, t.run.best, t.device).model
    except CheckpointError as error:
        t.progress.write_line(f"{error}: the scores are those of the last checkpoint instead")
        return t.model


def summary(t: Training, scores: dict[str, Score]) -> dict[str, Any]:
    """Returns the content of summary.json."""
    essentials = ("seed", "model", "tokenizer", "synthesizer", "bptt")
    return {
        "dataset": t.options.data_file or t.options.dataset or EMBEDDED,
        **{name: getattr(t.options, name) for name in essentials},
        "parameters": sum(parameter.numel() for parameter in t.model.parameters()),
        "vocabulary": t.tokenizer.vocabulary_size,
        "unknown": {"train": t.stream.unknown_share, "valid": t.valid.unknown_share, "test": t.test.unknown_share},
        "torch": torch.__version__,
        "ranks": t.ranks.size,
        "steps": t.steps,
        "tokens": t.counters.tokens,
        "seconds": t.counters.seconds,
        "process_seconds": t.counters.process_seconds,
        "tokens_per_second": t.counters.tokens / t.counters.seconds,
        "peak_memory_mb": peak_memory_mb(t.device),
        "curve": t.counters.curve,
        **{split: result._asdict() for split, result in scores.items()},
    }


def prepare(plan: Plan[LanguageModelOptions], ranks: Ranks, lock: RunLock) -> Training:
    """Builds all parts of the run and then its directory. Nothing is written if any rank raises an error."""
    torch.set_num_threads(plan.options.threads)
    corpus = ranks.run_on_all(lambda: lm.open_text(plan.options))
    options = resolve_options(plan.options, corpus)
    run = ranks.broadcast_from_rank0(lambda: plan.run or RunDirectory(new_run_path(run_name(options, corpus.name))))
    tokenizer = ranks.broadcast_from_rank0(
        lambda: lm.build_tokenizer(options, corpus) if plan.checkpoint is None else load_tokenizer(run.tokenizer)
    )
    training = ranks.run_on_all(lambda: assemble(plan, options, corpus, run, tokenizer, ranks))
    ranks.check_same({"training text": training.stream.state_dict()})
    ranks.broadcast_from_rank0(lambda: initialize_dir(training, plan, lock))
    if plan.checkpoint is not None:
        saved = plan.checkpoint
        with checkpoint_errors(run.path):
            training.log.load_state_dict(saved["log"], training.device)
        training.resumed_at = training.steps
    for note in (plan.note, lock.missing, *corpus.notes, *remarks(options, options.bptt, cells=options.model == "lstm")):
        if note:
            training.progress.write_line(note)
    report_unknown_words(training)
    return training


def initialize_dir(t: Training, plan: Plan[LanguageModelOptions], lock: RunLock) -> None:
    """Creates the run's directory and starts its log. Only the first rank calls this."""
    plan.initialize_dir(t.run, t.options, lock)
    t.tokenizer.save(t.run.tokenizer)
    t.log = RunLog(t.run.path, resumed_at=t.steps)
    t.log.dashboard(LAYOUT)
    t.log.configuration(t.steps, config_of(t.options))


def assemble(
    plan: Plan[LanguageModelOptions],
    options: LanguageModelOptions,
    corpus: Corpus,
    run: RunDirectory,
    tokenizer: Tokenizer,
    ranks: Ranks,
) -> Training:
    """Returns the parts of one rank, restored from the checkpoint if there is one. Writes nothing."""
    checkpoint = plan.checkpoint
    device = lm.device_of(options.device or local_device())
    parallel = DataParallel(ranks) if ranks.size > 1 else None
    if parallel is not None:
        parallel.lanes(options.batch_size)
    stream = lm.open_training(corpus, tokenizer, options)
    valid = lm.open_split(corpus, "valid", tokenizer, options)
    test = lm.open_split(corpus, "test", tokenizer, options)
    torch.manual_seed(options.seed)
    with lm.sizes_that_fit():
        model = lm.build_model(options, tokenizer.vocabulary_size, device)
        trainer = build_trainer(options, model, device, parallel)
    with checkpoint_errors(run.path):
        counters = restore(checkpoint, trainer, stream, ranks, options)
    progress = (Progress if ranks.first else NullProgress)(total_steps(options, stream), trainer.steps)
    return Training(
        options, run, device, tokenizer, stream, valid, test, model, trainer, counters, RunLog(None), progress, ranks
    )


def restore(
    checkpoint: dict[str, Any] | None,
    trainer: dni.SequenceTrainer,
    stream: WindowStream,
    ranks: Ranks,
    options: LanguageModelOptions,
) -> Counters:
    """Restores trainer, stream, random generators and counters from a checkpoint. Returns new counters without one."""
    if not ranks.first:  # every rank draws its own dropout
        steps = 0 if checkpoint is None else checkpoint["trainer"]["steps"]
        torch.manual_seed(options.seed + RANK_SEED * ranks.rank + steps)
    if checkpoint is None:
        return Counters()
    trainer.load_state_dict(checkpoint["trainer"], options.batch_size)
    stream.load_state_dict(checkpoint["stream"])
    generators = [checkpoint["random"], *checkpoint.get("random_of_other_ranks", [])]
    if ranks.rank < len(generators):
        set_random_state(generators[ranks.rank])
    counters = Counters(**checkpoint["counters"])
    for name, value in dataclasses.asdict(counters).items():
        if not isinstance(value, list if name == "curve" else (int, float)) and (name, value) != ("best", None):
            raise TypeError(f"the counter {name} has the invalid value {value!r}")
    return counters


def run_name(options: LanguageModelOptions, corpus: str) -> str:
    """Returns a readable name for a run's directory, from its main options."""
    text = Path(corpus).stem
    size = f"{options.model}{options.layers}x{options.hidden}"
    return f"{text}-{options.tokenizer}-{size}-{options.synthesizer}-T{options.bptt}-seed{options.seed}"


def total_steps(options: LanguageModelOptions, stream: WindowStream) -> int | None:
    """Returns the number of steps of the whole run, None if unknown."""
    limits = [options.max_steps]
    if options.max_tokens is not None:
        limits.append(math.ceil(options.max_tokens / (stream.lanes * stream.bptt)))
    if options.epochs is not None and stream.windows_per_epoch is not None:
        limits.append(options.epochs * stream.windows_per_epoch)
    return min((limit for limit in limits if limit is not None), default=None)


def evaluate_only(plan: Plan[LanguageModelOptions]) -> int:
    """Scores a run's best checkpoint, or the one that --resume PATH names. Writes nothing."""
    if plan.run is None or plan.checkpoint is None:
        raise ValueError("--eval-only needs --run-dir, the directory of a run that has a checkpoint")
    torch.set_num_threads(plan.options.threads)
    path = plan.run.best if plan.options.resume == "auto" else Path(str(plan.options.resume))
    for split, result in lm.score_run(plan.run, path, ("valid", "test"), plan.options):
        print(lm.describe(split, result))
    return 0
