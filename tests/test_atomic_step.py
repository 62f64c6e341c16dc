"""NaNs and infinities: a step is left out whole, counted, said, and the run stops when too many come in a row."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.core import nonfinite, states
from dni_seq.core.nonfinite import NonFiniteError, SkipCounter, broken_lanes
from dni_seq.core.snapshot import LARGE, TensorSnapshot, TrainingSnapshot, buffers_apart, buffers_of
from tests import problems
from tests.atomic import LANES, run, windows
from tests.nests import assert_same
from tests.training import sequence_trainer


def make(name="lstm", synthesizer="zero", dropout=False, **settings) -> dni.SequenceTrainer:
    model = problems.make_model(name)
    if synthesizer == "zero":
        state = model.initial_state(2) if hasattr(model, "initial_state") else torch.zeros(1, 2, 5)
        size = sum(leaf.shape[-1] for leaf in states.floating(state))
        synthesizer = dni.Normalized(dni.BasicSynthesizer(size, n_hidden=1).double())
    settings = {"optimizer": torch.optim.Adam(model.parameters(), 1e-2), "loss_fn": problems.mean} | settings
    return sequence_trainer(model, synthesizer=synthesizer, state_batch_dim=model.state_batch_dim, **settings)


def without_counts(saved):
    """What a step that was left out must not change: all but the counts of steps."""
    saved = copy.deepcopy(saved)
    del saved["steps"], saved["skipped"], saved["gradients"]["updates"]
    if saved["credit"] is not None:
        del saved["credit"]["steps"]
    return saved


class Poison:
    """A loss that is wrong when told to be."""

    def __init__(self, value=None):
        self.value = value

    def __call__(self, outputs, targets):
        loss = problems.mean(outputs, targets)
        return loss if self.value is None else loss * self.value


def fused(model):
    return torch.optim.Adam(model.parameters(), 1e-2, fused=True)


def deciding(trainer, where):
    """The trainer, with optimizers that can skip a step on the device if that is where a bad step is skipped."""
    if where == "on the device":
        trainer.optimizer = fused(trainer.model)
        if trainer.credit is not None:
            trainer.credit.step_optimizer.optimizer = fused(trainer.credit.synthesizer)
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", problems.MODELS)
@pytest.mark.parametrize("synthesizer", [None, "zero"])
def test_a_bad_loss_changes_nothing(name, synthesizer, value, decides):
    loss = Poison()
    one = deciding(make(name, synthesizer, loss_fn=loss), decides)
    first, second, *rest = windows(6)
    assert not any(result.skipped for result in run(one, [first, second]))
    before = copy.deepcopy(one.state_dict())
    loss.value = value
    (result,) = run(one, [rest[0]])
    loss.value = None
    assert result.skipped
    assert not result.loss.isfinite()
    assert (one.steps, one.skipped) == (3, 1)
    assert one.credit is None or one.credit.state_dict()["steps"] == 3
    after, before = without_counts(one.state_dict()), without_counts(before)
    if decides == "on the device" and one.credit is not None:
        # The synthesizer's regression was not sound either, and nobody on the device knows whose fault that was.
        assert (before["credit"].pop("bad")["total"], after["credit"].pop("bad")["total"]) == (0, 1)
    assert_same(after, before)
    assert all(result.loss.isfinite() for result in run(one, rest[1:]))


def test_a_bad_window_is_as_if_it_had_not_been():
    """Later steps are those of a run that never saw it, to the bit."""
    loss = Poison()
    one, other = make(loss_fn=loss), make()
    some = windows(8)
    run(one, some[:3])
    loss.value = float("nan")
    run(one, [some[3]])
    loss.value = None
    expected = run(other, some[:3] + some[4:])[3:]
    found = run(one, some[4:])
    assert [r.loss.item() for r in found] == [r.loss.item() for r in expected]
    assert_same(without_counts(one.state_dict())["model"], without_counts(other.state_dict())["model"])


def test_ends_of_a_bad_window_are_obeyed(decides):
    loss = Poison()
    one = deciding(make(loss_fn=loss), decides)
    first, second = windows(2)
    run(one, [first])
    loss.value = float("nan")
    ends = torch.tensor([False, True, False])
    before = [leaf.clone() for leaf in one.state]
    one.step(second.inputs, second.targets, ends=ends)
    for leaf, was in zip(one.state, before, strict=True):
        assert torch.equal(leaf[:, [0, 2]], was[:, [0, 2]])
        assert not leaf[:, 1].any()
        assert was[:, 1].any()


def test_a_lane_whose_state_is_broken_starts_again_from_the_initial_state(decides):
    """Else it would break all later windows."""
    one = deciding(make(), decides)
    some = windows(3)
    run(one, [some[0]])
    one.state[0][0, 1, 2] = float("inf")
    (result,) = run(one, [some[1]])
    assert result.skipped
    if decides == "here":
        assert "the state that the window starts from (inf at index [0, 1, 2]" in result.events[0]
    assert not one.state[0][:, 1].any()
    assert one.state[0][:, 0].any()
    assert not run(one, [some[2]])[0].skipped


def divided(gradient):
    return gradient / 0


PLACES = {
    "the inputs": lambda model: model.inputs.fill_(float("nan")),
    "the parameter rnn.weight_hh_l0": lambda model: model.rnn.weight_hh_l0.data.fill_(float("nan")),
    "the buffer shift": lambda model: model.shift.fill_(float("nan")),
    "the model's outputs": lambda model: model.readout.weight.data.fill_(1e308),
    "the gradient of rnn.weight_ih_l0": lambda model: model.rnn.weight_ih_l0.register_hook(divided),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_diagnosis_names_the_first_place(place):
    one = make("gru", None)
    one.model.embedding = nn.Identity()
    one.model.inputs = torch.randn(3, LANES, 4, dtype=torch.float64)
    one.model.register_buffer("shift", torch.zeros(1, dtype=torch.float64))
    one.model.readout.register_forward_hook(lambda module, arguments, outputs: outputs + one.model.shift)
    PLACES[place](one.model)
    (result,) = run(one, [windows(1)[0]._replace(inputs=one.model.inputs)])
    assert result.skipped
    assert result.events[0].startswith(f"step 1 skipped; first NaN or infinity in {place} (")


def test_too_many_in_a_row_stop_with_a_diagnosis(decides):
    loss = Poison()
    one = make(loss_fn=loss, skip_limit=3)
    if decides == "on the device":
        one.optimizer, one.credit.step_optimizer.optimizer = fused(one.model), fused(one.credit.synthesizer)
    some = windows(12)
    run(one, some[:2])
    before = copy.deepcopy(one.state_dict()["model"])
    loss.value = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"windows in a row were skipped, from step 3 on; first NaN or infinity in the loss"
    ):
        run(one, some[2:])
    assert_same(one.state_dict()["model"], before)
    assert one.skipped >= 3
    # Saved there and loaded, the row goes on.
    if decides == "here":
        again = make(loss_fn=loss, skip_limit=4)
        again.load_state_dict(copy.deepcopy(one.state_dict()))
        with pytest.raises(NonFiniteError, match="4 windows in a row were skipped, from step 3 on"):
            run(again, some[5:])
    loss.value = None
    assert not run(one, [some[11]])[0].skipped


def test_good_windows_end_the_row():
    loss = Poison()
    one = make(loss_fn=loss, skip_limit=3)
    for i, window in enumerate(windows(9)):
        loss.value = None if i % 3 == 2 else float("nan")
        run(one, [window])
    assert one.skipped == 6


class Synthesizer(nn.Module):
    """Linear, with a message that can be spoiled."""

    def __init__(self, size=5):
        super().__init__()
        self.linear = nn.Linear(size, size).double()
        self.spoil = None

    def forward(self, trigger, context):
        message = states.map_floating(self.linear, trigger)
        return message if self.spoil is None else states.map_floating(lambda leaf: leaf * self.spoil, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_a_bad_message_leaves_the_rnn_a_step_of_truncated_bptt(value, decides):
    """The RNN's step is to the bit the one without an injection; the synthesizer learns nothing from it."""
    synthesizer = Synthesizer()
    one = make("gru", synthesizer, synthesizer_optimizer=fused(synthesizer), synthetic_scale=0.5)
    one.optimizer = fused(one.model)
    *first, second = windows(3)
    run(one, first)
    other = copy.deepcopy(one)
    plain = make("gru", None)
    plain.optimizer = fused(plain.model)
    plain.model.load_state_dict(one.model.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    plain.state = one.state.clone()
    synthesizer.spoil = value
    before = copy.deepcopy(synthesizer.state_dict())
    (result,) = run(one, [second])
    assert not result.skipped
    assert (one.skipped, one.credit.monitor.total) == (0, 1)
    run(plain, [second])
    assert_same(one.model.state_dict(), plain.model.state_dict())
    assert_same(dict(synthesizer.state_dict()), dict(before))
    run(other, [second])
    assert not torch.equal(other.model.rnn.weight_hh_l0, one.model.rnn.weight_hh_l0), "a good message must matter"


def test_a_synthesizer_that_diverges_is_reset_and_switched_off_at_last():
    synthesizer = Synthesizer()
    fresh = copy.deepcopy(synthesizer.state_dict())
    one = make("gru", synthesizer, synthetic_scale=0.5)
    some = windows(40)
    events = []
    resets = []
    for window in some:
        if len(resets) < 4:
            with torch.no_grad():
                synthesizer.linear.weight.fill_(float("nan"))
        (result,) = run(one, [window])
        assert not result.skipped
        assert result.loss.isfinite()
        events += result.events
        if any("diverged" in event for event in result.events):
            assert_same(dict(synthesizer.state_dict()), dict(fresh))
            resets.append(one.steps)
    assert resets == [3, 6, 9, 12]
    assert (one.credit.monitor.resets, one.credit.monitor.disabled) == (3, True)
    assert events[-1] == "step 12: the synthesizer has diverged and was disabled"
    assert "step 3: the synthesizer has diverged and was reset, 1 of 3 times" in events
    assert_same(dict(synthesizer.state_dict()), dict(fresh))
    saved = one.state_dict()
    again = make("gru", Synthesizer(), synthetic_scale=0.5)
    again.load_state_dict(copy.deepcopy(saved))
    more = windows(6, seed=2)
    assert [r.loss.item() for r in run(one, more)] == [r.loss.item() for r in run(again, more)]
    assert again.credit.monitor.disabled


def test_a_synthesizer_that_explodes_is_caught_within_its_limit():
    """A learning rate of 10 makes it explode for real; the RNN learns all the same, as without a synthesizer."""
    text = problems.tokens(600, LANES)

    def trainer_with(synthesizer, rate):
        model = problems.make_model("gru")
        optimizer = None if synthesizer is None else torch.optim.SGD(synthesizer.parameters(), rate)
        return sequence_trainer(
            model,
            torch.optim.Adam(model.parameters(), 1e-2),
            problems.mean,
            synthesizer=synthesizer,
            synthesizer_optimizer=optimizer,
            synthesizer_clip=math.inf,
            synthetic_scale=0.5,
            clip=1.0,
        )

    torch.manual_seed(0)
    one, plain = trainer_with(Synthesizer(), 1000.0), trainer_with(None, 0.0)
    results = [run(t, problems.cut(text, 3)) for t in (one, plain)]
    losses = [[r.loss for r in each] for each in results]
    assert one.credit.monitor.resets == 3
    assert one.credit.monitor.disabled
    assert one.skipped == 0
    last, expected = (torch.stack(each[-40:]).mean() for each in losses)
    assert last < 1.02 * expected


def test_a_bad_normaliser_is_not_taken_in():
    """A target that overflows when squared would make the running mean square infinite."""
    one = make("gru")
    run(one, windows(2))
    before = copy.deepcopy(one.credit.synthesizer.state_dict())
    assert any("mean_square" in key for key in before)
    handle = one.model.rnn.register_forward_hook(lambda m, i, o: (o[0] * 1e200, o[1]))
    results = run(one, windows(2, seed=2))
    handle.remove()
    after = one.credit.synthesizer.state_dict()
    for key in before:
        if "mean_square" in key:
            assert after[key].isfinite().all(), key
    assert any(r.skipped for r in results) or one.credit.monitor.total
    assert all(r.loss.isfinite() for r in run(one, windows(2)))


def test_a_bad_auxiliary_task_is_reset_with_the_synthesizer():
    model = problems.make_model("gru")
    torch.manual_seed(1)
    auxiliary = dni.AuxiliaryTask(torch.zeros(1, LANES, 5, dtype=torch.float64)).double()
    one = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2),
        problems.mean,
        synthesizer=dni.Normalized(dni.BasicSynthesizer(5).double()),
        auxiliary=auxiliary,
    )
    some = windows(8)
    fresh = copy.deepcopy(auxiliary.state_dict())
    run(one, some[:5])
    assert any(not torch.equal(value, auxiliary.state_dict()[key]) for key, value in fresh.items())
    with torch.no_grad():
        next(auxiliary.parameters()).fill_(float("nan"))
    (result,) = run(one, [some[5]])
    assert result.skipped
    assert "the parameter auxiliary.network" in result.events[0]
    assert one.credit.monitor.resets == 1
    assert_same(dict(auxiliary.state_dict()), dict(fresh))
    assert not any(r.skipped for r in run(one, some[6:]))


def test_a_bad_auxiliary_task_is_not_reset_at_a_window_with_a_bad_loss():
    """Its NaN may come from the loss. The next window with a finite loss resets it."""
    model, loss = problems.make_model("gru"), Poison()
    one = sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), 1e-2),
        loss,
        synthesizer=dni.Normalized(dni.BasicSynthesizer(5).double()),
        auxiliary=dni.AuxiliaryTask(torch.zeros(1, LANES, 5, dtype=torch.float64)).double(),
    )
    *first, bad, good = windows(5)
    run(one, first)
    with torch.no_grad():
        next(one.credit.auxiliary.parameters()).fill_(float("nan"))
    resets = []
    for window, loss.value in ((bad, float("nan")), (good, None)):
        (result,) = run(one, [window])
        assert result.skipped
        resets.append(one.credit.monitor.resets)
    assert resets == [0, 1]


def test_a_comparison_is_not_carried_over_a_bad_window():
    """The windows of a comparison must follow each other."""
    loss = Poison()
    settings = {"fidelity_every": 1, "replay_windows": 3, "targets": "lambda"}
    one, other = make(loss_fn=loss, **settings), make(**settings)
    some = windows(9)
    run(one, some[:2])
    assert len(one.credit.state_dict()["ring"]) == 2
    loss.value = float("nan")
    run(one, [some[2]])
    loss.value = None
    saved = one.credit.state_dict()
    assert (saved["ring"], saved["probe_windows"], saved["probe_messages"]) == ([], [], None)
    assert any(r.synthetic.fidelity is not None for r in run(one, some[3:]))
    assert other.credit.state_dict()["ring"] == []


def test_snapshots_restore_tensors_whatever_was_done_to_them():
    module = nn.Module()
    module.register_buffer("small", torch.arange(3.0))
    module.register_buffer("large", torch.zeros(LARGE + 1))
    module.register_buffer("rebound", torch.ones(2))
    module.register_buffer("absent", None)
    small, rebound = module.small, module.rebound
    kept = TensorSnapshot(buffers_of([module, None]))
    for _ in range(2):  # the second time large ones are not copied anew
        kept.keep()
        module.small += 1
        module.large[3] = 2
        module.rebound = torch.zeros(2)
        module.register_buffer("late", torch.ones(1))
        kept.restore()
        assert module.small is small
        assert module.rebound is rebound
        assert torch.equal(module.small, torch.arange(3.0))
        assert not module.large.any()
        assert torch.equal(module.rebound, torch.ones(2))
        assert not hasattr(module, "late")
        assert module.absent is None
    module.large += 1
    kept.keep()
    module.large += 1
    kept.restore()
    assert torch.equal(module.large, torch.ones_like(module.large))


def test_training_snapshots_restore_parameters_buffers_and_optimizers():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(module.parameters())
    whole = TrainingSnapshot([module], [optimizer, None])
    before = copy.deepcopy(module.state_dict())
    module(torch.eye(2)).square().sum().backward()
    optimizer.step()
    for key in ("0.weight", "1.running_mean"):
        assert not torch.equal(module.state_dict()[key], before[key])
    whole.restore()
    assert_same(dict(module.state_dict()), dict(before))
    assert optimizer.state_dict()["state"] == {}


def test_buffers_apart_that_are_one_tensor_stay_one():
    module = nn.ModuleList([nn.Module(), nn.Module()])
    shared = torch.zeros(2)
    for part in module:
        part.register_buffer("shared", shared)
    with buffers_apart(module):
        module[0].shared += 1
        assert module[1].shared.tolist() == [1, 1]
    assert module[0].shared is module[1].shared is shared
    assert shared.tolist() == [0, 0]


def test_a_lane_is_broken_where_one_leaf_of_its_state_is():
    h, c = torch.zeros(2, 3, 4), torch.zeros(3, 4)
    assert broken_lanes((h, c), (1, 0)) is None
    h[1, 0, 2] = float("nan")
    c[2, 3] = float("inf")
    assert broken_lanes((h, c), (1, 0)).tolist() == [True, False, True]


def test_a_counter_counts_rows(decides):
    counter = SkipCounter()
    for good in (True, False, False, True, False):
        counter.add(torch.tensor(good))
    assert (counter.total, counter.in_a_row) == (3, 1)
    other = SkipCounter()
    other.load_state_dict(counter.state_dict())
    other.add(torch.tensor(False))
    assert (other.total, other.in_a_row) == (4, 2)
    other.end_row()
    assert other.in_a_row == 0


@pytest.mark.parametrize("one", [0.0, -3.5, 1e38, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("other", [0.0, 2.0, float("nan"), float("inf"), -float("inf")])
def test_both_finite_is_what_it_says(one, other):
    numbers = torch.tensor(one), torch.tensor(other)
    assert bool(nonfinite.both_finite(*numbers)) == all(bool(number.isfinite()) for number in numbers)
