"""Builds the parts of a language-model run from its options, or reads them from the run's directory.

`scripts/train_lm.py`, `evaluate_lm.py` and `sample_lm.py` share this module. It does not depend on the training code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dni_seq.app.lm.evaluation import Score, evaluate, score_of
from dni_seq.app.lm.generation import generate
from dni_seq.app.lm.options import LanguageModelOptions, check_spans, longest_span
from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.options import flag
from dni_seq.app.runs.resume import saved_options
from dni_seq.core.windows import Window, counted, on_device
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.models.language_model import LanguageModel
from dni_seq.streams import (
    Corpus,
    DataError,
    ShuffledDocuments,
    Tokenizer,
    WindowStream,
    load_tokenizer,
    open_corpus,
    train_tokenizer,
)
from dni_seq.streams.files import matching

EVALUATION_WINDOW = 32
"""Window length in evaluation, in steps. Longer windows are faster but need more memory for logits."""


EVALUATION_TOKENS_OF_STREAM = 100_000
"""Default number of tokens of a streamed split that are scored: the split may be very long or endless."""


WORDS_OF_STREAM = 50_000
"""Vocabulary size for words of a streamed text. Without a limit, the vocabulary may have several hundred thousand words."""


SAMPLE_LENGTH = MappingProxyType({"word": 100, "char": 500})
"""Number of tokens of a generated text sample, by the kind of token."""


SAMPLE_TEMPERATURE = 0.8


def open_text(options: LanguageModelOptions) -> Corpus:
    """Returns the corpus that the options name.

    Raises:
        DataError: the corpus cannot be found or read.
    """
    return open_corpus(
        options.dataset,
        data_dir=options.data_dir,
        data_file=options.data_file,
        valid_file=options.valid_file,
        test_file=options.test_file,
        text_column=options.text_column,
        config=options.dataset_config,
        revision=options.dataset_revision,
        invalid_utf8=options.invalid_utf8,
        null_text=options.null_text,
    )


def open_text_again(options: LanguageModelOptions) -> Corpus:
    """Returns the corpus of a run that exists already. If a file is missing, the error names the options for its new place.

    Raises:
        DataError: the corpus cannot be found or read.
    """
    try:
        return open_text(options)
    except DataError as error:
        gone = [flag(name) for name in sorted(options.MAY_MOVE) if _is_gone(getattr(options, name))]
        if not gone:
            raise
        raise DataError(f"{error}; if the run's text has moved, give its place with {' and '.join(gone)}") from error


def _is_gone(file: str | None) -> bool:
    """Returns whether no file has the name or pattern `file`. False for None."""
    try:
        return file is not None and not matching(file)
    except DataError:
        return True


def build_tokenizer(options: LanguageModelOptions, corpus: Corpus) -> Tokenizer:
    """Returns a tokenizer trained on the training text or a sample of it. `options` come from `resolve_options`.

    Raises:
        DataError: the text cannot be read or does not fit `--vocab-size`.
    """
    size = options.vocab_size
    if size is None and options.tokenizer == "word" and not corpus.train.small:
        size = WORDS_OF_STREAM
    return train_tokenizer(options.tokenizer, corpus.train, size)


def open_training(corpus: Corpus, tokenizer: Tokenizer, options: LanguageModelOptions) -> WindowStream:
    """Returns the training text as a stream of windows.

    Raises:
        DataError: the text is too short for the number of lanes, or cannot be read.
        ValueError: windows, or the steps that are used after them, are longer than a lane.
    """
    documents = ShuffledDocuments(corpus.train, options.seed) if options.shuffle_documents else corpus.train
    stream = WindowStream(
        documents,
        tokenizer,
        lanes=options.batch_size,
        bptt=options.bptt,
        lookahead=options.resolve(options.bptt).window_lookahead,
        document_reset=options.document_reset,
    )
    check_spans(options, corpus.train.name, stream.lane_steps(longest_span(options)))
    return stream


def build_model(options: LanguageModelOptions, vocabulary_size: int, device: torch.device) -> LanguageModel:
    """Returns a model with new weights, in its dtype and on `device`. `options` come from `resolve_options`.

    Raises:
        ValueError: the sizes contradict each other, or this processor does not support the dtype.
    """
    settings = {
        name: getattr(options, name)
        for name in ("embed", "hidden", "layers", "dropout", "tied", "sparse_embedding", "traces", "trace_decay")
    }
    model = LanguageModel(vocabulary_size, cell=options.model, **settings)
    if options.dtype == "float64":
        model = model.double()
    model = model.to(device)
    if autocast_of(options) is not None:
        _check_autocast(model, options, device)
    return model


@contextmanager
def sizes_that_fit() -> Iterator[None]:
    """Turns the errors that too large sizes raise inside the context into a ValueError.

    Raises:
        ValueError: torch has rejected a size, or there is not enough memory.
    """
    try:
        yield
    # A size that overflows raises one of these exceptions; which one depends on the operation that overflows.
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model cannot be built because its sizes are too large for this machine: {reason}") from error


def autocast_of(options: LanguageModelOptions) -> torch.dtype | None:
    """Returns the dtype of autocast; None if the model computes in the dtype of its weights."""
    return torch.bfloat16 if options.dtype == "bfloat16" else None


class LoadedRun(NamedTuple):
    """A run that was read from its directory: its options, its tokenizer, the model, and the content of the checkpoint."""

    options: LanguageModelOptions
    tokenizer: Tokenizer
    model: LanguageModel
    checkpoint: dict[str, Any]


def load_run(run: RunDirectory, checkpoint: Path, device: torch.device) -> LoadedRun:
    """Returns a run with the weights of one of its checkpoints.

    Raises:
        ValueError: the directory holds no run, or one of its files is damaged.
    """
    options = saved_options(LanguageModelOptions, run)
    content = load_checkpoint(checkpoint)
    tokenizer = load_tokenizer(run.tokenizer)
    model = build_model(options, tokenizer.vocabulary_size, device)
    model.load_state_dict(content["trainer"]["model"])
    return LoadedRun(options, tokenizer, model, content)


def open_split(corpus: Corpus, split: str, tokenizer: Tokenizer, options: LanguageModelOptions) -> WindowStream:
    """Returns a split ("valid" or "test") for scoring, in as many lanes as in training, in windows of `EVALUATION_WINDOW`.

    The first token of each lane is not scored. If the number of tokens is not a multiple of B, the remainder is not scored.

    Raises:
        DataError: the split is too short for the number of lanes, or cannot be read.
    """
    return WindowStream(
        getattr(corpus, split),
        tokenizer,
        lanes=options.batch_size,
        bptt=EVALUATION_WINDOW,
        document_reset=options.document_reset,
    )


def score(
    model: LanguageModel, split: WindowStream, options: LanguageModelOptions, parallel: DataParallel | None = None
) -> Score:
    """Returns the model's score on one pass over a split, or on the split's first tokens if `token_limit` gives a limit.

    With `parallel` every rank runs its own lanes and returns the score of all lanes.

    Raises:
        DataError: the split cannot be read.
    """
    device = next(model.parameters()).device
    split.restart()
    limit = token_limit(split, options)
    windows = (on_device(window, device) for window in first_tokens(split, limit))
    loss = evaluate(model, windows, autocast=autocast_of(options), parallel=parallel)
    return score_of(loss, split.characters_per_token, split.words_per_token)


def token_limit(split: WindowStream, options: LanguageModelOptions) -> int | None:
    """Returns the number of tokens of a split after which scoring stops, None for the whole split.

    The limit is `--eval-tokens`, or `EVALUATION_TOKENS_OF_STREAM` for a streamed split without that option.
    """
    return options.eval_tokens or (None if split.tokens_per_epoch else EVALUATION_TOKENS_OF_STREAM)


def first_tokens(windows: Iterable[Window], limit: int | None) -> Iterator[Window]:
    """Yields windows until they predict at least `limit` tokens, the last one included. Yields all windows for None."""
    tokens = 0
    for window in windows:
        yield window
        tokens += int(counted(window).sum())
        if limit is not None and tokens >= limit:
            return


def describe(split: str, result: Score, kind: str) -> str:
    """Returns a score as one line of text. `kind` is the tokenizer's; for "char" the line has no perplexity per word."""
    figures = f"ppl {result.ppl:.2f}, bpc {result.bpc:.4f}"
    if kind != "char":
        figures += f", ppl per word {result.word_ppl:.2f}"
    return f"{split}: loss {result.loss:.4f} nats per token, {figures}"


def describe_unknown(splits: Mapping[str, WindowStream]) -> str:
    """Returns one line with each split's share of tokens outside the vocabulary; empty if no split has such tokens."""
    shares = ", ".join(f"{name} {split.unknown_share:.2%}" for name, split in splits.items() if split.unknown_tokens)
    return shares and f"tokens outside the vocabulary: {shares}"


def sample_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    prompt: str = "\n",
    length: int | None = None,
    temperature: float = SAMPLE_TEMPERATURE,
    top_k: int | None = None,
    seed: int,
) -> str:
    """Returns the prompt and `length` generated tokens as text. `SAMPLE_LENGTH` has the default lengths.

    Raises:
        ValueError: the prompt is empty, a setting is out of its range, or the model's output is not finite.
    """
    start = tokenizer.encode(prompt)
    if length is None:
        length = SAMPLE_LENGTH["char" if tokenizer.kind == "char" else "word"]
    if length < 1:
        raise ValueError(f"the length of a sample must be 1 or more tokens, got {length}")
    drawn = generate(
        model,
        torch.as_tensor(start, dtype=torch.int64, device=next(model.parameters()).device),
        length,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
    )
    return tokenizer.decode([*start, *drawn]).removeprefix("\n")


def _check_autocast(model: LanguageModel, options: LanguageModelOptions, device: torch.device) -> None:
    """Raises a ValueError if the recurrent kernel lacks the dtype. On many CPUs, oneDNN's LSTM does not support bfloat16."""
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=device)
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast_of(options)):
            model(tokens, model.initial_state(1))
    except RuntimeError as error:
        raise ValueError(
            f"--dtype {options.dtype} with --model {options.model} does not run on this {device.type}: use --dtype float32"
        ) from error
