"""The parts that the language-model scripts share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dni_seq.app.build.device import device_of
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.options import DEFAULTS, LanguageModelOptions, resolve_options
from dni_seq.app.runs.resume import config_of
from dni_seq.streams import CharTokenizer, WordTokenizer, open_corpus

CPU = torch.device("cpu")
TINY = {"embed": 4, "hidden": 4, "layers": 1, "dropout": 0.0}


def test_settled_options_are_complete():
    settled = resolve_options(LanguageModelOptions(), open_corpus())
    needed = {*DEFAULTS["char"], "tokenizer", "data_dir"}
    assert {name for name in needed if getattr(settled, name) is None} == set()
    assert settled.tokenizer == "char"
    assert settled.bptt == DEFAULTS["char"]["bptt"]


def test_word_level_is_dni_pytorchs_setting():
    settled = resolve_options(LanguageModelOptions(tokenizer="word"), open_corpus())
    setting = ("model", "layers", "hidden", "embed", "tied", "batch_size", "bptt", "dropout", "lr", "clip", "epochs", "seed")
    assert [getattr(settled, name) for name in setting] == ["lstm", 2, 200, 200, False, 20, 5, 0.2, 1e-3, 0.25, 6, 1111]


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
