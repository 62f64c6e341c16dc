"""The parts that the language-model scripts share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dni_seq.app.build.device import device_of
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.options import DEFAULTS, PRESETS, LanguageModelOptions, resolve_options
from dni_seq.app.runs.resume import config_of
from dni_seq.streams import CharTokenizer, WordTokenizer, files, open_corpus

CPU = torch.device("cpu")
TINY = {"embed": 4, "hidden": 4, "layers": 1, "dropout": 0.0}


def test_settled_options_are_complete():
    settled = resolve_options(LanguageModelOptions(), open_corpus())
    needed = {*DEFAULTS["char"], "tokenizer", "data_dir"}
    assert {name for name in needed if getattr(settled, name) is None} == set()
    assert settled.tokenizer == "char"
    assert settled.bptt == DEFAULTS["char"]["bptt"]


def test_seed_is_dni_pytorchs_setting():
    settled = resolve_options(LanguageModelOptions(**PRESETS["seed"]), open_corpus())
    setting = ("model", "layers", "hidden", "embed", "tied", "batch_size", "bptt", "dropout", "lr", "clip", "epochs", "seed")
    assert [getattr(settled, name) for name in setting] == ["lstm", 2, 200, 200, False, 20, 5, 0.2, 1e-3, 0.25, 6, 1111]
    assert settled.schedule == "constant"


@pytest.mark.parametrize(
    ("given", "schedule", "rate"),
    [
        ({}, "linear", 4e-3),
        ({"schedule": "cosine"}, "cosine", 4e-3),
        ({"schedule": "constant"}, "constant", 1e-3),
        ({"schedule": "plateau"}, "plateau", 1e-3),
        ({"document_reset": True}, "constant", 1e-3),  # the length of an epoch is not known
        ({"document_reset": True, "max_steps": 9}, "linear", 4e-3),
        ({"max_tokens": 900}, "linear", 4e-3),
        ({"lr": 0.5}, "linear", 0.5),
        ({"optimizer": "sgd", "lr": 20.0}, "linear", 20.0),
    ],
)
def test_the_rate_of_words_falls_over_a_run_of_known_length(given, schedule, rate):
    settled = resolve_options(LanguageModelOptions(tokenizer="word", **given), open_corpus())
    assert (settled.schedule, settled.lr) == (schedule, rate)


def test_the_rate_of_a_streamed_text_is_constant_unless_the_run_has_a_length(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "IN_MEMORY_BYTES", 0)
    (tmp_path / "text.txt").write_text("a line of words\n" * 99)
    corpus = open_corpus(data_file=tmp_path / "text.txt")
    found = [
        resolve_options(LanguageModelOptions(tokenizer="word", max_steps=steps), corpus).schedule for steps in (None, 9)
    ]
    assert found == ["constant", "linear"]


def test_what_is_given_stays():
    options = LanguageModelOptions(hidden=7, max_steps=3, dropout=0.0, clip=0.0, data_dir="/somewhere", lr=0.5)
    settled = resolve_options(options, open_corpus())
    assert (settled.hidden, settled.dropout, settled.clip, settled.data_dir) == (7, 0.0, 0.0, "/somewhere")
    assert settled.epochs is None


def test_the_configuration_omits_what_is_of_the_call():
    config = config_of(LanguageModelOptions(run_dir="runs/a", resume="auto"))
    assert not {"run_dir", "resume", "eval_only"} & set(config)
    assert {
        field.name for field in dataclasses.fields(LanguageModelOptions)
    } >= LanguageModelOptions.MAY_CHANGE | LanguageModelOptions.OF_THE_CALL


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtypes(dtype):
    options = LanguageModelOptions(model="gru", dtype=dtype, **TINY)
    model = lm.build_model(options, 9, CPU)
    assert model.projection.weight.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert lm.autocast_of(options) == (torch.bfloat16 if dtype == "bfloat16" else None)


def test_a_dtype_that_the_processor_lacks_is_refused_at_construction():
    options = LanguageModelOptions(model="lstm", dtype="bfloat16", **TINY)
    model = lm.build_model(dataclasses.replace(options, dtype="float32"), 9, CPU)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros((2, 2), dtype=torch.int64), model.initial_state(2))
    except RuntimeError:
        with pytest.raises(ValueError, match="use --dtype float32"):
            lm.build_model(options, 9, CPU)
    else:
        lm.build_model(options, 9, CPU)


@pytest.mark.parametrize("name", ["nothing", "cuda:99", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="cannot be used here"):
        device_of(name)


def test_samples_begin_with_their_prompt():
    for tokenizer, prompt in ((CharTokenizer.train(["ab c\n"]), "ab"), (WordTokenizer.train(["ab c\n"]), "ab c")):
        torch.manual_seed(0)
        model = lm.build_model(LanguageModelOptions(**TINY), tokenizer.vocabulary_size, CPU)
        text = lm.sample_text(model, tokenizer, prompt=prompt, length=9, seed=1)
        assert text.startswith(prompt)
        assert text == lm.sample_text(model, tokenizer, prompt=prompt, length=9, seed=1)
        assert len(tokenizer.encode(text)) >= 9
        with pytest.raises(ValueError, match="length of a sample"):
            lm.sample_text(model, tokenizer, length=0, seed=1)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"bptt": 39}, None),
        ({"bptt": 40}, "--bptt 40 is too large: .* room for 39 steps; use 39 or less"),
        ({"bptt": 2**62}, f"--bptt {2**62} is too large"),
        ({"bptt": 40, "synthesizer": "none"}, "--bptt 40 is too large"),
        ({"bptt": 5, "horizons": 8}, None),
        ({"bptt": 5, "horizons": 9}, "--horizons 9 is too large: .* room for 39 steps; use 8 or less"),
        ({"bptt": 5, "horizons": 10**9, "synthesizer": "none"}, None),
        ({"bptt": 5, "horizons": 1, "lookahead": 39}, None),
        ({"bptt": 5, "horizons": 1, "lookahead": 40}, "--lookahead 40 is too large: .*; use 39 or less"),
        ({"bptt": 5, "synthesizer": "state", "lookahead": 10**12}, "--lookahead 1000000000000 is too large"),
        ({"bptt": 5, "synthesizer": "paper", "lookahead": 40}, "--lookahead 40 is too large"),
        ({"bptt": 5, "synthesizer": "basic", "lookahead": 40}, None),
        ({"bptt": 5, "synthesizer": "exact", "exact_steps": 39}, None),
        ({"bptt": 5, "synthesizer": "exact", "exact_steps": 40}, "--exact-steps 40 is too large: .*; use 39 or less"),
        ({"bptt": 5, "exact_steps": 40}, None),
        ({"bptt": 5, "synthesizer": "exact", "tail": True, "lookahead": 40}, "--lookahead 40 is too large"),
    ],
)
def test_spans_that_are_longer_than_a_lane_are_refused(given, refused, held, tmp_path, monkeypatch):
    """2 lanes of 40 characters, so of 39 steps. The default lookahead of the longest window is accepted."""
    monkeypatch.setattr(files, "IN_MEMORY_BYTES", 1000 if held else 0)
    path = tmp_path / "own.txt"
    path.write_text("a line\n" * 11 + "abc")
    corpus = open_corpus(data_file=path, valid_file=path, test_file=path)
    options = resolve_options(LanguageModelOptions(batch_size=2, **given), corpus)
    tokenizer = lm.build_tokenizer(options, corpus)
    if refused is None:
        next(iter(lm.open_training(corpus, tokenizer, options)))
        return
    with pytest.raises(ValueError, match=refused) as caught:
        lm.open_training(corpus, tokenizer, options)
    assert str(path) in str(caught.value)
    assert "lower --batch-size" in str(caught.value)


def test_validation_text_may_be_shorter_than_a_window(tmp_path):
    path, short = tmp_path / "own.txt", tmp_path / "short.txt"
    path.write_text("a line\n" * 40)
    short.write_text("a line\n")
    corpus = open_corpus(data_file=path, valid_file=short, test_file=path)
    options = resolve_options(LanguageModelOptions(batch_size=2, bptt=20, **TINY), corpus)
    tokenizer = lm.build_tokenizer(options, corpus)
    model = lm.build_model(options, tokenizer.vocabulary_size, CPU)
    split = lm.open_split(corpus, "valid", tokenizer, options)
    assert split.tokens_per_epoch == 4
    assert lm.score(model, split, options).loss > 0
