"""The parts that the options build: what each switch takes away or adds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.app.build.credit import build_synthesizer, trainer_settings
from dni_seq.app.build.credit_options import SYNTHESIZERS, CreditOptions
from dni_seq.app.lm.build import build_model
from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import LanguageModelOptions, resolve_options
from dni_seq.app.runs.options import build
from dni_seq.core.windows import Lookahead
from dni_seq.streams import open_corpus
from dni_seq.synthesizers.base import predict, regress
from dni_seq.synthesizers.binding import bind
from dni_seq.synthesizers.defaults import HORIZONS, MEASURE_EVERY
from dni_seq.synthesizers.target_rule import rule_of
from tests.app.specs import spec_of_vectors

BPTT, LANES = 2, 3


def made(**given: Any) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], Lookahead | None]:
    """A synthesizer whose every weight is random, a state with saturated cells, and its context."""
    credit = build(CreditOptions, {"fit": "descent"} | given).resolve(BPTT)
    torch.manual_seed(0)
    spec = spec_of_vectors()
    synthesizer = build_synthesizer(credit, spec)
    assert synthesizer is not None
    bind(synthesizer, window=BPTT, reduction="mean", state_batch_dim=1, state=spec.example)
    for parameter in synthesizer.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = (torch.randn(1, LANES, 8), torch.full((1, LANES, 8), 20.0))
    steps = credit.window_lookahead
    ahead = Lookahead(torch.randn(steps, LANES, 2), torch.randn(steps, LANES, 2), torch.ones(steps, LANES).bool(), None)
    return synthesizer, state, ahead if steps else None


def message(synthesizer: nn.Module, state: Any, ahead: Lookahead | None) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([torch.cat([h, c]) for h, c in predict(synthesizer, state, ahead)])


LEARNED = ("basic", "paper", "state", "multi-horizon")


def test_the_published_recipe_sees_the_next_input_and_not_its_target():
    synthesizer, state, ahead = made(synthesizer="paper")
    assert ahead is not None
    assert len(ahead.inputs) == 1
    first = message(synthesizer, state, ahead)
    assert torch.equal(message(synthesizer, state, ahead._replace(targets=ahead.targets + 1)), first)
    assert not torch.equal(message(synthesizer, state, ahead._replace(inputs=ahead.inputs + 1)), first)
    gone = ahead._replace(valid=torch.zeros(1, LANES).bool())
    assert torch.equal(
        message(synthesizer, state, gone), message(synthesizer, state, gone._replace(inputs=ahead.inputs + 1))
    )


def test_a_lookahead_that_is_asked_for_shows_the_targets():
    synthesizer, state, ahead = made(synthesizer="paper", lookahead=3)
    assert ahead is not None
    assert len(ahead.inputs) == 3
    changed = ahead._replace(targets=ahead.targets + 1)
    assert not torch.equal(message(synthesizer, state, changed), message(synthesizer, state, ahead))
    assert made(synthesizer="paper", lookahead=0)[2] is None


def test_the_published_recipe_consumes_a_tenth_in_both_places():
    synthesizer, _, _ = made(synthesizer="paper")
    settings = trainer_settings(CreditOptions(synthesizer="paper").resolve(BPTT))
    rule = rule_of(synthesizer, settings["synthetic_scale"], settings["discount"])
    assert (rule.local, rule.bootstrap, rule.injection) == ([1.0], [[0.1]], [0.1])


@pytest.mark.parametrize("kind", LEARNED)
def test_the_gate_closes_saturated_cells(kind):
    """1 - tanh²(20) is zero in float32."""
    for gate in (True, False):
        synthesizer, state, ahead = made(synthesizer=kind, gate=gate, normalize=False)
        with torch.no_grad():
            ((h, c),) = predict(synthesizer, state, ahead)
        assert h.abs().min() > 0
        assert (c == 0).all() if gate else c.abs().min() > 0


@pytest.mark.parametrize("kind", LEARNED)
def test_normalised_messages_are_in_units_of_their_targets(kind):
    """The same weights, drawn from the same seed: zero before the first target, then as large as the targets."""
    synthesizer, state, ahead = made(synthesizer=kind, normalize=False)
    bare = message(synthesizer, state, ahead)
    assert bare.any()
    synthesizer, state, ahead = made(synthesizer=kind, normalize=True, message_clip=0.0, future_units=0)
    assert not message(synthesizer, state, ahead).any()
    regress(synthesizer, state, ahead, [tuple(torch.full_like(leaf, 1000.0) for leaf in state)])
    torch.testing.assert_close(message(synthesizer, state, ahead), bare * 1000)


def test_horizons_and_a_tail_can_be_added_to_the_published_recipe():
    synthesizer, state, ahead = made(synthesizer="paper", horizons=2, tail=True)
    assert len(predict(synthesizer, state, ahead)) == 3
    rule = rule_of(synthesizer, 0.5, 0.1)
    assert rule.local == [1.0, 0.0, 0.0]
    assert rule.bootstrap == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.1]]
    assert rule.injection == pytest.approx([0.5, 0.05, 0.005])


def test_every_name_is_built_or_none():
    for kind in set(SYNTHESIZERS) - {"none"}:
        synthesizer, state, ahead = made(synthesizer=kind)
        assert len(predict(synthesizer, state, ahead)) == 1


@pytest.mark.parametrize("kind", ["state", "multi-horizon"])
def test_what_messages_are_by_default_and_when_asked(kind):
    for fit, expected in (
        (None, dni.FutureGradient if kind == "multi-horizon" else dni.LeastSquaresHeads),
        ("least-squares", dni.LeastSquaresHeads),
        ("descent", dni.StateHeads),
    ):
        given = {} if fit is None else {"fit": fit}
        options = build(CreditOptions, {"synthesizer": kind, **given})
        assert type(getattr(built(options), "heads", built(options))) is expected
    with pytest.raises(ValueError, match="features to learn"):
        built(build(CreditOptions, {"synthesizer": kind, "synthesizer_layers": 0, "lookahead": 0}))


def test_the_exact_futures_tail_is_the_future_model():
    tail = built(build(CreditOptions, {"synthesizer": "exact", "tail": True})).tail
    assert isinstance(tail, dni.FutureGradient)
    assert (tail.network.horizons, tail.model.steps) == (1, BPTT)


def test_what_is_fitted_is_clipped_and_what_is_self_supervised_is_not():
    def clip(**given):
        chosen = build(CreditOptions, {"synthesizer": "multi-horizon"} | given).resolve(BPTT)
        return trainer_settings(chosen)["synthesizer_clip"]

    assert clip() == math.inf
    assert clip(fit="descent") == clip(synthesizer="basic") == clip(synthesizer="state") == 1.0
    assert clip(synthesizer_clip=3.0) == clip(fit="descent", synthesizer_clip=3.0) == 3.0
    assert clip(fit="descent", synthesizer_clip=0.0) == math.inf


def test_what_needs_no_targets_computes_few():
    def settings(**given):
        chosen = build(CreditOptions, {"synthesizer": "multi-horizon"} | given).resolve(BPTT)
        return trainer_settings(chosen)["regress_every"], chosen.state_products

    assert settings() == (MEASURE_EVERY, HORIZONS / MEASURE_EVERY)
    assert settings(horizons=1) == (MEASURE_EVERY, 1 / MEASURE_EVERY)
    assert settings(regress_every=4, horizons=1) == (4, 1 / 4)
    assert settings(fit="descent") == (4, 0)
    assert settings(fit="descent", horizons=2) == (4, 2 / 4)


@pytest.mark.parametrize("kind", ["state", "multi-horizon"])
def test_the_future_model(kind):
    """There by default, unless it has nothing ahead, or no targets of one unit beside it."""

    def sizes(outputs: int = 2, **given: Any) -> list[tuple[int, int]]:
        found = built(build(CreditOptions, {"synthesizer": kind, **given}), outputs)
        models = [part for part in found.modules() if isinstance(part, dni.FutureModel)]
        return [(model.units, model.output.out_features) for model in models]

    assert sizes() == [(256, 2)]
    assert sizes(outputs=70, future_units=8) == [(8, 70)]
    assert sizes(future_units=0) == sizes(lookahead=0) == sizes(normalize=False) == []
    with pytest.raises(ValueError, match="needs normalised targets"):
        sizes(normalize=False, future_units=8)


def test_the_rarest_of_many_entries_are_one_to_the_future_model():
    """As though each of them were the same word, where it is read and where it is predicted."""
    many, max_classes = 30, 25
    last = max_classes - 1
    trainer = trainer_of_words(many, max_classes)
    (model,) = (part for part in trainer.credit.synthesizer.modules() if isinstance(part, dni.FutureModel))
    steps = model.steps
    targets = torch.tensor([[3], [last], [last + 1], [many - 1]]).expand(4, steps).T.contiguous()
    valid = torch.ones_like(targets, dtype=torch.bool)
    few = targets.clamp(max=last)
    assert len(few.unique()) == 2
    state = torch.randn(4, trainer.credit.synthesizer.heads.packing.size)
    found, read, predicted = (
        model(state, Lookahead(inputs, shown, valid))[1]
        for inputs, shown in ((targets, targets), (few, targets), (targets, few))
    )
    assert torch.equal(found, read)
    assert torch.equal(found, predicted)
    assert not torch.equal(found, model(state, Lookahead(targets.flip(1), targets, valid))[1])
    logits = torch.randn(steps, 4, max_classes)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), few.flatten(), reduction="none").view_as(few)
    torch.testing.assert_close(model.loss_fn(logits, targets), losses)


@pytest.mark.parametrize("kind", ["paper", "state", "multi-horizon", "exact"])
def test_the_synthesizers_vocabulary_is_as_large_as_asked_for_and_no_larger_than_there_is(kind):
    def rows(max_classes: int) -> set[int]:
        given = {"synthesizer": kind, "tail": kind == "exact"}
        # The exact future holds the network itself, whose vocabulary is the whole one.
        synthesizer = trainer_of_words(30, max_classes, **given).credit.synthesizer
        parts = list((synthesizer.tail if kind == "exact" else synthesizer).modules())
        read = {part.num_embeddings for part in parts if isinstance(part, nn.Embedding)}
        predicted = {part.output.out_features for part in parts if isinstance(part, dni.FutureModel)}
        assert bool(predicted) == (kind != "paper")
        return read | predicted

    assert rows(29) == {29}
    assert rows(30) == rows(31) == {30}


def trainer_of_words(vocabulary: int, max_classes: int, **given: Any) -> dni.SequenceTrainer:
    chosen = LanguageModelOptions(tokenizer="word", embed=4, hidden=4, synthesizer_vocab_size=max_classes, **given)
    options = resolve_options(chosen, open_corpus())
    return build_trainer(options, build_model(options, vocabulary, torch.device("cpu")), torch.device("cpu"))


def built(options: CreditOptions, outputs: int = 2) -> nn.Module:
    spec = spec_of_vectors(outputs, lambda found, targets: found.mean(-1))
    found = build_synthesizer(options.resolve(BPTT), spec)
    assert found is not None
    return found
