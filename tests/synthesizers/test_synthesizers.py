"""Synthesizers for states: increments, lookahead, normalisation, the exact future."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import states
from dni_seq.synthesizers.base import Regression, predict, regress
from dni_seq.synthesizers.least_squares import LeastSquaresHeads
from dni_seq.synthesizers.multi_horizon import Horizons
from dni_seq.synthesizers.normalization import RunningRMS
from dni_seq.synthesizers.state_heads import StateHeads
from dni_seq.synthesizers.state_mlp import StateNetwork
from dni_seq.synthesizers.target_rule import increments
from tests import problems, reference
from tests.nests import assert_same as assert_same_nest
from tests.training import CLOSE, LANES, assert_same, run, sequence_trainer, summed_gradients, trainer_initial

STEPS, T = 12, 3


class ExactHeads(nn.Module):
    """Perfect heads: horizon n is the exact gradient of the n-th window ahead, by differences of exact futures."""

    def __init__(self, model: nn.Module, horizons: int, tail: bool = False) -> None:
        super().__init__()
        self.oracle = reference.Oracle(model, problems.unreduced)
        self.horizons, self.tail = horizons, tail
        self.unused = nn.Parameter(torch.zeros(()))  # so that targets are computed
        self.targets: list = []

    def _within(self, trigger, context, windows):
        steps = min(windows * T, len(context.inputs))
        return states.floating(self.oracle(trigger, dni.Lookahead(*(f[:steps] for f in context[:3]))))

    def predict(self, trigger, context):
        sums = [self._within(trigger, context, n) for n in range(self.horizons + 1)]
        if self.tail:
            sums.append(self._within(trigger, context, STEPS))
        return [
            states.with_floating(trigger, [b - a for a, b in zip(sums[n], sums[n + 1], strict=True)])
            for n in range(len(sums) - 1)
        ]

    def regress(self, trigger, context, targets):
        self.targets.append((self.predict(trigger, context), targets))
        loss = self.unused**2
        return Regression(loss, loss.detach()[None], loss.detach()[None], loss.detach()[None])

    def target_rule(self, scale, discount):
        return increments(scale, discount, [1.0] * (self.horizons + self.tail), self.tail)


@pytest.mark.parametrize("name", problems.MODELS)
def test_partial_sums_of_exact_heads_are_exact_gradients(name):
    """Identity 3: each target of perfect heads is the head's own message, and their sum is the exact gradient."""
    text = problems.tokens(STEPS, LANES)
    model = problems.make_model(name)
    windows = list(problems.cut(text, T, {1: [2]}))
    heads = ExactHeads(model, horizons=3, tail=True)
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.summed,
        synthesizer=heads,
        synthetic_scale=1.0,
        discount=1.0,
        state_batch_dim=model.state_batch_dim,
        initial_state=lambda lanes: trainer_initial(model),
    )
    found = summed_gradients(run(trainer, dni.with_lookahead(windows, STEPS)))
    expected = reference.full_bptt(model, problems.summed, windows, trainer_initial(model), model.state_batch_dim)
    assert_same(found, expected, **CLOSE)
    assert len(heads.targets) == len(windows)
    sizes = []
    for messages, targets in heads.targets:
        for message, target in zip(messages, targets, strict=True):
            for a, b in zip(states.floating(message), states.floating(target), strict=True):
                torch.testing.assert_close(b, a, **CLOSE)
                sizes.append(a.abs().max())
    assert torch.stack(sizes).max() > 0.1, "gradients must be far from zero"


def test_horizons_and_weights_change_at_consumption():
    state = torch.zeros(1, LANES, 5, dtype=torch.float64)
    synthesizer = dni.MultiHorizonSynthesizer(state, horizons=3, tail=True)
    assert list(synthesizer.target_rule(0.5, 0.8).injection) == pytest.approx([0.5, 0.4, 0.32, 0.256])
    synthesizer.weights = [1.0, 0.5, 0.0, 0.0]
    assert list(synthesizer.target_rule(0.5, 0.8).injection) == pytest.approx([0.5, 0.2, 0.0, 0.0])
    assert synthesizer.target_rule(0.5, 0.8).bootstrap[3] == [0.0, 0.0, 1.0, 0.8]


def multi_horizon(model, **settings):
    encoder = dni.LookaheadEncoder(T, nn.Embedding(problems.VOCABULARY, 4), nn.Embedding(problems.VOCABULARY, 4))
    return dni.MultiHorizonSynthesizer(
        trainer_initial(model),
        cells=model.cells,
        batch_dim=model.state_batch_dim,
        hidden=(16,),
        encoder=encoder,
        **settings,
    ).double()


def train(model, synthesizer, text, **settings):
    """The trainer after one pass over `text`, frozen RNN, learning synthesizer."""
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.mean,
        synthesizer=synthesizer,
        synthesizer_optimizer=torch.optim.Adam(synthesizer.parameters(), 3e-3),
        synthetic_scale=0.5,
        discount=0.9,
        state_batch_dim=model.state_batch_dim,
        initial_state=lambda lanes: trainer_initial(model),
        **settings,
    )
    windows = dni.with_lookahead(problems.cut(text, T), T)
    return trainer, [trainer.step(w.inputs, w.targets, ends=w.ends, lookahead=w.lookahead) for w in windows]


@pytest.mark.parametrize(("name", "draw"), [("lstm", False), ("lstm", True), ("odd-nest", False)])
def test_heads_learn_a_predictable_future(name, draw):
    """A text that repeats itself: the first horizon, whose inputs and targets are the context, must be learned well."""
    torch.manual_seed(0)
    text = problems.tokens(5, LANES).repeat(200, 1)
    model = problems.make_model(name)
    synthesizer = multi_horizon(model, horizons=2, tail=True, draw=draw)
    _, results = train(model, synthesizer, text)
    first = results[-1].synthetic
    assert first.r2.shape == (3,)
    assert first.r2[0] > 0.8
    assert first.r2[1] > 0.5
    drawn = torch.stack([~result.synthetic.cosine.isnan() for result in results]).double().mean(0)
    expected = 1 / 3 if draw else 1.0
    assert torch.allclose(drawn, torch.full((3,), expected, dtype=torch.float64), atol=0.1)  # 3 sigma of 500 draws: 0.06


def test_layers_in_the_same_state_get_messages_of_their_own():
    """One map for all layers, without an index of the layer, could not tell them apart."""
    synthesizer = dni.MultiHorizonSynthesizer(torch.zeros(2, 1, 4), horizons=1, hidden=(8,))
    interface = dni.BackwardInterface(synthesizer)
    optimizer = torch.optim.Adam(synthesizer.parameters(), lr=1e-2)
    trigger = torch.randn(1, 3, 4).expand(2, 3, 4)  # [L, B, H]
    message = torch.tensor([1.0, -1.0])[:, None, None].expand(2, 3, 4)
    for _ in range(200):
        optimizer.zero_grad()
        interface.send(message, trigger)
        optimizer.step()
    assert (interface.receive(trigger) * message > 0.5).all()


def test_messages_start_at_exactly_zero_and_are_truncated_bptt():
    text = problems.tokens(STEPS, LANES)
    model = problems.make_model("lstm")
    plain = copy.deepcopy(model)
    expected = reference.truncated_bptt(
        plain, problems.mean, problems.frozen(plain), problems.cut(text, T), trainer_initial(plain)
    )
    synthesizer = multi_horizon(model, horizons=2, tail=True)
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.mean,
        synthesizer=synthesizer,
        synthesizer_optimizer=torch.optim.SGD(synthesizer.parameters(), lr=0.0),
    )
    found = run(trainer, dni.with_lookahead(problems.cut(text, T), T))
    for gradients, (_, reference_gradients) in zip(found, expected, strict=True):
        assert_same(gradients, reference_gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("ends", [{}, {0: [1], 2: [0, 2]}], ids=["one-sequence", "lanes-end"])
def test_exact_future_is_the_oracle(name, ends):
    """Identities 2 and 6: with all steps to come as lookahead it gives full BPTT, of masked lanes too."""
    text = problems.tokens(STEPS, LANES)
    model = problems.make_model(name)
    windows = list(problems.cut(text, 5, ends))
    exact = dni.ExactFuture(model, problems.unreduced, steps=STEPS, window=5, reduction="sum")
    assert not list(exact.parameters())
    trainer = sequence_trainer(
        model,
        problems.frozen(model),
        problems.summed,
        synthesizer=exact,
        synthetic_scale=1.0,
        state_batch_dim=model.state_batch_dim,
        initial_state=lambda lanes: trainer_initial(model),
    )
    found = summed_gradients(run(trainer, dni.with_lookahead(windows, STEPS)))
    expected = reference.full_bptt(model, problems.summed, windows, trainer_initial(model), model.state_batch_dim)
    assert_same(found, expected, **CLOSE)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_exact_steps_with_an_exact_tail_are_full_bptt():
    """n exact steps, and behind them an oracle: everything that is to come."""
    text = problems.tokens(STEPS, LANES)
    model = problems.make_model("lstm")
    windows = list(problems.cut(text, T, {2: [1]}))
    exact = dni.ExactFuture(
        model, problems.unreduced, steps=2, window=T, reduction="sum", tail=reference.Oracle(model, problems.unreduced)
    )
    trainer = sequence_trainer(
        model, problems.frozen(model), problems.summed, synthesizer=exact, synthetic_scale=1.0, discount=1.0
    )
    found = summed_gradients(run(trainer, dni.with_lookahead(windows, STEPS)))
    expected = reference.full_bptt(model, problems.summed, windows, trainer_initial(model), 1)
    assert_same(found, expected, **CLOSE)


def test_exact_future_with_a_tail_trains_the_tail():
    torch.manual_seed(0)
    text = problems.tokens(5, LANES).repeat(200, 1)
    model = problems.make_model("lstm")
    encoder = dni.LookaheadEncoder(2, nn.Embedding(problems.VOCABULARY, 4), nn.Embedding(problems.VOCABULARY, 4))
    tail = dni.StateSynthesizer(trainer_initial(model), cells=model.cells, hidden=(16,), encoder=encoder).double()
    exact = dni.ExactFuture(model, problems.unreduced, steps=1, window=T, tail=tail)
    _, results = train(model, exact, text)
    assert results[-1].synthetic.r2[0].isnan()  # of the exact gradient there is nothing to learn
    assert results[-1].synthetic.r2[1] > 0.3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_exact_futures_tail_is_zero_after_an_end(steps):
    """A lane with exactly as many steps as are run has nothing behind them, as one with fewer has not."""

    class Ones(nn.Module):
        def forward(self, trigger, context):
            return states.map_floating(torch.ones_like, trigger)

    model = problems.make_model("lstm")
    window = next(dni.with_lookahead(problems.cut(problems.tokens(STEPS, LANES), T), 3))
    valid = torch.ones(3, LANES, dtype=torch.bool)
    valid[steps:, 0] = False
    ahead = window.lookahead._replace(valid=valid, mask=None)
    both = [
        dni.ExactFuture(model, problems.unreduced, steps=2, window=T, tail=tail)(trainer_initial(model), ahead)
        for tail in (None, Ones())
    ]
    differs = [(with_tail - without).abs().amax((0, 2)) > 0 for without, with_tail in zip(*both, strict=True)]
    assert all(lanes.tolist() == [steps > 2, True, True] for lanes in differs)


def test_exact_future_leaves_the_random_state():
    torch.manual_seed(0)
    model = problems.make_model("lstm")
    model.rnn.dropout = 0.5
    exact = dni.ExactFuture(model, problems.unreduced, steps=4, window=T)
    window = next(dni.with_lookahead(problems.cut(problems.tokens(STEPS, LANES), T), 4))
    before = torch.get_rng_state()
    first = exact(trainer_initial(model), window.lookahead)
    assert torch.equal(torch.get_rng_state(), before)
    second = exact(trainer_initial(model), window.lookahead)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    other = exact(trainer_initial(model), window.lookahead)
    assert not torch.equal(first[0], other[0]), "dropout must be at work"


def test_gated_cells_bound_what_goes_in_and_what_comes_out():
    class Echo(nn.Module):
        def forward(self, trigger, context):
            self.seen = trigger
            return tuple(torch.ones_like(leaf) for leaf in trigger)

    echo = Echo()
    h, c = torch.randn(1, 2, 3), torch.full((1, 2, 3), 30.0)
    message = dni.GatedCells(echo, dni.LSTM_CELLS)((h, c), None)
    assert torch.equal(echo.seen[0], h)
    assert torch.equal(echo.seen[1], c.tanh())
    assert torch.equal(message[0], torch.ones_like(h))
    assert torch.equal(message[1], torch.zeros_like(c)), "a saturated cell has no gradient"


@pytest.mark.parametrize("name", problems.MODELS)
def test_packed_heads_are_the_composition_of_the_plain_parts(name):
    """Messages, losses, diagnostics and gradients, over several regressions of some or all horizons."""
    torch.manual_seed(0)
    model = problems.make_model(name)
    state = model(problems.tokens(T, LANES), trainer_initial(model))[1]
    settings = {"hidden": (6,), "batch_dim": model.state_batch_dim}
    packed = StateHeads(state, 3, cells=model.cells, **settings).double()
    network = StateNetwork(state, 3, **settings).double()
    nn.init.normal_(packed.network.heads.weight)
    network.load_state_dict(packed.network.state_dict())
    plain = dni.Normalized(dni.GatedCells(network, model.cells))
    for skipped in ([], [1], [0, 2], []):
        state = states.map_floating(lambda leaf: 2 * torch.randn_like(leaf), state)
        targets = [states.map_floating(lambda leaf: 1e-4 * torch.randn_like(leaf), state) for _ in range(3)]
        targets = [None if i in skipped else target for i, target in enumerate(targets)]
        for one, other in zip(predict(packed, state, None), predict(plain, state, None), strict=True):
            for a, b in zip(states.floating(one), states.floating(other), strict=True):
                torch.testing.assert_close(a, b, **CLOSE)
        found, expected = (regress(synthesizer, state, None, targets) for synthesizer in (packed, plain))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, **CLOSE)
        gradients = [
            torch.autograd.grad(step.loss, net.parameters()) for step, net in ((found, packed.network), (expected, network))
        ]
        for a, b in zip(*gradients, strict=True):
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, **CLOSE)


def test_running_rms_is_the_mean_of_all_then_forgets():
    rms = RunningRMS(decay=0.9)
    values = [1.0, 3.0, 2.0]
    for value in values:
        rms.update([torch.zeros(2, 4, 3)], [torch.full((2, 4, 3), value) * torch.tensor([1.0, 10.0])[:, None, None]])
    expected = torch.tensor([sum(v * v for v in values) / 3]).sqrt()
    (scale,) = rms.scales()
    assert scale.shape == (2, 1, 1), "one for each layer"
    torch.testing.assert_close(scale.flatten(), torch.cat([expected, 10 * expected]))
    for _ in range(200):
        rms.update([torch.zeros(2, 4, 3)], [torch.full((2, 4, 3), 0.5)])
    # 200 updates at weight 0.1 leave 1e-9 of the start, whose square was at most 900.
    torch.testing.assert_close(rms.scales()[0].flatten(), torch.full((2,), 0.5), rtol=1e-3, atol=0)


def test_normalised_messages_are_saved_and_loaded_with_their_scale():
    text = problems.tokens(60, LANES)
    model = problems.make_model("lstm")
    synthesizer = multi_horizon(model, horizons=2)
    trainer, _ = train(model, synthesizer, text)
    fresh = multi_horizon(model, horizons=2)
    fresh.load_state_dict(synthesizer.state_dict())
    window = next(dni.with_lookahead(problems.cut(text, T), T))
    pairs = zip(
        predict(synthesizer, trainer.state, window.lookahead), predict(fresh, trainer.state, window.lookahead), strict=True
    )
    for a, b in pairs:
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(leaf.abs().max() > 0 for leaf in a)


def test_lookahead_after_an_end_is_not_seen():
    encoder = dni.LookaheadEncoder(2, nn.Embedding(9, 3), nn.Linear(4, 2))
    lookahead = dni.Lookahead(
        torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 2, 4), torch.tensor([[True, True], [True, False]])
    )
    code = encoder(lookahead)
    assert code.shape == (2, encoder.features) == (2, 2 * (3 + 2 + 2))
    changed = encoder(lookahead._replace(inputs=torch.tensor([[1, 2], [3, 8]])))
    assert torch.equal(code, changed)
    assert torch.equal(code[1, 7:], torch.zeros(7))
    assert code[0, 7:].abs().sum() > 0


def test_missing_and_surplus_context_name_the_cure():
    model = problems.make_model("lstm")
    with pytest.raises(ValueError, match="with_lookahead"):
        multi_horizon(model).predict(trainer_initial(model), None)
    with pytest.raises(ValueError, match="encoder"):
        dni.StateSynthesizer(trainer_initial(model)).double().predict(trainer_initial(model), object())
    with pytest.raises(ValueError, match="steps must be positive"):
        dni.LookaheadEncoder(0, nn.Embedding(2, 2), nn.Embedding(2, 2))
    exact = dni.ExactFuture(model, problems.mean, steps=2, window=2)
    window = next(dni.with_lookahead(problems.cut(problems.tokens(STEPS, LANES), T), 2))
    with pytest.raises(ValueError, match="unreduced"):
        exact(trainer_initial(model), window.lookahead)
    with pytest.raises(ValueError, match="looks 2 steps ahead"):
        exact(trainer_initial(model), None)


def test_least_squares_heads_are_the_closed_form_fit():
    """Against the plain weighted solution over everything seen; features are the state itself and 1."""
    torch.manual_seed(0)
    lanes, features = 40, 7
    state = (torch.randn(1, lanes, 3).double(), torch.randn(1, lanes, 3).double())
    heads = LeastSquaresHeads(state, 2, hidden=(), memory=8.0, ridge=1e-12, solve_every=1).double()
    assert not any(leaf.any() for message in predict(heads, state, None) for leaf in message)
    keep = 1 - lanes / (8.0 * features)
    inputs, wanted, weights = [], [], []
    for age in (2, 1, 0):
        state = tuple(torch.randn(1, lanes, 3).double() for _ in range(2))
        targets = [tuple(1e-4 * torch.randn(1, lanes, 3).double() for _ in range(2)) for _ in range(2)]
        regress(heads, state, None, targets)
        scales = heads.mean_square.sqrt()[:, heads.packing.segment]
        flat = heads.packing.pack(state)
        inputs.append(torch.cat([flat.new_ones(lanes, 1), flat], dim=1))
        wanted.append([heads.packing.pack(target) / scale for target, scale in zip(targets, scales, strict=True)])
        weights.append(flat.new_full((lanes, 1), keep**age).sqrt())
    root = torch.cat(weights)
    for n, message in enumerate(predict(heads, state, None)):
        aim = torch.cat([each[n] for each in wanted])
        fit = torch.linalg.lstsq(root * torch.cat(inputs), root * aim).solution
        torch.testing.assert_close(heads.packing.pack(message), (inputs[-1] @ fit) * scales[n], rtol=1e-6, atol=1e-12)


def test_least_squares_heads_weigh_a_gated_output_by_its_gate():
    """One feature, the constant: the fit of t ~ g w is Σ g t / Σ g²."""
    torch.manual_seed(0)
    state = (torch.zeros(1, 50, 1).double(), torch.randn(1, 50, 1).double())
    heads = LeastSquaresHeads(state, 1, cells=dni.LSTM_CELLS, hidden=(), ridge=1e-9, solve_every=1).double()
    with torch.no_grad():
        heads._learn([0], torch.ones(50, 1).double().expand(50, 3) * torch.tensor([1.0, 0.0, 0.0]), *gate_and_target(state))
    gate, wanted = gate_and_target(state)
    expected = (gate * wanted[:, 0]).sum(0) / gate.square().sum(0)
    torch.testing.assert_close(heads.solution[0, 0], expected, rtol=1e-6, atol=0)


def gate_and_target(state):
    flat = torch.cat([leaf[0] for leaf in state], dim=1)
    gate = torch.stack([torch.ones(50).double(), 1 - flat[:, 1].tanh().square()], dim=1)
    return gate, (3 + flat)[:, None]


def test_least_squares_heads_survive_degenerate_sums():
    state = (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    heads = LeastSquaresHeads(state, 1, hidden=(4,), solve_every=1)
    for target in (torch.zeros(1, 2, 3), torch.full((1, 2, 3), 1e-20)):
        regression = regress(heads, state, None, [(target, target)])
        assert regression.loss.isfinite()
        assert all(leaf.isfinite().all() for leaf in heads(state))
    with pytest.raises(ValueError, match="memory must be positive"):
        LeastSquaresHeads(state, 1, memory=0)


def test_least_squares_heads_keep_up_where_descent_does_not():
    """A text that repeats itself, and few windows of it."""
    torch.manual_seed(0)
    text = problems.tokens(5, LANES).repeat(12, 1)
    model = problems.make_model("lstm")
    found = {}
    for kind in (StateHeads, LeastSquaresHeads):
        torch.manual_seed(0)
        encoder = dni.LookaheadEncoder(T, nn.Embedding(problems.VOCABULARY, 4), nn.Embedding(problems.VOCABULARY, 4))
        heads = kind(trainer_initial(model), 1, cells=model.cells, hidden=(16,), encoder=encoder).double()
        _, results = train(model, Horizons(heads, horizons=1), text)
        found[kind] = float(results[-1].synthetic.r2[0])
    assert found[LeastSquaresHeads] > 0.6
    assert found[LeastSquaresHeads] > found[StateHeads] + 0.2


def test_least_squares_heads_that_were_never_trained_stay_silent():
    """One head drawn a window: the first solution comes before every head has had a target."""
    torch.manual_seed(0)
    model = problems.make_model("lstm")
    heads = LeastSquaresHeads(trainer_initial(model), 3, cells=model.cells, hidden=(6,), solve_every=1).double()
    state = trainer_initial(model)
    target = states.map_floating(torch.ones_like, state)
    heads.regress(state, None, [None, target, None])
    silent, told, silent_too = heads.predict(state, None)
    for message in (silent, silent_too):
        assert all(leaf.abs().max() == 0 for leaf in states.floating(message))
    assert all(leaf.abs().max() > 0.1 for leaf in states.floating(told))


def test_least_squares_heads_resume_exactly_from_what_was_saved():
    """Bit for bit, and in the middle of what is solved every few regressions: layouts and counters count."""

    def fresh():
        torch.manual_seed(0)
        model = problems.make_model("lstm")
        encoder = dni.LookaheadEncoder(2, nn.Embedding(problems.VOCABULARY, 4), nn.Embedding(problems.VOCABULARY, 4))
        heads = LeastSquaresHeads(trainer_initial(model), 1, cells=model.cells, hidden=(16,), encoder=encoder).double()
        return sequence_trainer(
            model,
            torch.optim.Adam(model.parameters(), 1e-3),
            problems.mean,
            synthesizer=Horizons(heads, horizons=1),
            synthetic_scale="auto",
            fidelity_every=3,
            initial_state=lambda lanes: trainer_initial(model),
        )

    windows = list(dni.with_lookahead(problems.cut(problems.tokens(61, LANES), 2), 2))
    whole, first, second = fresh(), fresh(), fresh()
    for number, window in enumerate(windows):
        whole.step(window.inputs, window.targets, lookahead=window.lookahead)
        if number == 9:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        going = first if number < 9 else second
        going.step(window.inputs, window.targets, lookahead=window.lookahead)
    assert max(result for result in whole.credit.rule.injection) > 0, "messages must be at work"
    assert_same_nest(second.state_dict(), whole.state_dict())


def test_statistics_go_back_to_before_the_first_target():
    """Loading what was saved before there was a target leaves none."""
    synthesizer = dni.Normalized(dni.BasicSynthesizer(5, n_hidden=1))
    before = copy.deepcopy(synthesizer.state_dict())
    state = torch.randn(1, LANES, 5)
    regress(synthesizer, state, None, [state])
    assert synthesizer.rms.scales() is not None
    synthesizer.load_state_dict(before)
    assert synthesizer.rms.scales() is None


def test_statistics_of_states_in_half_precision_are_in_full():
    example = torch.zeros(1, 1, 5, dtype=torch.bfloat16)
    assert dni.StateSynthesizer(example, hidden=(8,)).mean_square.dtype == torch.float32
