"""A language-model run: its parts, built from its options or read back from its directory.

`scripts/train_lm.py`, `evaluate_lm.py` and `sample_lm.py` share this; it knows nothing of training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dni_seq.app.build.credit_options import lookahead_of
from dni_seq.app.build.device import device_of, on_device
from dni_seq.app.lm.evaluation import Score, evaluate, score_of
from dni_seq.app.lm.generation import generate
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.resume import saved_options
from dni_seq.core.windows import Window, counted
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.models.language_model import LanguageModel
from dni_seq.streams import Corpus, ShuffledDocuments, Tokenizer, WindowStream, load_tokenizer, open_corpus, train_tokenizer

EVALUATION_WINDOW = 32
"""Steps of a window in evaluation; longer than in training, which costs memory for logits and gains speed."""


EVALUATION_TOKENS_OF_STREAM = 100_000
"""Tokens to score of a split that is streamed, whose end may be far or nowhere."""


WORDS_OF_STREAM = 50_000
"""Words to keep where the text is streamed, of which a sample alone would have several hundred thousand."""


SAMPLE_LENGTH = MappingProxyType({"word": 100, "char": 500})
"""Tokens of a text sample."""


SAMPLE_TEMPERATURE = 0.8


def open_text(options: LanguageModelOptions) -> Corpus:
    """The corpus that the options name.

    Raises:
        DataError: it cannot be found or read.
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
    )


def build_tokenizer(options: LanguageModelOptions, corpus: Corpus) -> Tokenizer:
    """The tokenizer of settled options, made from the training text or a sample of it.

    Raises:
        DataError: the text cannot be read, or does not suit `--vocab-size`.
    """
    size = options.vocab_size
    if size is None and options.tokenizer == "word" and not corpus.train.small:
        size = WORDS_OF_STREAM
    return train_tokenizer(options.tokenizer, corpus.train, size)


def open_training(corpus: Corpus, tokenizer: Tokenizer, options: LanguageModelOptions) -> WindowStream:
    """The training text as windows.

    Raises:
        DataError: it is too short for the lanes, or cannot be read.
    """
    documents = ShuffledDocuments(corpus.train, options.seed) if options.shuffle_documents else corpus.train
    return WindowStream(
        documents,
        tokenizer,
        lanes=options.batch_size,
        bptt=options.bptt,
        lookahead=lookahead_of(options, options.bptt),
        document_reset=options.document_reset,
    )


def build_model(options: LanguageModelOptions, vocabulary_size: int, device: torch.device) -> LanguageModel:
    """The model of settled options, with fresh weights, in its dtype and on `device`.

    Raises:
        ValueError: the sizes do not fit together, or this processor cannot run the dtype.
    """
    settings = {
        name: getattr(options, name) for name in ("embed", "hidden", "layers", "dropout", "tied", "sparse_embedding")
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
    """Say what to do where something cannot be built for its size.

    Raises:
        ValueError: torch has refused a size, or there is not memory enough.
    """
    try:
        yield
    # A size that overflows is any of these, by the place where it does.
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model cannot be built, its sizes are too large for this machine: {reason}") from error


def autocast_of(options: LanguageModelOptions) -> torch.dtype | None:
    """The dtype of autocast, None where the arithmetic is in the weights' own."""
    return torch.bfloat16 if options.dtype == "bfloat16" else None


class LoadedRun(NamedTuple):
    """A run read back from its directory."""

    options: LanguageModelOptions
    tokenizer: Tokenizer
    model: LanguageModel
    checkpoint: dict[str, Any]


def load_run(run: RunDirectory, checkpoint: Path, device: torch.device) -> LoadedRun:
    """A run with the weights of one of its checkpoints.

    Raises:
        ValueError: the directory holds no run, or a file in it is damaged.
    """
    options = saved_options(LanguageModelOptions, run)
    content = load_checkpoint(checkpoint)
    tokenizer = load_tokenizer(run.tokenizer)
    model = build_model(options, tokenizer.vocabulary_size, device)
    model.load_state_dict(content["trainer"]["model"])
    return LoadedRun(options, tokenizer, model, content)


def open_split(corpus: Corpus, split: str, tokenizer: Tokenizer, options: LanguageModelOptions) -> WindowStream:
    """A split of the corpus ("valid" or "test") to score, in as many lanes as in training, in longer windows.

    The fewer than B tokens that the lanes leave over, and the first token of each lane, are not scored.

    Raises:
        DataError: the split is too short for the lanes, or cannot be read.
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
    """The model's score on one pass through a split, from its start, or on as much of it as the options want.

    With `parallel` every rank runs its lanes, and gets the score of all.

    Raises:
        DataError: the split cannot be read.
    """
    device = next(model.parameters()).device
    split.restart()
    limit = options.eval_tokens or (None if split.tokens_per_epoch else EVALUATION_TOKENS_OF_STREAM)
    windows = (on_device(window, device) for window in first_tokens(split, limit))
    loss = evaluate(model, windows, autocast=autocast_of(options), parallel=parallel)
    return score_of(loss, split.characters_per_token, split.words_per_token)


def first_tokens(windows: Iterable[Window], limit: int | None) -> Iterator[Window]:
    """The first windows, up to the one that reaches `limit` tokens to predict; all where it is None."""
    tokens = 0
    for window in windows:
        yield window
        tokens += int(counted(window).sum())
        if limit is not None and tokens >= limit:
            return


def score_run(
    run: RunDirectory, checkpoint: Path, splits: Iterable[str], options: LanguageModelOptions
) -> Iterator[tuple[str, Score]]:
    """The scores of a run's checkpoint on splits of its corpus, with the device, data and `eval_tokens` of `options`.

    Raises:
        ValueError: the run or its data cannot be read.
    """
    corpus = open_text(options)
    loaded = load_run(run, checkpoint, device_of(options.device))
    for split in splits:
        stream = open_split(corpus, split, loaded.tokenizer, loaded.options)
        yield split, score(loaded.model, stream, dataclasses.replace(loaded.options, eval_tokens=options.eval_tokens))


def describe(split: str, result: Score) -> str:
    """A score in one line."""
    figures = f"ppl {result.ppl:.2f}, bpc {result.bpc:.4f}, ppl a word {result.word_ppl:.2f}"
    return f"{split}: loss {result.loss:.4f} nats a token, {figures}"


def describe_unknown(splits: Mapping[str, WindowStream]) -> str:
    """How much of the text is not in the vocabulary, in one line; empty where all of it is."""
    shares = ", ".join(f"{name} {split.unknown_share:.2%}" for name, split in splits.items() if split.unknown_tokens)
    return shares and f"tokens that are not in the vocabulary: {shares}"


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
    """The prompt and `length` tokens drawn behind it; by default a new line, and the length for the tokenizer.

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
    """Raise a ValueError where the recurrent kernel lacks the dtype: oneDNN has no bfloat16 LSTM on many processors."""
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=device)
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast_of(options)):
            model(tokens, model.initial_state(1))
    except RuntimeError as error:
        raise ValueError(
            f"--dtype {options.dtype} with --model {options.model} does not run on this {device.type}: use float32"
        ) from error
