"""One call of `scripts/train_lm.py` after its options are parsed: a training run, a dry run, or a score."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from dni_seq.app.build.device import device_of
from dni_seq.app.build.optimization_options import optimization_remarks
from dni_seq.app.build.unused_options import remarks
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.dry_run import dry_run
from dni_seq.app.lm.introduction import introduction
from dni_seq.app.lm.options import LanguageModelOptions, resolve_options
from dni_seq.app.lm.scoring import HELD_OUT, score_splits
from dni_seq.app.lm.training import LanguageModelRun
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.runs.checkpoint import checkpoint_errors
from dni_seq.app.runs.command import run_command
from dni_seq.app.runs.directory import RunDirectory, new_run_path
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.options import report
from dni_seq.app.runs.output import output_status
from dni_seq.app.runs.resume import Plan, plan_run
from dni_seq.app.runs.trackers import check_logger
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.distributed.process_group import Ranks, init_distributed, local_device, program
from dni_seq.distributed.timeout import TIMEOUT
from dni_seq.streams import Corpus, Tokenizer, load_tokenizer


def run(prog: str, given: dict[str, Any]) -> int:
    """Runs the command and returns its exit status.

    Args:
        prog: the command's name in messages.
        given: the options from the command line, by name.
    """
    keep_freed_memory()
    with RunLock() as lock:
        try:
            if given.get("dry_run"):
                for line in dry_run(plan_run(LanguageModelOptions, given).options):
                    print(line, flush=True)
                return output_status()
            if given.get("eval_only"):
                return evaluate_only(given)
            with init_distributed(float(given.get("rank_timeout", TIMEOUT))) as ranks:
                return run_command(prog, ranks, lambda: prepare(given, ranks, lock))
        except (ValueError, OSError) as error:
            return report(prog, error)


def prepare(given: dict[str, Any], ranks: Ranks, lock: RunLock) -> LanguageModelRun:
    """Builds all parts of the run and then its directory. Nothing is written if any rank raises an error.

    Args:
        given: the options from the command line, by name.
        ranks: the ranks that share the run. Only the first one takes the lock.
        lock: the lock of the run's directory.

    Raises:
        ValueError: an option, the data or the checkpoint cannot be used. All ranks raise the same error.
        RankError: another rank has ended, or does not answer.
    """
    ranks.check_same({"version of python": sys.version.split()[0], **program(), "set of options": given})
    plan = ranks.broadcast_from_rank0(lambda: plan_run(LanguageModelOptions, given, lock))
    ranks.broadcast_from_rank0(lambda: check_logger(plan.options.logger))
    torch.set_num_threads(plan.options.threads)
    open_text = lm.open_text_again if plan.resuming else lm.open_text
    corpus = ranks.run_on_all(lambda: open_text(plan.options))
    options = resolve_options(plan.options, corpus)
    run = ranks.broadcast_from_rank0(lambda: plan.run or RunDirectory(new_run_path(run_name(options, corpus.name))))
    tokenizer = ranks.broadcast_from_rank0(
        lambda: lm.build_tokenizer(options, corpus) if plan.checkpoint is None else load_tokenizer(run.tokenizer)
    )
    training = ranks.run_on_all(lambda: assemble(plan, options, corpus, run, tokenizer, ranks))
    ranks.check_same({"training text": training.stream.state_dict()})
    unused = [*remarks(options, options.bptt, cells=options.model == "lstm"), *optimization_remarks(options)]
    training.begin(plan, lock, [*corpus.notes, *unused])
    training.report_unknown_words()
    return training


def assemble(
    plan: Plan[LanguageModelOptions],
    options: LanguageModelOptions,
    corpus: Corpus,
    run: RunDirectory,
    tokenizer: Tokenizer,
    ranks: Ranks,
) -> LanguageModelRun:
    """Returns one rank's run, restored from the checkpoint if there is one. Writes nothing."""
    device = device_of(options.device or local_device())
    parallel = DataParallel(ranks) if ranks.size > 1 else None
    if parallel is not None:
        parallel.lanes(options.batch_size)
    stream = lm.open_training(corpus, tokenizer, options)
    valid = lm.open_split(corpus, "valid", tokenizer, options)
    test = lm.open_split(corpus, "test", tokenizer, options)
    torch.manual_seed(options.seed)
    with lm.sizes_that_fit():
        model = lm.build_model(options, tokenizer.vocabulary_size, device)
        if ranks.first:  # before the trainer: making its optimizers imports torch's compiler, which takes seconds
            for line in introduction(options, corpus.name, tokenizer, stream, model, device, run):
                print(line, flush=True)
        trainer = build_trainer(options, model, device, parallel)
    training = LanguageModelRun(
        options=options,
        run=run,
        device=device,
        stream=stream,
        trainer=trainer,
        ranks=ranks,
        tokenizer=tokenizer,
        valid=valid,
        test=test,
        model=model,
    )
    with checkpoint_errors(run.path):
        training.restore(plan.checkpoint)
    return training


def run_name(options: LanguageModelOptions, corpus: str) -> str:
    """Returns a readable name for a run's directory, from its main options."""
    text = Path(corpus).stem
    size = f"{options.model}{options.layers}x{options.hidden}"
    return f"{text}-{options.tokenizer}-{size}-{options.synthesizer}-T{options.bptt}-seed{options.seed}"


def evaluate_only(given: dict[str, Any]) -> int:
    """Scores a run's best checkpoint, or the one that --resume PATH names. Writes nothing.

    Raises:
        ValueError: no run is named, it has no checkpoint, or its text cannot be used.
    """
    if given.get("run_dir") is None and given.get("resume") in (None, "auto"):
        raise ValueError("--eval-only needs --run-dir, the directory of a run that has a checkpoint")
    plan = plan_run(LanguageModelOptions, {"resume": "auto"} | given)
    if plan.run is None or plan.checkpoint is None:
        raise ValueError(f"--eval-only needs a run with a checkpoint, and --run-dir {given.get('run_dir')} holds none")
    torch.set_num_threads(plan.options.threads)
    path = plan.run.best if plan.options.resume == "auto" else Path(str(plan.options.resume))
    loaded = lm.load_run(plan.run, path, device_of(plan.options.device))
    for scored in score_splits(loaded, HELD_OUT, plan.options):
        print(*scored.lines(), sep="\n")
    return output_status()
