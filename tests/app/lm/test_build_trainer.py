"""The trainer that the options ask for."""

from __future__ import annotations

import pytest
import torch

import dni_seq as dni
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import LanguageModelOptions, resolve_options
from dni_seq.streams import open_corpus

CPU = torch.device("cpu")
V, T, B = 9, 4, 3


def trainer_of(**given) -> dni.SequenceTrainer:
    tiny = {"embed": 6, "hidden": 6, "layers": 2, "dropout": 0.5, "bptt": T, "batch_size": B}
    options = resolve_options(LanguageModelOptions(**tiny | given), open_corpus())
    torch.manual_seed(options.seed)
    return build_trainer(options, lm.build_model(options, V, CPU), CPU)


def losses_of(trainer: dni.SequenceTrainer, ahead: int = 0) -> list[float]:
    """Of the same window three times, and as often what follows it, where a synthesizer looks `ahead`."""
    text = torch.arange((T + ahead + 1) * B).view(T + ahead + 1, B) % V
    behind = dni.Lookahead(text[T:-1], text[T + 1 :], torch.ones(ahead, B, dtype=torch.bool)) if ahead else None
    return [trainer.step(text[:T], text[1 : T + 1], lookahead=behind).loss.item() for _ in range(3)]


@pytest.mark.parametrize("model", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("synthesizer", "ahead"), [("basic", 0), ("multi-horizon", 2 * T)])
def test_a_synthesizer_for_every_cell_and_dtype(model, dtype, synthesizer, ahead):
    given = {"model": model, "dtype": dtype, "synthesizer": synthesizer}
    trainer = trainer_of(**given, synthetic_scale="0.5", discount=0.8, clip=0.3)
    settings = trainer.credit.settings
    assert (settings.scale, settings.discount, trainer.clip) == (0.5, 0.8, 0.3)
    parameters = list(trainer.credit.synthesizer.parameters())
    assert {parameter.dtype for parameter in parameters} == {getattr(torch, dtype)}
    before = [parameter.detach().clone() for parameter in parameters]
    losses_of(trainer, ahead)
    assert not any(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


def test_nothing_injected_is_truncated_bptt_with_the_same_dropout():
    plain = losses_of(trainer_of(synthesizer="none"))
    assert losses_of(trainer_of(synthesizer="basic", synthetic_scale="0")) == plain
    assert losses_of(trainer_of(synthesizer="multi-horizon", synthetic_scale="0"), 2 * T) == plain
    assert losses_of(trainer_of(synthesizer="none", seed=2)) != plain


def test_no_clipping():
    assert trainer_of(clip=0.0).clip is None


def test_learning_rates_reach_their_optimizers():
    trainer = trainer_of(lr=0.5, synthesizer_lr=0.25)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert trainer.credit.optimizer.param_groups[0]["lr"] == 0.25


def test_bfloat16_trains_by_autocast():
    trainer = trainer_of(model="gru", dtype="bfloat16", synthesizer="none")
    assert trainer.runner.autocast == torch.bfloat16
    half = losses_of(trainer)  # before the other trainer takes over the random numbers that dropout draws
    full = losses_of(trainer_of(model="gru", synthesizer="none"))
    # bfloat16 keeps 8 bits: a loss near ln 9 moves by less than a percent.
    assert half == pytest.approx(full, rel=1e-2)
    assert half != full


def test_a_sparse_embedding_moves_only_what_is_read_and_is_for_one_process():
    trainer = trainer_of(synthesizer="none", sparse_embedding=True)
    before = trainer.model.embedding.weight.detach().clone()
    read = torch.tensor([[1], [2], [1], [2]]).expand(T, B)
    trainer.step(read, read)
    moved = (trainer.model.embedding.weight != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [1, 2]
    options = resolve_options(LanguageModelOptions(sparse_embedding=True), open_corpus())
    with pytest.raises(ValueError, match="--sparse-embedding works in one process only"):
        build_trainer(options, lm.build_model(options, V, CPU), CPU, parallel=object())
