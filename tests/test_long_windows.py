"""Gradients over many steps: windows in chunks that are computed again, and losses propagated back over earlier windows."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.credit.recomputation import run_in_chunks
from tests import problems, reference
from tests.credit.trainers import KINDS, make_trainer, steps, windows_of
from tests.nests import assert_same
from tests.training import CLOSE, LANES, summed_gradients, trainer_initial
from tests.training import assert_same as assert_close

ENDS = {1: [0], 2: [1, 2], 4: [2]}


def plain(name="lstm", lr=0.0, loss_fn=problems.unreduced, reduction="sum", **settings):
    model = problems.make_model(name)
    settings.setdefault("initial_state", lambda lanes: trainer_initial(model))
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return dni.SequenceTrainer(
        model, optimizer, loss_fn, reduction=reduction, state_batch_dim=model.state_batch_dim, **settings
    )


def windows(count=6, length=4, ends=ENDS):
    return list(problems.cut(problems.tokens(count * length, LANES), length, ends))


def choose_first_state(trainer):
    """Lets the model itself choose its first state, from which the trainer starts otherwise."""
    model, run = trainer.model, trainer.model.forward
    model.forward = lambda inputs, state: run(inputs, trainer_initial(model) if state is None else state)
    trainer.runner.initial_state = lambda lanes: None


def gradients(trainer, some):
    found = []
    for window in some:
        trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask)
        found.append(problems.gradients(trainer.model))
    return found


class Noisy(nn.Module):
    """Dropout before, and a normalisation with running statistics after an LSTM."""

    def __init__(self):
        super().__init__()
        self.inner = problems.make_model("lstm")
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(problems.VOCABULARY).double()
        self.initial_state = self.inner.initial_state

    def forward(self, tokens, state):
        outputs, state = self.inner(tokens, state)
        return self.norm(self.dropout(outputs).flatten(0, 1)).view_as(outputs), state


def noisy(**settings):
    model = Noisy()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return dni.SequenceTrainer(model, optimizer, problems.unreduced, state_batch_dim=1, **settings)


# --- chunks that are computed again ---


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 9])
def test_chunks_have_the_gradients_of_the_window(name, chunk):
    trainer, whole = plain(name), plain(name)
    trainer.checkpoint_every = chunk
    for found, expected in zip(gradients(trainer, windows()), gradients(whole, windows()), strict=True):
        assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", problems.MODELS)
def test_gradients_are_the_bits_of_the_same_chunks_with_all_activations_kept(name, monkeypatch):
    runner = plain(name).runner
    (window,) = windows(1, 7, {})
    mask = torch.rand(7, LANES, generator=torch.Generator().manual_seed(3)) < 0.7
    found = []
    for recompute in (True, False):
        if not recompute:
            monkeypatch.setattr("dni_seq.credit.recomputation.recomputed", lambda function, *given: function(*given))
        start = trainer_initial(runner.model)
        outputs, last, loss = run_in_chunks(runner, window.inputs, window.targets, mask, start, 3)
        grads = torch.autograd.grad(loss, list(runner.model.parameters()))
        found.append((outputs, dni.core.states.detach(last), loss.detach(), grads))
    assert_same(*found)


def test_activations_are_really_dropped():
    """What autograd keeps for the backward pass: a chunk's states instead of every step's activations."""

    def kept(every):
        trainer = plain()
        trainer.checkpoint_every = every
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        (window,) = windows(1, 64, {})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.step(window.inputs, window.targets)
        return total

    assert kept(8) < 0.75 * kept(None)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_draws_the_same_numbers_and_buffers_count_once(accumulate, monkeypatch):
    """Bit for bit as with the same chunks and all activations kept, over updates."""
    found = []
    for recompute in (True, False):
        if not recompute:
            monkeypatch.setattr("dni_seq.credit.recomputation.recomputed", lambda function, *given: function(*given))
        torch.manual_seed(8)
        trainer = noisy()
        trainer.checkpoint_every, trainer.accumulate = 2, accumulate
        results = [trainer.step(w.inputs, w.targets, ends=w.ends) for w in windows()]
        found.append((trainer.state_dict(), [r.loss for r in results], torch.get_rng_state()))
    assert_same(*found)
    assert found[0][0]["model"]["norm.num_batches_tracked"] == 12


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "auxiliary"])
def test_with_every_kind_of_synthesizer(kind):
    found = []
    for chunk in (None, 2):
        trainer = make_trainer(problems.make_model("lstm"), kind)
        trainer.runner.loss_fn = problems.unreduced
        trainer.checkpoint_every = chunk
        steps(trainer, windows_of(24, {3: [1]}))
        found.append(trainer.state_dict())
    for part in ("model", "synthesizer"):
        assert_close(found[1][part], found[0][part], rtol=1e-7, atol=1e-9)


def test_settings_that_do_not_go_with_chunks():
    trainer = plain(loss_fn=problems.summed)
    trainer.checkpoint_every = 2
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match="checkpoint_every needs a loss_fn that returns unreduced losses"):
        gradients(trainer, windows(1))
    assert_same(trainer.state_dict(), before)
    with pytest.raises(ValueError, match="checkpoint_every must be 1 or more steps, or None, got 0"):
        trainer.checkpoint_every = 0
    model = problems.make_model("lstm")
    auxiliary = dni.SyntheticGradientConfig(auxiliary=dni.AuxiliaryTask(trainer_initial(model)), auxiliary_weight=0.1)
    synthesizer = dni.StateSynthesizer(trainer_initial(model), cells=model.cells)
    settings = {"synthesizer": synthesizer, "config": auxiliary}
    trainer = dni.SequenceTrainer(model, torch.optim.SGD(model.parameters(), 0.1), problems.unreduced, **settings)
    with pytest.raises(ValueError, match="checkpoint_every does not work with an auxiliary task"):
        trainer.checkpoint_every = 2


# --- losses that are propagated back over earlier windows ---


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("chunk", [None, 2])
def test_each_loss_reaches_the_last_windows(name, count, chunk):
    trainer = plain(name)
    trainer.backward_windows, trainer.checkpoint_every = count, chunk
    some = windows()
    initial = trainer_initial(trainer.model)
    parts = (trainer.model, problems.summed, some, count, initial, trainer.model.state_batch_dim)
    for found, expected in zip(gradients(trainer, some), reference.backward_over(*parts), strict=True):
        assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", problems.MODELS)
def test_over_all_windows_it_is_full_bptt(name):
    trainer = plain(name)
    trainer.backward_windows = 6
    some = windows()
    initial = trainer_initial(trainer.model)
    expected = reference.full_bptt(trainer.model, problems.summed, some, initial, trainer.model.state_batch_dim)
    assert_close(summed_gradients(gradients(trainer, some)), expected, **CLOSE)


@pytest.mark.parametrize("count", [2, 3])
def test_with_frozen_parameters_it_agrees_with_the_exact_future(count):
    """Backward each loss reaches count windows; forward each window sees the losses of as many. In sum it is the same."""
    length, some = 4, windows(8, 4, {2: [1], 5: [0, 2]})
    backward = plain()
    backward.backward_windows = count
    model = problems.make_model("lstm")
    future = dni.ExactFuture(model, problems.unreduced, steps=(count - 1) * length)
    forward = dni.SequenceTrainer(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        problems.unreduced,
        synthesizer=future,
        reduction="sum",
        state_batch_dim=1,
    )
    seen = []
    for window in dni.with_lookahead(some, (count - 1) * length):
        forward.step(window.inputs, window.targets, ends=window.ends, lookahead=window.lookahead)
        seen.append(problems.gradients(model))
    each = gradients(backward, some)
    assert_close(summed_gradients(each), summed_gradients(seen), **CLOSE)
    assert any((each[3][name] - seen[3][name]).norm() > 0.01 * seen[3][name].norm() for name in seen[3])


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_model_that_chooses_its_first_state_gets_the_gradient_of_its_first_window(name, chunk):
    """At the stream's start and after a reset, and if a checkpoint is loaded in between."""
    some, found = windows(), []
    for chooses in (True, False):
        trainers = []
        for _ in range(2):
            trainers.append(plain(name))
            trainers[-1].backward_windows, trainers[-1].checkpoint_every = 3, chunk
            if chooses:
                choose_first_state(trainers[-1])
        one, resumed = trainers
        first = gradients(one, some[:2])
        one.reset()
        first += gradients(one, some[:2])
        resumed.load_state_dict(copy.deepcopy(one.state_dict()))
        found.append([*first, *gradients(resumed, some[2:])])
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected, **CLOSE)


def test_old_windows_run_again_with_the_current_parameters():
    """Over updates: each gradient is that of the loss as a function of the parameters before it, from a recorded state."""
    trainer = plain(lr=0.05)
    trainer.backward_windows = 3
    some = windows(6, 4, {})
    starts = []
    for k, window in enumerate(some):
        starts.append(trainer.runner.initial_state(LANES) if k == 0 else trainer.state)
        model = copy.deepcopy(trainer.model)
        first = max(k - 2, 0)
        state = starts[first]
        for earlier in some[first:k]:
            _, state = model(earlier.inputs, state)
        problems.summed(model(window.inputs, state)[0], window.targets).backward()
        trainer.step(window.inputs, window.targets, ends=window.ends)
        for mine, other in zip(trainer.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **CLOSE)


def test_dropout_and_buffers_over_old_windows():
    trainer = noisy()
    trainer.backward_windows = 3
    gradients(trainer, windows())
    assert trainer.model.norm.num_batches_tracked == 6


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_resuming_is_exact(cut):
    def finish(interrupted):
        torch.manual_seed(2)
        trainer = noisy()
        trainer.backward_windows = 3
        gradients(trainer, windows()[:cut])
        if interrupted:
            saved = copy.deepcopy(trainer.state_dict())
            randomness = torch.get_rng_state()
            trainer = noisy()
            trainer.backward_windows = 3
            trainer.load_state_dict(saved)
            torch.set_rng_state(randomness)
        gradients(trainer, windows()[cut:])
        return trainer.state_dict()

    whole = finish(False)
    state = torch.get_rng_state()
    assert_same(finish(True), whole)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("counts", [(2, 2), (1, 2), (1, 4), (4, 4)], ids=str)
def test_a_checkpoint_of_more_windows_is_resumed_with_fewer(counts):
    """Gradients run through as many windows as are set now, of those that directly precede the newest one."""
    some, (before, after) = windows(8, 4, {}), counts
    trainer = plain()
    trainer.backward_windows = 4
    gradients(trainer, some[:4])
    saved = copy.deepcopy(trainer.state_dict())
    resumed, fresh = plain(), plain()
    resumed.load_state_dict(saved)
    resumed.backward_windows = fresh.backward_windows = before
    gradients(fresh, some[:4])
    for part, count in ((some[4:6], before), (some[6:], after)):
        resumed.backward_windows = fresh.backward_windows = count
        for found, expected in zip(gradients(resumed, part), gradients(fresh, part), strict=True):
            assert_close(found, expected, **CLOSE)


class Tokens(NamedTuple):
    """A container that a checkpoint cannot hold."""

    ids: torch.Tensor


def test_windows_that_cannot_be_recorded_are_refused_before_anything_changes():
    def loss_fn(outputs, targets):
        return problems.unreduced(outputs, getattr(targets, "ids", targets))

    first, second = windows(2, 4, {})
    nested = {"inputs": lambda w: (Tokens(w.inputs), w.targets), "targets": lambda w: (w.inputs, Tokens(w.targets))}
    for name, of in nested.items():
        trainer = plain(lr=0.1, loss_fn=loss_fn)
        run = trainer.model.forward
        trainer.model.forward = lambda tokens, state, run=run: run(getattr(tokens, "ids", tokens), state)
        trainer.step(*of(first))
        trainer.backward_windows = 2
        before = copy.deepcopy(trainer.state_dict())
        with pytest.raises(ValueError, match=f"{name} in a Tokens cannot be recorded for a replay"):
            trainer.step(*of(second))
        assert_same(trainer.state_dict(), before)


def test_windows_that_do_not_follow_are_forgotten():
    some = windows(6, 4, {})
    for forget in (lambda t: t.reset(), lambda t: setattr(t, "state", trainer_initial(t.model))):
        trainer, fresh = plain(), plain()
        for each in (trainer, fresh):
            each.backward_windows = 3
        gradients(trainer, some[:3])
        forget(trainer)
        for found, expected in zip(gradients(trainer, some[3:]), gradients(fresh, some[3:]), strict=True):
            assert_close(found, expected, **CLOSE)


def test_a_bad_window_is_not_run_again(decides):
    """It leaves the state as it was. On the host the windows before it are forgotten, on a device they stay."""
    factor = [1.0]

    def trainer_of():
        trainer = plain(loss_fn=lambda o, t: problems.unreduced(o, t) * factor[0])
        trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), 0.0, fused=True)
        trainer.backward_windows = 3
        return trainer

    some = windows(5, 4, {})
    one, other = trainer_of(), trainer_of()
    gradients(one, some[:2])
    factor[0] = float("nan")
    assert one.step(some[2].inputs, some[2].targets).skipped
    factor[0] = 1.0
    found = gradients(one, some[3:])
    if decides == "here":
        gradients(other, some[:2])
        other.state = other.state
        expected = gradients(other, some[3:])
        assert_close(found[0], expected[0], **CLOSE)
    else:
        other.backward_windows = 2  # of the three, the bad one adds nothing
        gradients(other, some[:2])
        assert_close(found[0], gradients(other, some[3:])[0], **CLOSE)


def test_settings_that_do_not_go_with_old_windows():
    trainer = make_trainer(problems.make_model("lstm"), "bootstrap")
    with pytest.raises(ValueError, match="backward_windows needs a trainer without a synthesizer"):
        trainer.backward_windows = 2
    with pytest.raises(ValueError, match="backward_windows must be 1 or more, got 0"):
        plain().backward_windows = 0
    model = problems.make_model("lstm")
    learned = [leaf.clone().requires_grad_() for leaf in model.initial_state(LANES)]
    trainer = plain(initial_state=lambda lanes: tuple(learned))
    trainer.backward_windows = 2
    with pytest.raises(ValueError, match="backward_windows does not work with a learned initial state"):
        gradients(trainer, windows(1))
