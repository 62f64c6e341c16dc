"""The lines that a run begins with: its text, its model, and how it trains where."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import nn

from dni_seq.app.build.method import brief_method
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.streams import Tokenizer, WindowStream

UNITS = MappingProxyType({"word": "words", "char": "characters", "sentencepiece": "SentencePiece pieces"})
"""What a tokenizer cuts a text into, by its kind."""


def introduction(
    options: LanguageModelOptions,
    name: str,
    tokenizer: Tokenizer,
    stream: WindowStream,
    model: nn.Module,
    device: torch.device,
    run: RunDirectory,
) -> Iterator[str]:
    """Yields three lines: text and vocabulary, model and parameters, method with device and run directory.

    Args:
        options: options from `resolve_options`.
        name: name of the corpus.
        tokenizer: the run's tokenizer.
        stream: the training text.
        model: the model.
        device: its device.
        run: the directory of the run.
    """
    units, tokens = UNITS[tokenizer.kind], stream.tokens_per_epoch
    length = f"read by {units}" if tokens is None else f"{tokens:,} {units} to train on"
    yield f"text: {name}, {length}; a vocabulary of {tokenizer.vocabulary_size:,} {units}"
    layers = "1 layer" if options.layers == 1 else f"{options.layers} layers"
    count = in_words(sum(parameter.numel() for parameter in model.parameters()))
    yield f"model: {options.model.upper()}, {layers} of {options.hidden} units, {count} parameters"
    yield f"method: {brief_method(options.resolve(options.bptt), options)}; device {device}; run directory {run.path}"


def in_words(count: int) -> str:
    """Returns a count in at most three digits and a unit: "870", "87 K", "1.2 M"."""
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " K")):
        if round(count / size, 1) >= 1:
            number = count / size
            return f"{number:.1f}{unit}" if number < 9.95 else f"{number:.0f}{unit}"
    return str(count)
