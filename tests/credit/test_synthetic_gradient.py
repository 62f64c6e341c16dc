"""The synthesizer's side of training: λ-targets, automatic scale, target network, exact resumption of each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.credit.message_filter import OBSERVED_EVERY, OBSERVED_FIRST
from dni_seq.synthesizers.base import Regression
from dni_seq.synthesizers.mlp import zero_
from dni_seq.synthesizers.target_rule import increments
from tests import problems, reference
from tests.credit.trainers import KINDS, T, make_trainer, steps, windows_of
from tests.training import LANES, assert_same, sequence_trainer, trainer_initial


@pytest.mark.parametrize("name", ["lstm", "odd-nest"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_resumes_bit_identically(kind, name, tmp_path):
    """Saved in the middle of a ring and of a comparison, with lanes that end."""
    windows = windows_of(3 * 26, {3: [1], 9: [0, 2], 17: [2]})
    whole = make_trainer(problems.make_model(name), kind)
    expected = steps(whole, windows)
    first = make_trainer(problems.make_model(name), kind)
    steps(first, windows[:13])
    torch.save(first.state_dict(), tmp_path / "trainer.pt")
    second = make_trainer(problems.make_model(name, seed=3), kind)
    second.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True))
    resumed = steps(second, windows[13:])
    assert [r.loss.item() for r in resumed] == [r.loss.item() for r in expected[13:]]
    for a, b in zip(resumed, expected[13:], strict=True):
        assert torch.equal(a.synthetic.scale, b.synthetic.scale)
        assert torch.equal(a.synthetic.r2.nan_to_num(), b.synthetic.r2.nan_to_num())
    assert_same(dict(second.model.named_parameters()), dict(whole.model.named_parameters()), rtol=0, atol=0)
    learned = second.credit.synthesizer.state_dict()
    assert all(torch.equal(value, learned[key]) for key, value in whole.credit.synthesizer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_frozen_recurrent_part_messages_reach_nothing(kind, monkeypatch):
    """The readout trains as in truncated BPTT, also at windows at whose first state no gradient is observed."""
    monkeypatch.setattr("dni_seq.credit.message_filter.OBSERVED_FIRST", 0)
    model = problems.make_model("lstm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("readout"))
    plain = copy.deepcopy(model)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    windows, state = windows_of(15), trainer_initial(plain)
    optimizer = torch.optim.Adam(trained, 1e-2)
    trainer = make_trainer(model, kind)
    for window in windows:
        outputs, state = plain(window.inputs, state)
        optimizer.zero_grad()
        problems.mean(outputs, window.targets).backward()
        optimizer.step()
        result = trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
        assert not result.skipped
        assert_same(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_messages_are_truncated_bptt_bit_for_bit(kind):
    """Identity 1 for every target kind: the synthesizer learns nothing, the RNN does."""
    model = problems.make_model("lstm")
    plain = copy.deepcopy(model)
    windows = windows_of(30)
    expected = reference.truncated_bptt(
        plain, problems.mean, torch.optim.Adam(plain.parameters(), 1e-2), windows, trainer_initial(plain)
    )
    trainer = make_trainer(model, kind, synthesizer_lr=0.0)
    if "future" in KINDS[kind]:  # messages that are not zero from the start on
        ahead = trainer.credit.synthesizer.heads.model
        for layer in (ahead.output, *ahead.from_state):
            zero_(layer)
    for window, (loss, gradients) in zip(windows, expected, strict=True):
        result = trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
        assert result.loss.item() == loss
        assert_same(problems.gradients(model), gradients, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_ended_lanes_send_and_receive_nothing_from_later_windows(kind):
    """Identity 5 for every target kind: with all lanes ended at each window, updates are truncated BPTT's to the bit."""
    model = problems.make_model("lstm")
    plain = copy.deepcopy(model)
    ends = {k: list(range(LANES)) for k in range(10)}
    windows = windows_of(30, ends)
    trainer = make_trainer(model, kind)
    reset = sequence_trainer(
        plain, torch.optim.Adam(plain.parameters(), 1e-2), problems.mean, initial_state=lambda lanes: trainer_initial(plain)
    )
    for window in windows:
        a = trainer.step(window.inputs, window.targets, ends=window.ends, lookahead=window.lookahead)
        b = reset.step(window.inputs, window.targets, ends=window.ends)
        assert a.loss.item() == b.loss.item()
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bootstrap", "future-gradient"])
def test_a_window_without_a_target_has_no_gradient_of_its_first_state(kind):
    """Which would be computed for nothing; the first windows, all of them observed, have one."""
    model = problems.make_model("lstm")
    asked = []
    model.register_forward_pre_hook(lambda _, arguments: asked.append(states.floating(arguments[1])[0].requires_grad))
    trainer = make_trainer(model, kind, regress_every=5)
    found = steps(trainer, windows_of(3 * 140))
    assert all(asked[:OBSERVED_FIRST])
    trained = [not result.synthetic.cosine.isnan().all() for result in found]
    later = range(OBSERVED_FIRST, len(found))
    assert [asked[k] for k in later] == [trained[k] or k % OBSERVED_EVERY == 0 for k in later]
    assert 0 < sum(trained[OBSERVED_FIRST:]) < 20


class Fixed(nn.Module):
    """Messages of a given kind, nothing to learn: the exact gradient of the next window, or noise of its size."""

    def __init__(self, model, useful):
        super().__init__()
        self.oracle = reference.Oracle(model, problems.unreduced)
        self.useful = useful
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, trigger, context):
        exact = self.oracle(trigger, context)
        steps = context.valid.numel()  # the trainer's loss is a mean over the window
        if self.useful:
            return states.map_floating(lambda t: t / steps, exact)
        return states.map_floating(lambda t: torch.randn(t.shape, generator=self.generator).to(t) * t.std() / steps, exact)

    def target_rule(self, scale, discount):
        return increments(scale, discount, [1.0], False)


@pytest.mark.parametrize("useful", [True, False])
def test_automatic_scale_trusts_true_messages_alone(useful):
    model = problems.make_model("lstm")
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.mean,
        synthesizer=Fixed(model, useful),
        synthetic_scale="auto",
        fidelity_every=1,
        initial_state=lambda lanes: trainer_initial(model),
    )
    results = steps(trainer, windows_of(3 * 60))
    scales = torch.stack([result.synthetic.scale for result in results])
    assert scales[0] == 0, "c rises from 0"
    measured = [result.synthetic.fidelity for result in results if result.synthetic.fidelity is not None]
    assert len(measured) == 60
    if useful:
        assert scales[-2] > 0.99
        assert measured[-1].horizons[0].r2 == pytest.approx(1.0)
    else:
        # Two standard errors are taken off a share that is zero but for chance: one in forty is above that.
        assert scales[-30:-1].mean() < 0.01


class Told(nn.Module):
    """M(s) = weight · s, which keeps the targets that it is given."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.targets = []

    def forward(self, trigger, context):
        return states.map_floating(lambda t: t * self.weight, trigger)

    def regress(self, trigger, context, targets):
        self.targets += targets
        loss = self.weight**2
        return Regression(loss, *[loss.detach()[None]] * 3)


def told_targets(weight, later=None, ends=None, **settings):
    """The targets of a frozen RNN's 8 windows, for messages weight · s, or `later` · s once the trainer is made."""
    model = problems.make_model("lstm")
    told = Told(weight)
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.summed,
        synthesizer=told,
        synthesizer_optimizer=torch.optim.SGD(told.parameters(), 0.0),
        discount=0.8,
        initial_state=lambda lanes: trainer_initial(model),
        **settings,
    )
    if later is not None:
        with torch.no_grad():
            told.weight.fill_(later)
    steps(trainer, windows_of(T * 8, ends))
    return told.targets


def test_lambda_targets_reach_the_synthesizer():
    """What is regressed on is what the replay gives, once for each window of the ring, the RNN frozen."""

    def heard(lam, ring):
        return told_targets(0.1, ends={2: [0]}, targets="lambda", lam=lam, replay_windows=ring)

    bootstrapped, mixed, exact = heard(0.0, 1), heard(0.5, 4), heard(1.0, 4)
    assert len(bootstrapped) == len(mixed) == len(exact) == 8
    for k, (a, b, c) in enumerate(zip(bootstrapped, mixed, exact, strict=True)):
        # The ring's last window has the bootstrapped target whatever λ is, the ones before it have others.
        for x, y, z in zip(a, b, c, strict=True):
            same = torch.allclose(x, y) and torch.allclose(x, z)
            assert same == (k % 4 == 3)


def test_target_network_is_copied_every_so_many_windows():
    trainer = make_trainer(problems.make_model("lstm"), "target-network")
    windows = windows_of(3 * 5)
    copies = []
    for window in windows:
        steps(trainer, [window])
        live = trainer.credit.synthesizer.state_dict()
        held = trainer.credit.state_dict()["target_network"]
        copies.append(set(live) == set(held) and all(torch.equal(live[key], held[key]) for key in live))
    assert copies == [False, False, True, False, False]


BAD = {
    "synthetic_scale": "automatic",
    "targets": "td",
    "lam": -0.1,
    "replay_windows": 0,
    "target_network": -1,
    "fidelity_every": -1,
}


@pytest.mark.parametrize("name", BAD)
def test_settings_are_checked_at_construction(name):
    with pytest.raises(ValueError, match=name):
        make_trainer(problems.make_model("lstm"), "bootstrap", **{name: BAD[name]})


def test_automatic_scale_needs_comparisons():
    with pytest.raises(ValueError, match="fidelity_every"):
        make_trainer(problems.make_model("lstm"), "auto", fidelity_every=0)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_auxiliary_task_trains_the_rnn_through_the_windows_first_step(name):
    """With a frozen-at-zero RNN loss only the auxiliary loss is left: its gradient is that of a plain computation."""
    model = problems.make_model(name)
    torch.manual_seed(0)
    window = windows_of(T)[0]
    task = dni.AuxiliaryTask(trainer_initial(model), hidden=(8,)).double()
    nn.init.normal_(task.network.heads.weight)

    class Ones(nn.Module):
        def forward(self, trigger, context):
            return states.map_floating(lambda t: 2 * torch.ones_like(t), trigger)

    def gradients(weight):
        trainer = sequence_trainer(
            model,
            problems.frozen(model),
            problems.mean,
            synthesizer=Ones(),
            synthesizer_optimizer=torch.optim.SGD(task.parameters(), 0.0),
            auxiliary=task,
            auxiliary_weight=weight,
            initial_state=lambda lanes: trainer_initial(model),
        )
        trainer.step(window.inputs, window.targets)
        return problems.gradients(model)

    found = {key: value - zero for (key, value), zero in zip(gradients(0.5).items(), gradients(0.0).values(), strict=True)}
    _, early = model(window.inputs[:1], trainer_initial(model))
    prediction = torch.cat([leaf.flatten() for leaf in states.floating(task.network(early))])
    model.zero_grad()
    (0.5 * (prediction - 1).square().mean()).backward()  # messages of one value are 1 in units of their RMS
    for key, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-12)  # a difference of two gradients of size 1
    assert found["embedding.weight"].abs().max() > 1e-3


def test_auxiliary_task_is_saved_with_the_trainer():
    model = problems.make_model("lstm")
    task = dni.AuxiliaryTask(trainer_initial(model), hidden=(8,)).double()
    trainer = make_trainer(model, "bootstrap", auxiliary=task, synthesizer_optimizer=None)
    steps(trainer, windows_of(3 * 4))
    other_model = problems.make_model("lstm", seed=1)
    other_task = dni.AuxiliaryTask(trainer_initial(model), hidden=(8,)).double()
    other = make_trainer(other_model, "bootstrap", auxiliary=other_task, synthesizer_optimizer=None)
    other.load_state_dict(trainer.state_dict())
    assert_same(dict(other_task.named_parameters()), dict(task.named_parameters()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="synthesizer"):
        sequence_trainer(model, problems.frozen(model), problems.mean, auxiliary=task)


def test_regressions_can_be_thinned_out_without_thinning_messages():
    torch.manual_seed(0)
    text = problems.tokens(1200, 3)
    model = problems.make_model("gru")
    synthesizer = dni.StateSynthesizer(torch.zeros(1, 3, 5), hidden=(4,)).double()
    trainer = sequence_trainer(
        model, problems.frozen(model), problems.mean, synthesizer=synthesizer, synthetic_scale=1.0, regress_every=3
    )
    learned, injected = [], []
    for window in problems.cut(text, 2):
        before = [p.clone() for p in synthesizer.parameters()]
        synthetic = trainer.step(window.inputs, window.targets).synthetic
        changed = any(not torch.equal(a, b) for a, b in zip(before, synthesizer.parameters(), strict=True))
        assert changed == (not synthetic.loss.isnan())
        learned.append(changed)
        injected.append(synthetic.scale.item())
    # 600 draws of 1/3: three sigma are 0.06. The first of an odd and an even pair are drawn alike.
    assert sum(learned) / len(learned) == pytest.approx(1 / 3, abs=0.06)
    assert sum(learned[::2]) / len(learned[::2]) == pytest.approx(1 / 3, abs=0.09)
    assert set(injected) == {1.0}


def test_a_window_that_trains_one_horizon_skips_injection():
    """The target there is the window's own gradient, its parameters get theirs alone; elsewhere messages are sent."""
    model = problems.make_model("lstm")
    torch.manual_seed(0)
    heads = dni.MultiHorizonSynthesizer(trainer_initial(model), cells=model.cells, hidden=(4,)).double()
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    seen = []
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.mean,
        synthesizer=heads,
        synthesizer_optimizer=torch.optim.SGD(heads.parameters(), 0.0),
        synthetic_scale=1.0,
        regress_every=3,
        initial_state=lambda lanes: trainer_initial(model),
    )
    inner = heads.regress
    heads.regress = lambda trigger, context, targets: seen.append(targets) or inner(trigger, context, targets)
    quiet = sent = 0
    for window in problems.cut(problems.tokens(60, LANES), T):
        start = trainer.state or trainer_initial(model)
        seen.clear()
        synthetic = trainer.step(window.inputs, window.targets).synthetic
        found = problems.gradients(model)
        model.zero_grad()
        leaves = [leaf.clone().requires_grad_() for leaf in start]
        problems.mean(model(window.inputs, tuple(leaves))[0], window.targets).backward()
        plain = problems.gradients(model)
        model.zero_grad()
        if seen:
            quiet += 1
            assert_same(found, plain, rtol=1e-10, atol=1e-14)
            for target, leaf in zip(seen[0][0], leaves, strict=True):
                torch.testing.assert_close(target, leaf.grad, rtol=1e-10, atol=1e-14)
            assert synthetic.injected_ratio > 0 or quiet == 1  # a message is zero before the first regression
        elif quiet:
            sent += 1
            assert not torch.allclose(found["rnn.weight_hh_l0"], plain["rnn.weight_hh_l0"], rtol=1e-6)
    assert quiet > 2
    assert sent > 2


@pytest.mark.parametrize("make", [dni.StateSynthesizer, lambda *args, **kwargs: None])
def test_messages_are_cut_relative_to_their_running_rms(make):
    torch.manual_seed(0)
    state = (torch.randn(1, 4, 3), torch.randn(1, 4, 3))
    synthesizer = make(state, hidden=(4,), limit=2.0) or dni.Normalized(dni.BasicSynthesizer(6, n_hidden=1), limit=2.0)
    for parameter in synthesizer.parameters():
        nn.init.normal_(parameter, std=5.0)
    target = tuple(scale * torch.ones(1, 4, 3) for scale in (1e-3, 1e-5))
    synthesizer.regress(state, None, [target])
    message = synthesizer(state, None)
    for leaf, scale in zip(message, (1e-3, 1e-5), strict=True):
        assert leaf.abs().max().item() == pytest.approx(2 * scale, rel=1e-4)
    with pytest.raises(ValueError, match="limit must be positive"):
        dni.Normalized(dni.BasicSynthesizer(6), limit=0.0)


@pytest.mark.parametrize("kind", ["lambda", "auto"])
def test_after_a_reset_nothing_is_run_again_of_what_was_before(kind):
    """A ring that went over it would hold windows that do not follow each other, of other lanes even."""
    model = problems.make_model("lstm")
    trainer = make_trainer(model, kind, initial_state=model.initial_state)
    steps(trainer, windows_of(3 * 3))
    kept = trainer.credit.state_dict()
    assert kept["ring"] or kept["probe_windows"]
    trainer.reset()
    kept = trainer.credit.state_dict()
    assert not kept["ring"]
    assert not kept["probe_windows"]
    assert kept["probe_messages"] is None
    narrow = dni.with_lookahead(problems.cut(problems.tokens(3 * 12, LANES - 1), T), T)
    assert all(result.loss.isfinite() for result in steps(trainer, list(narrow)))


def test_a_reset_after_loading_drops_the_state_alone():
    windows = windows_of(3 * 12)
    trainer = make_trainer(problems.make_model("lstm"), "target-network")
    steps(trainer, windows[:8])
    saved = copy.deepcopy(trainer.state_dict())
    other = make_trainer(problems.make_model("lstm", seed=1), "target-network")
    other.load_state_dict(saved)
    other.reset()
    assert other.state_dict()["state"] is None
    steps(other, windows[8:9])
    trainer.reset()
    steps(trainer, windows[8:9])
    found, expected = other.credit.state_dict(), trainer.credit.state_dict()
    assert found["steps"] == expected["steps"] == 9
    assert_same(found["target_network"], expected["target_network"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bootstrap", "thinned", "lambda", "exact"])
def test_the_auxiliary_task_learns_at_every_window(kind):
    """Also where the synthesizer does not: between its targets, between replays, or where it has nothing to learn."""
    model = problems.make_model("lstm")
    settings = {"thinned": {"regress_every": 4}, "lambda": {"targets": "lambda", "replay_windows": 4}}.get(kind, {})
    task = dni.AuxiliaryTask(trainer_initial(model), hidden=(8,)).double()
    exact = dni.ExactFuture(model, problems.unreduced, steps=2, window=T)
    synthesizer = exact if kind == "exact" else dni.StateSynthesizer(trainer_initial(model), hidden=(8,)).double()
    if kind != "exact":
        nn.init.normal_(synthesizer.network.heads.weight, std=0.1)
    trainer = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-3),
        problems.mean,
        synthesizer=synthesizer,
        auxiliary=task,
        initial_state=lambda lanes: trainer_initial(model),
        **settings,
    )
    moved, sent = [], []
    for window in windows_of(3 * 10):
        before = [parameter.detach().clone() for parameter in task.parameters()]
        ahead = window.lookahead if kind == "exact" else None
        trainer.step(window.inputs, window.targets, ends=window.ends, lookahead=ahead)
        moved.append(not all(map(torch.equal, task.parameters(), before)))
        sent.append(bool(trainer.credit.interface.norm > 0))
    # Messages are zero, and so is what the task has to tell, before the synthesizer's first target.
    assert sum(sent) >= 6
    assert [k for k, was_sent in enumerate(sent) if was_sent and not moved[k]] == []


class HalfState(nn.Module):
    """An RNN whose state is in bfloat16 under autocast."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(problems.VOCABULARY, 4)
        self.cell = nn.Linear(4 + 5, 5)
        self.readout = nn.Linear(5, problems.VOCABULARY)

    def initial_state(self, lanes):
        return torch.zeros(1, lanes, 5)

    def forward(self, tokens, state):
        h, outputs = state[0], []
        for x in self.embedding(tokens):
            h = torch.tanh(self.cell(torch.cat([x, h.to(x.dtype)], -1)))
            outputs.append(h)
        return self.readout(torch.stack(outputs)), h[None]


@pytest.mark.parametrize(
    "settings",
    [{"fidelity_every": 2}, {"synthetic_scale": "auto", "fidelity_every": 2}, {"targets": "lambda", "replay_windows": 3}],
    ids=["fidelity", "auto", "lambda"],
)
@pytest.mark.parametrize("kind", ["basic", "state"])
def test_states_in_half_precision_are_compared_and_replayed(kind, settings):
    torch.manual_seed(0)
    model = HalfState()
    basic = dni.Normalized(dni.BasicSynthesizer(5, n_hidden=1))
    synthesizer = basic if kind == "basic" else dni.StateSynthesizer(model.initial_state(1).bfloat16(), hidden=(8,))
    trainer = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2),
        problems.unreduced,
        synthesizer=synthesizer,
        autocast=torch.bfloat16,
        **settings,
    )
    results = steps(trainer, list(problems.cut(problems.tokens(3 * 12, LANES), T)))
    assert trainer.state.dtype == torch.bfloat16
    assert results[-1].loss.isfinite()
    assert trainer.credit.monitor.total == 0
    assert results[-1].synthetic.r2.isfinite().all() or settings.get("targets") == "lambda"


@pytest.mark.parametrize("kind", ["half state", "lstm"])
def test_an_auxiliary_task_reads_states_in_half_precision(kind):
    torch.manual_seed(0)
    model = HalfState() if kind == "half state" else problems.StackedLSTM()
    example = model.initial_state(1)
    trainer = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2),
        problems.unreduced,
        synthesizer=dni.StateSynthesizer(example, hidden=(8,)),
        auxiliary=dni.AuxiliaryTask(example, hidden=(8,)),
        autocast=torch.bfloat16,
    )
    assert all(result.loss.isfinite() for result in steps(trainer, problems.cut(problems.tokens(3 * 4, LANES), T)))
    assert all(leaf.dtype == torch.bfloat16 for leaf in states.floating(trainer.state))
    task = trainer.credit.auxiliary
    assert any(parameter.grad.any() for parameter in task.parameters())
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float32}


class Counting(nn.Module):
    """A GRU that counts in a buffer how often it has run, and reads the count in its outputs."""

    def __init__(self):
        super().__init__()
        self.inner = problems.PlainGRU()
        self.register_buffer("runs", torch.zeros((), dtype=torch.float64))

    def forward(self, tokens, state):
        self.runs += 1
        outputs, state = self.inner(tokens, state)
        return outputs * (1 + self.runs.clone() / 100), state


@pytest.mark.parametrize("kind", ["fidelity", "lambda", "exact"])
def test_what_is_run_again_leaves_the_models_buffers(kind):
    torch.manual_seed(0)
    model = Counting().double()
    settings = {"fidelity": {"fidelity_every": 2}, "lambda": {"targets": "lambda", "replay_windows": 3}}.get(kind, {})
    example = torch.zeros(1, LANES, 5, dtype=torch.float64)
    exact = dni.ExactFuture(model, problems.unreduced, steps=2, window=T)
    synthesizer = exact if kind == "exact" else dni.StateSynthesizer(example, hidden=(8,)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    trainer = sequence_trainer(model, optimizer, problems.mean, synthesizer=synthesizer, initial_state=example, **settings)
    kept = model.runs
    for window in windows_of(3 * 12):
        trainer.step(window.inputs, window.targets, lookahead=window.lookahead if kind == "exact" else None)
    assert model.runs == 12
    assert model.runs is kept


@pytest.mark.parametrize("every", [2, 5])
def test_an_exact_gradient_is_sent_at_every_window(every):
    """There is no target that a window would keep quiet for."""

    def losses(regress_every):
        model = problems.make_model("lstm")
        trainer = sequence_trainer(
            model,
            torch.optim.Adam(model.parameters(), 1e-2),
            problems.mean,
            synthesizer=dni.ExactFuture(model, problems.unreduced, steps=2, window=T),
            synthetic_scale=1.0,
            regress_every=regress_every,
        )
        return [result.loss.item() for result in steps(trainer, windows_of(T * 12))]

    assert losses(every) == losses(1)


def test_lambda_targets_of_nothing_to_train_are_refused():
    model = problems.make_model("lstm")
    exact = dni.ExactFuture(model, problems.unreduced, steps=2, window=T)
    with pytest.raises(ValueError, match="needs a synthesizer with trainable parameters"):
        sequence_trainer(model, problems.frozen(model), problems.mean, synthesizer=exact, targets="lambda")


def test_a_synthesizer_that_is_frozen_later_keeps_no_windows():
    trainer = make_trainer(problems.make_model("lstm"), "lambda")
    windows = windows_of(T * 12)
    steps(trainer, windows[:6])
    assert len(trainer.credit.state_dict()["ring"]) == 2
    trainer.credit.synthesizer.requires_grad_(False)
    steps(trainer, windows[6:])
    assert trainer.credit.state_dict()["ring"] == []


@pytest.mark.parametrize("targets", ["bootstrap", "lambda"])
def test_targets_bootstrap_on_the_target_network(targets):
    """The copy says what is behind a window, whatever the synthesizer has become since; nothing is injected here."""

    def heard(copied, live, target_network):
        settings = {"synthetic_scale": 0.0, "targets": targets, "replay_windows": 4, "target_network": target_network}
        return [leaf for target in told_targets(copied, live, **settings) for leaf in states.floating(target)]

    by_copy, by_itself = heard(0.3, 0.3, 0), heard(2.0, 2.0, 0)
    found = heard(0.3, 2.0, 100)
    assert len(found) == len(by_copy) == 16
    for leaf, expected, other in zip(found, by_copy, by_itself, strict=True):
        assert torch.allclose(leaf, expected)
        assert not torch.allclose(leaf, other)


@pytest.mark.parametrize("kind", ["auto", "lambda"])
def test_a_synthesizer_that_is_reset_keeps_nothing_of_the_old_one(kind):
    """Parameters, normaliser, moments, target network, reliabilities and windows to be run again are as at first."""
    trainer = make_trainer(problems.make_model("lstm"), kind, target_network=3)
    fresh = copy.deepcopy(trainer.credit.synthesizer.state_dict())
    first = trainer.credit.state_dict()
    windows = windows_of(T * 12)
    steps(trainer, windows[:9])
    learned = trainer.credit.state_dict()
    assert trainer.credit.optimizer.state
    assert learned["largest"] > 0
    with torch.no_grad():
        for parameter in trainer.credit.synthesizer.parameters():
            parameter.fill_(float("nan"))
    steps(trainer, windows[9:])  # the last of them begins a comparison, and fills the ring by a quarter
    assert trainer.credit.monitor.resets == 1
    found = trainer.credit.state_dict()
    assert_same(trainer.credit.synthesizer.state_dict(), fresh, rtol=0, atol=0)
    assert_same(found["target_network"], fresh, rtol=0, atol=0)
    assert not trainer.credit.optimizer.state
    assert not any(found["running"].values())
    for name in ("ring", "probe_windows", "probe_messages", *trainer.credit._auto_scale.state_dict()):
        assert str(found[name]) == str(first[name]), name


COMPARED_AT = {"auto": [4, 7, 10], "multi-horizon": [6, 12], "multi-horizon-auto": [4, 7, 10]}


@pytest.mark.parametrize("kind", COMPARED_AT)
def test_comparisons_wait_for_the_windows_they_hold_messages_against(kind):
    """From windows 3, 6, 9 on: one message with 2 windows, two horizons and a tail with 4, two with their own.

    No comparison begins while another one waits.
    """
    trainer = make_trainer(problems.make_model("lstm"), kind, fidelity_every=3, replay_windows=2)
    results = steps(trainer, windows_of(T * 12))
    assert [k + 1 for k, result in enumerate(results) if result.synthetic.fidelity is not None] == COMPARED_AT[kind]


def test_an_automatic_scale_of_an_exact_gradient_is_refused():
    model = problems.make_model("lstm")
    exact = dni.ExactFuture(model, problems.unreduced, steps=2, window=T)
    with pytest.raises(ValueError, match='ExactFuture rejects synthetic_scale="auto"'):
        sequence_trainer(
            model, problems.frozen(model), problems.mean, synthesizer=exact, synthetic_scale="auto", fidelity_every=3
        )


def test_a_target_network_beside_an_exact_future_copies_the_tail_alone():
    model = problems.make_model("lstm")
    tail = dni.StateSynthesizer(trainer_initial(model), hidden=(8,)).double()
    exact = dni.ExactFuture(model, problems.unreduced, steps=2, window=T, tail=tail)
    trainer = sequence_trainer(model, problems.frozen(model), problems.mean, synthesizer=exact, target_network=2)
    copied = next(module for module in trainer.credit.modules if isinstance(module, dni.ExactFuture) and module is not exact)
    assert copied.tail is not tail
    assert copied._model[0] is model


def test_a_target_network_begins_as_a_copy_where_none_was_saved():
    windows = windows_of(3 * 8)
    without = make_trainer(problems.make_model("lstm"), "bootstrap")
    steps(without, windows[:4])
    trainer = make_trainer(problems.make_model("lstm", seed=1), "bootstrap", target_network=100)
    trainer.load_state_dict(without.state_dict())
    steps(trainer, windows[4:5])
    assert_same(trainer.credit.state_dict()["target_network"], without.credit.synthesizer.state_dict(), rtol=0, atol=0)
    steps(trainer, windows[5:])


def test_a_first_step_that_fails_leaves_the_target_network():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no step")

    model = problems.make_model("lstm")
    trainer = make_trainer(model, "bootstrap", target_network=1)
    trainer.optimizer = Fails(model.parameters(), 1e-3)
    before = [copy.deepcopy(module.state_dict()) for module in trainer.credit.modules]
    window = windows_of(T)[0]
    with pytest.raises(RuntimeError, match="no step"):
        trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
    for module, values in zip(trainer.credit.modules, before, strict=True):
        assert_same(module.state_dict(), values, rtol=0, atol=0)
