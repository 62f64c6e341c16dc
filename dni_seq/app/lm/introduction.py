"""The three lines that a run prints first: its text, its model, and its method with the device and the run directory."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import nn

from dni_seq.app.build.method import brief_method, describe_model
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.streams import Tokenizer, WindowStream

UNITS = MappingProxyType({"word": "words", "char": "characters", "sentencepiece": "SentencePiece pieces"})
"""The name of a text's tokens, by the kind of tokenizer."""


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
        device: the model's device.
        run: the directory of the run.
    """
    units, tokens = UNITS[tokenizer.kind], stream.tokens_per_epoch
    length = f"read by {units}" if tokens is None else f"{tokens:,} {units} to train on"
    yield f"text: {name}, {length}; a vocabulary of {tokenizer.vocabulary_size:,} {units}"
    yield describe_model(model, options.model, options.layers, options.hidden)
    yield f"method: {brief_method(options.resolve(options.bptt), options)}; device {device}; run directory {run.path}"
