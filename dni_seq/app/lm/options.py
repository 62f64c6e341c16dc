"""The options of a language-model run, and their defaults by tokenizer.

To add an option: declare it here, and use it in `lm.py` (data, model) or `lm_trainer.py` (credit assignment).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from dni_seq.app.build.credit_options import GROUP as CREDIT
from dni_seq.app.build.credit_options import CreditOptions, horizons_of, tail_lookahead, without_resolved
from dni_seq.app.runs.options import above_zero, at_least, build, option, share
from dni_seq.distributed.process_group import TIMEOUT
from dni_seq.models.language_model import CELLS
from dni_seq.streams import Corpus
from dni_seq.streams.corpus import default_data_dir

SYNTHESIZER_VOCAB_SIZE = 500
"""Told apart, the rare entries cost as much as the network's own first and last layer, and teach less. (SentencePiece's ids
begin with its 256 bytes, so that of its pieces some 240 are told apart.)"""

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The setting of dni-pytorch's language model, and of PyTorch's word_language_model example.
        "word": {
            "embed": 200,
            "hidden": 200,
            "layers": 2,
            "dropout": 0.2,
            "bptt": 5,
            "batch_size": 20,
            "lr": 1e-3,
            "clip": 0.25,
            "epochs": 6,
        },
        # Two minutes on two cores for the embedded corpus.
        "char": {
            "embed": 64,
            "hidden": 256,
            "layers": 1,
            "dropout": 0.0,
            "bptt": 16,
            "batch_size": 32,
            "lr": 2e-3,
            "clip": 1.0,
            "epochs": 3,
        },
    }
)
"""Defaults that depend on the tokenizer. An option listed here is None until `resolve_options` fills it."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "seed": {"tokenizer": "word", **DEFAULTS["word"]},
        # Zaremba et al. 2014, arXiv 1409.2329, section 4.1, but for the optimizer, which is Adam here.
        "small": {
            "tokenizer": "word",
            "embed": 200,
            "hidden": 200,
            "layers": 2,
            "dropout": 0.0,
            "bptt": 20,
            "batch_size": 20,
            "lr": 1e-3,
            "clip": 5.0,
            "epochs": 13,
        },
        "medium": {
            "tokenizer": "word",
            "embed": 650,
            "hidden": 650,
            "layers": 2,
            "dropout": 0.5,
            "bptt": 35,
            "batch_size": 20,
            "lr": 1e-3,
            "clip": 5.0,
            "epochs": 39,
        },
        "char": {"tokenizer": "char", **DEFAULTS["char"]},
    }
)
"""Known settings for `--preset`: of dni-pytorch's example, of Zaremba's small and medium models, and by characters."""

DTYPES = ("float32", "float64", "bfloat16")


def _by_level(name: str) -> str:
    """The defaults of an option by tokenizer, for --help."""
    return ", ".join(f"{level} {defaults[name]}" for level, defaults in DEFAULTS.items())


def _absolute(path: str) -> str:
    """A path that holds in any working directory."""
    return str(Path(path).absolute())


_DATA, _MODEL, _RUN = "data", "model", "run"


@dataclass(frozen=True)
class LanguageModelOptions(CreditOptions):
    """Everything that `scripts/train_lm.py` can be told."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            "bptt",
            "epochs",
            "max_steps",
            "max_tokens",
            "eval_every",
            "eval_tokens",
            "sample_every",
            "threads",
            "device",
            "compile",
            "data_dir",
        }
    )
    OF_THE_CALL: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume", "eval_only", "dry_run", "rank_timeout"})

    dataset: str | None = option(
        None,
        "name of a data set (an unknown one lists them all), or OWNER/NAME on the Hub",
        group=_DATA,
        shown="pydoc, the embedded one",
    )
    dataset_config: str | None = option(
        None, "the data set's configuration on the Hub", group=_DATA, metavar="NAME", shown="the usual one"
    )
    dataset_revision: str | None = option(
        None, "the data set's branch on the Hub", group=_DATA, metavar="NAME", shown="the usual one"
    )
    text_column: str | None = option(
        None, "column of the text on the Hub, in JSON or Parquet", group=_DATA, metavar="NAME", shown="text"
    )
    data_dir: str | None = option(
        None,
        "looked in before the Hub, as DIR/ptb/ptb.train.txt",
        group=_DATA,
        metavar="DIR",
        convert=_absolute,
        shown="the environment variable DNI_SEQ_DATA, else data",
    )
    data_file: str | None = option(
        None,
        "own text to train on: a file or a quoted pattern; lines of UTF-8, .jsonl or .parquet; .gz, .xz, .bz2 and .zst too",
        group=_DATA,
        metavar="FILE",
        convert=_absolute,
    )
    valid_file: str | None = option(
        None, "own text to validate on", group=_DATA, metavar="FILE", convert=_absolute, shown="a part of --data-file"
    )
    test_file: str | None = option(
        None, "own text to test on", group=_DATA, metavar="FILE", convert=_absolute, shown="a part of --data-file"
    )
    tokenizer: str = option(
        None,
        "what a token is",
        group=_DATA,
        choices=("word", "char", "sentencepiece"),
        shown="word for ptb and wikitext, char for own text, pydoc, tinyshakespeare, text8 and enwik8, else sentencepiece",
    )
    vocab_size: int | None = option(
        None,
        "entries of the vocabulary",
        group=_DATA,
        check=at_least(1),
        shown="all of the training text, 50000 words of a streamed one, 8000 of sentencepiece",
    )
    invalid_utf8: str = option(
        "error", "what to do with bytes that are not UTF-8", group=_DATA, choices=("error", "replace")
    )
    document_reset: bool = option(
        False, "start each document (a line of a text file, a row) from the initial state", group=_DATA
    )
    shuffle_documents: bool = option(False, "another order of documents in each epoch", group=_DATA)

    model: str = option("lstm", "recurrent cell", group=_MODEL, choices=CELLS)
    embed: int = option(None, "embedding size", group=_MODEL, check=at_least(1), shown=_by_level("embed"))
    hidden: int = option(None, "hidden units a layer", group=_MODEL, check=at_least(1), shown=_by_level("hidden"))
    layers: int = option(None, "layers", group=_MODEL, check=at_least(1), shown=_by_level("layers"))
    dropout: float = option(None, "share of activations dropped", group=_MODEL, check=share, shown=_by_level("dropout"))
    tied: bool = option(False, "use the embedding's weights for the projection too", group=_MODEL)
    sparse_embedding: bool = option(
        False, "update only the embedding's rows that a window reads: quicker with many words, other numbers", group=_MODEL
    )

    bptt: int = option(
        None,
        "window length in steps: gradients are exact within it",
        group=CREDIT,
        check=at_least(1),
        shown=_by_level("bptt"),
    )
    synthesizer_vocab_size: int = option(
        SYNTHESIZER_VOCAB_SIZE,
        "kinds of token to paper, state, multi-horizon and the tail of exact: the first entries of the vocabulary, and one "
        "for all others (sentencepiece's begin with 256 bytes)",
        group=CREDIT,
        check=at_least(2),
    )

    epochs: int | None = option(
        None,
        "passes through the training text",
        group=_RUN,
        check=at_least(1),
        shown=_by_level("epochs") + "; no limit where --max-steps or --max-tokens is given",
    )
    max_steps: int | None = option(None, "stop after this many steps (windows)", group=_RUN, check=at_least(1))
    max_tokens: int | None = option(None, "stop after this many tokens", group=_RUN, check=at_least(1))
    batch_size: int = option(
        None, "lanes: texts read side by side", group=_RUN, check=at_least(1), shown=_by_level("batch_size")
    )
    lr: float = option(None, "Adam's learning rate", group=_RUN, check=above_zero, shown=_by_level("lr"))
    clip: float = option(
        None,
        "largest norm of the gradient, 0 for no limit",
        group=_RUN,
        check=at_least(0),
        shown=_by_level("clip"),
    )
    seed: int = option(1111, "of weights, dropout and samples", group=_RUN, check=at_least(0))
    threads: int = option(
        1,
        "CPU threads; two are up to 1.6 times as fast on two idle cores, far slower on busy ones, and change the last bits",
        group=_RUN,
        check=at_least(1),
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, mps", group=_RUN, shown="cuda where there is one, else cpu")
    dtype: str = option(
        "float32", "of the arithmetic; bfloat16 by autocast, with float32 weights", group=_RUN, choices=DTYPES
    )
    compile: bool = option(False, "run the model through torch.compile", group=_RUN)
    run_dir: str | None = option(None, "where the run is kept", group=_RUN, metavar="DIR", shown="a new one in runs/")
    resume: str | None = option(
        None,
        "go on: from the last checkpoint in --run-dir, where there is one, or from RUN_DIR/checkpoints/NAME.pt",
        group=_RUN,
        metavar="auto|PATH",
    )
    dry_run: bool = option(
        False, "print shapes, parameters, memory and the time that an epoch takes, and end; nothing is written", group=_RUN
    )
    eval_only: bool = option(False, "score the best checkpoint in --run-dir and end", group=_RUN)
    eval_every: int | None = option(None, "steps between validations", group=_RUN, check=at_least(1), shown="an epoch")
    eval_tokens: int | None = option(
        None,
        "tokens of a split to score at most",
        group=_RUN,
        check=at_least(1),
        shown="all where the text is held in memory, else 100000",
    )
    sample_every: int | None = option(
        None, "steps between text samples", group=_RUN, check=at_least(1), shown="one at the end"
    )
    rank_timeout: float = option(TIMEOUT, "under torchrun: seconds to wait for another rank", group=_RUN, check=above_zero)


def resolve_options(options: LanguageModelOptions, corpus: Corpus) -> LanguageModelOptions:
    """Fill the options that nobody gave and that depend on others, those of `DEFAULTS` among them."""
    kind = options.tokenizer or corpus.level
    defaults = dict(DEFAULTS["char" if kind == "char" else "word"])
    defaults |= {"tokenizer": kind, "data_dir": _absolute(str(default_data_dir()))}
    if options.max_steps is not None or options.max_tokens is not None:
        del defaults["epochs"]
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return with_default_sizes(dataclasses.replace(options, **missing))


def with_default_sizes(options: LanguageModelOptions) -> LanguageModelOptions:
    """Fill the sizes of a synthesizer that nobody gave, where the tokenizer and T are settled."""
    learned = options.synthesizer in ("state", "multi-horizon") or (options.synthesizer == "exact" and options.tail)
    if not learned:
        return options
    # By words one horizon did better than two. The synthesizer's size depends on both numbers: a resumed run keeps them.
    horizons = horizons_of(options, options.bptt) if options.tokenizer == "char" else options.horizons or 1
    options = dataclasses.replace(options, horizons=horizons)
    return dataclasses.replace(options, lookahead=tail_lookahead(options, options.bptt))


def as_given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a new run takes over from a configuration, a run's or another one; see `without_resolved`."""
    if config.get("tokenizer") is None or config.get("bptt") is None:
        return config
    return without_resolved(config, build(LanguageModelOptions, config), with_default_sizes)
