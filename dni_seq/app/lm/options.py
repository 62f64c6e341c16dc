"""The options of a language-model run, and their defaults by tokenizer.

To add an option: declare it here, and use it in `build.py` (data, model) or `build_trainer.py` (credit assignment).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from dni_seq.app.build.backpropagation_options import BackpropagationOptions
from dni_seq.app.build.credit_options import GROUP as CREDIT
from dni_seq.app.build.credit_options import CreditOptions, without_resolved
from dni_seq.app.build.optimization_options import GROUP as OPTIMIZATION
from dni_seq.app.build.optimization_options import OptimizationOptions, check_optimization
from dni_seq.app.runs.options import above_zero, at_least, build, flag, option, share
from dni_seq.app.runs.trackers import LOGGER_HELP, LOGGERS
from dni_seq.core.paths import expand_home
from dni_seq.distributed.timeout import TIMEOUT
from dni_seq.models.cells import CELLS
from dni_seq.synthesizers.defaults import token_reach

if TYPE_CHECKING:
    from dni_seq.streams import Corpus

SYNTHESIZER_VOCAB_SIZE = 500
"""Default number of token classes of the synthesizer. To distinguish rare tokens would cost as much as the network's own
first and last layer, and would teach little. SentencePiece's ids start with 256 bytes, which leaves about 240 classes to its
most frequent pieces."""

LR = 4e-3
"""Default learning rate, from which the rate falls to `--min-lr` over the run."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The setting of dni-pytorch's language model and of PyTorch's word_language_model example.
        "word": {
            "embed": 200,
            "hidden": 200,
            "layers": 2,
            "dropout": 0.2,
            "bptt": 5,
            "batch_size": 20,
            "lr": LR,
            "schedule": "linear",
            "clip": 0.25,
            "epochs": 6,
        },
        # About a minute of one core for the embedded corpus.
        "char": {
            "embed": 64,
            "hidden": 256,
            "layers": 1,
            "dropout": 0.0,
            "bptt": 16,
            "batch_size": 32,
            "lr": LR,
            "schedule": "linear",
            "clip": 1.0,
            "epochs": 3,
        },
    }
)
"""Defaults that depend on the tokenizer. An option listed here is None until `resolve_options` fills it."""

LR_OF_OTHER_SCHEDULES: Mapping[str, float] = MappingProxyType({"word": 1e-3, "char": 2e-3})
"""Default learning rates by tokenizer for schedules that do not fall to `--min-lr` at the end of the run."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "seed": {"tokenizer": "word", **DEFAULTS["word"], "lr": 1e-3, "schedule": "constant"},
        # Zaremba et al. 2014, arXiv 1409.2329, section 4.1. Their loss is the sum over a window's steps, ours is the
        # mean, and its gradient is 1 / T of theirs. So our rates are theirs times T, our clips theirs divided by T.
        "small": {
            "tokenizer": "word",
            "embed": 200,
            "hidden": 200,
            "layers": 2,
            "dropout": 0.0,
            "bptt": 20,
            "batch_size": 20,
            "optimizer": "sgd",
            "lr": 20.0,
            "clip": 0.25,
            "schedule": "step",
            "decay": 0.5,
            "decay_after": 4,
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
            "optimizer": "sgd",
            "lr": 35.0,
            "clip": 1 / 7,
            "schedule": "step",
            "decay": 1 / 1.2,
            "decay_after": 6,
            "epochs": 39,
        },
        "char": {"tokenizer": "char", **DEFAULTS["char"]},
    }
)
"""Settings for `--preset`: seed (dni-pytorch's example), small and medium (Zaremba et al. 2014), char (characters)."""

DTYPES = ("float32", "float64", "bfloat16")


def _by_level(name: str) -> str:
    """Returns the defaults of an option by tokenizer, as text for --help."""
    return ", ".join(f"{level} {defaults[name]}" for level, defaults in DEFAULTS.items())


def _absolute(path: str) -> str:
    """Returns `path` as an absolute path, with the home directory for a leading `~`."""
    return str(expand_home(path).absolute())


_DATA, _MODEL, _RUN = "data", "model", "run"


@dataclass(frozen=True)
class LanguageModelOptions(OptimizationOptions, BackpropagationOptions, CreditOptions):
    """The options of `scripts/train_lm.py`."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            "bptt",
            "epochs",
            "max_steps",
            "max_tokens",
            "patience",
            "eval_every",
            "eval_tokens",
            "sample_every",
            "threads",
            "device",
            "compile",
            "logger",
            "data_dir",
        }
    )
    MAY_MOVE: ClassVar[frozenset[str]] = frozenset({"data_file", "valid_file", "test_file"})
    COMMON: ClassVar[frozenset[str]] = frozenset(
        {"dataset", "data_file", "data_dir", "tokenizer", "epochs", "max_steps", "batch_size", "lr", "schedule"}
        | {"seed", "device", "run_dir", "resume", "dry_run", "model", "hidden", "dropout"}
        | {"synthesizer", "bptt", "horizons"}
    )
    RECORDED_LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({"schedule": "constant"})
    GROUPS: ClassVar[tuple[str, ...]] = (_DATA, _RUN, OPTIMIZATION, _MODEL, CREDIT)
    OF_THE_CALL: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume", "eval_only", "dry_run", "rank_timeout"})

    dataset: str | None = option(
        None,
        "data set name (an unknown one lists all), or OWNER/NAME on the Hub",
        group=_DATA,
        shown="pydoc, embedded",
    )
    dataset_config: str | None = option(
        None, "configuration of the data set on the Hub", group=_DATA, metavar="NAME", shown="the data set's own"
    )
    dataset_revision: str | None = option(
        None, "branch of the data set on the Hub", group=_DATA, metavar="NAME", shown="the data set's own"
    )
    text_column: str | None = option(
        None, "name of the text column on the Hub, in JSON or in Parquet", group=_DATA, metavar="NAME", shown="text"
    )
    data_dir: str | None = option(
        None,
        "directory searched before the Hub; for files such as DIR/ptb/ptb.train.txt",
        group=_DATA,
        metavar="DIR",
        convert=_absolute,
        shown="the environment variable DNI_SEQ_DATA, else data",
    )
    data_file: str | None = option(
        None,
        "training text: file or quoted pattern; UTF-8 lines, .jsonl or .parquet; also .gz, .xz, .bz2, .zst",
        group=_DATA,
        metavar="FILE",
        convert=_absolute,
    )
    valid_file: str | None = option(
        None,
        "validation text for --data-file",
        group=_DATA,
        metavar="FILE",
        convert=_absolute,
        shown="a part of --data-file",
    )
    test_file: str | None = option(
        None, "test text for --data-file", group=_DATA, metavar="FILE", convert=_absolute, shown="a part of --data-file"
    )
    tokenizer: str = option(
        None,
        "kind of tokens",
        group=_DATA,
        choices=("word", "char", "sentencepiece"),
        shown="word for ptb and wikitext; char for --data-file, pydoc, tinyshakespeare, text8, enwik8; else sentencepiece",
    )
    vocab_size: int | None = option(
        None,
        "vocabulary size in tokens",
        group=_DATA,
        check=at_least(1),
        shown="all tokens of the training text; 50000 words if streamed; sentencepiece 8000",
    )
    invalid_utf8: str = option("error", "how to handle bytes that are not UTF-8", group=_DATA, choices=("error", "replace"))
    null_text: str = option(
        "error",
        "how to handle rows whose text is null, in JSON, Parquet or on the Hub",
        group=_DATA,
        choices=("error", "skip"),
    )
    document_reset: bool = option(
        False, "reset the hidden state at each document (a line of a text file, or a row)", group=_DATA
    )
    shuffle_documents: bool = option(False, "shuffle the documents in every epoch", group=_DATA)

    model: str = option("lstm", "recurrent cell", group=_MODEL, choices=CELLS)
    embed: int = option(None, "embedding size", group=_MODEL, check=at_least(1), shown=_by_level("embed"))
    hidden: int = option(None, "hidden units per layer", group=_MODEL, check=at_least(1), shown=_by_level("hidden"))
    layers: int = option(None, "recurrent layers", group=_MODEL, check=at_least(1), shown=_by_level("layers"))
    dropout: float = option(None, "dropout probability", group=_MODEL, check=share, shown=_by_level("dropout"))
    tied: bool = option(False, "share the embedding's weights with the output projection", group=_MODEL)
    sparse_embedding: bool = option(
        False, "update only embedding rows that the window reads: faster for many words, different results", group=_MODEL
    )

    bptt: int = option(
        None,
        "window length T in steps; gradients are exact within a window",
        group=CREDIT,
        check=at_least(1),
        shown=_by_level("bptt"),
    )
    synthesizer_vocab_size: int = option(
        SYNTHESIZER_VOCAB_SIZE,
        "token classes that the synthesizer distinguishes: the vocabulary's first entries, and one class for all others",
        group=CREDIT,
        check=at_least(2),
    )

    epochs: int | None = option(
        None,
        "passes over the training text",
        group=_RUN,
        check=at_least(1),
        shown=_by_level("epochs") + "; no limit if --max-steps or --max-tokens is given",
    )
    max_steps: int | None = option(None, "stop after this many training steps (windows)", group=_RUN, check=at_least(1))
    max_tokens: int | None = option(None, "stop after this many training tokens", group=_RUN, check=at_least(1))
    batch_size: int = option(
        None,
        "batch size B: lanes of text that are read in parallel",
        group=_RUN,
        check=at_least(1),
        shown=_by_level("batch_size"),
    )
    lr: float = option(
        None,
        "highest learning rate of the model",
        group=OPTIMIZATION,
        check=above_zero,
        shown="0.004 with linear and cosine, else word 0.001, char 0.002; sgd has none",
    )
    clip: float = option(
        None,
        "largest gradient norm of the model; 0: no limit",
        group=OPTIMIZATION,
        check=at_least(0),
        shown=_by_level("clip"),
    )
    seed: int = option(1111, "random seed of weights, dropout and samples", group=_RUN, check=at_least(0))
    threads: int = option(
        1,
        "CPU threads; two idle cores can be 1.3 times as fast; results differ in rounding",
        group=_RUN,
        check=at_least(1),
    )
    device: str | None = option(None, "device: cpu, cuda, cuda:1, mps", group=_RUN, shown="cuda if available, else cpu")
    dtype: str = option(
        "float32", "arithmetic type; bfloat16 uses autocast with float32 weights", group=_RUN, choices=DTYPES
    )
    compile: bool = option(False, "compile the model with torch.compile", group=_RUN)
    run_dir: str | None = option(None, "directory of the run", group=_RUN, metavar="DIR", shown="a new one in runs/")
    resume: str | None = option(
        None,
        "resume the run in --run-dir if there is one (auto), or in RUN_DIR; or from RUN_DIR/checkpoints/NAME.pt",
        group=_RUN,
        metavar="auto|PATH",
    )
    logger: str = option("tensorboard", LOGGER_HELP, group=_RUN, choices=LOGGERS)
    dry_run: bool = option(
        False, "print shapes, parameters, memory and time per epoch; then exit without writing files", group=_RUN
    )
    eval_only: bool = option(False, "score the best checkpoint in --run-dir, then exit", group=_RUN)
    eval_every: int | None = option(
        None, "steps between validations", group=_RUN, check=at_least(1), shown="one epoch, 1000 if streamed"
    )
    eval_tokens: int | None = option(
        None,
        "largest number of tokens to score of a split",
        group=_RUN,
        check=at_least(1),
        shown="all if the text is in memory, else 100000",
    )
    sample_every: int | None = option(
        None, "steps between text samples", group=_RUN, check=at_least(1), shown="one sample at the end"
    )
    rank_timeout: float = option(TIMEOUT, "torchrun: seconds to wait for another rank", group=_RUN, check=above_zero)


def resolve_options(options: LanguageModelOptions, corpus: Corpus) -> LanguageModelOptions:
    """Returns the options with the missing values filled in: those in `DEFAULTS`, and others that depend on the corpus.

    Raises:
        ValueError: a learning rate is missing, or the lowest one is not below the highest.
    """
    from dni_seq.streams.corpus import default_data_dir  # with torch, for which the parsing of options does not wait

    kind = options.tokenizer or corpus.level
    defaults = dict(DEFAULTS["char" if kind == "char" else "word"])
    defaults |= {"tokenizer": kind, "data_dir": _absolute(str(default_data_dir()))}
    if options.max_steps is not None or options.max_tokens is not None:
        del defaults["epochs"]
    elif not corpus.train.small or options.document_reset:
        defaults["schedule"] = "constant"  # nobody knows how long the run will be
    if not dataclasses.replace(options, schedule=options.schedule or defaults["schedule"]).falls_to_the_end:
        defaults["lr"] = LR_OF_OTHER_SCHEDULES["char" if kind == "char" else "word"]
    if options.optimizer == "sgd" and options.lr is None:
        raise ValueError("--optimizer sgd needs --lr, for example --lr 20 --clip 0.25 for words")
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    options = dataclasses.replace(options, **missing)
    check_optimization(options, options.lr)
    return with_default_sizes(options)


def check_spans(options: LanguageModelOptions, name: str, steps: int) -> None:
    """Checks that no window, and nothing that is used after a window, is longer than a lane of the training text.

    Args:
        options: options from `resolve_options`.
        name: name of the text, for messages.
        steps: number of steps in a lane; `longest_span` steps are enough.

    Raises:
        ValueError: an option needs a longer lane; the message names the option and its largest value.
    """
    for option_name, span in _spans(options).items():
        if span > steps:
            value = getattr(options, option_name)
            most = 1 + steps // options.bptt if option_name == "horizons" else steps
            raise ValueError(
                f"{flag(option_name)} {value} is too large: a lane of {name} has room for {steps} steps; use {most} or "
                "less, give more text, or lower --batch-size (lanes)"
            )


def longest_span(options: LanguageModelOptions) -> int:
    """Returns the number of steps that a lane must have for `check_spans` to accept the options."""
    return max(_spans(options).values())


def _spans(options: LanguageModelOptions) -> Mapping[str, int]:
    """Returns the number of steps that a lane must have for each option that is counted in steps or windows."""
    spans = {"bptt": options.bptt}
    if options.synthesizer == "exact":
        spans["exact_steps"] = options.exact_steps
    if options.synthesizer in ("paper", "state", "multi-horizon") or (options.synthesizer == "exact" and options.tail):
        horizons, lookahead = options.horizons or 1, options.lookahead or 0
        spans["horizons"] = (horizons - 1) * options.bptt  # up to the start of the last horizon
        if lookahead > horizons * options.bptt:  # a default lookahead ends with the last horizon
            spans["lookahead"] = lookahead
    return spans


def with_default_sizes(options: LanguageModelOptions) -> LanguageModelOptions:
    """Returns the options with the synthesizer's missing sizes filled in. The tokenizer and T must be known."""
    if not options.has_state_network:
        return options
    # The synthesizer's size depends on both numbers, so they are recorded.
    if options.has_default_reach:
        horizons, lookahead = token_reach(options.bptt, options.tokenizer == "char")
    else:
        horizons, lookahead = options.horizons_at(options.bptt), options.lookahead_at(options.bptt)
    return dataclasses.replace(options, horizons=horizons, lookahead=lookahead)


def as_given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the options that a new run takes from a configuration file; see `without_resolved`."""
    if config.get("tokenizer") is None or config.get("bptt") is None:
        return config  # written by hand: an old run's file names both
    config = {**LanguageModelOptions.RECORDED_LATER, **config}
    return without_resolved(config, build(LanguageModelOptions, config), with_default_sizes)
