"""Generated tasks: what sequences hold, how they are cut, the curriculum, and credit that reaches back to their start."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import BITS, TASKS, Curriculum, Stage, TaskStream, cut, mean_error
from tests import problems, reference

LANES = 5
STAGES = {"copy": Stage(3), "repeat-copy": Stage(2, 3), "adding": Stage(7)}


def generate(name, lanes=LANES, seed=0, stage=None):
    return TASKS[name].generate(stage or STAGES[name], lanes, torch.Generator().manual_seed(seed))


def stream(name, **settings):
    return TaskStream(TASKS[name], **{"lanes": LANES, "bptt": 3, "stage": STAGES[name], **settings})


def take(windows, count):
    return list(itertools.islice(windows, count))


def assert_same_windows(one, two):
    for a, b in zip(one, two, strict=True):
        flat_a, flat_b = ([*w[:4], *(w.lookahead or ())] for w in (a, b))
        assert all(torch.equal(x, y) for x, y in zip(flat_a, flat_b, strict=True))


def test_copy_holds_flags_vectors_and_the_answer():
    inputs, targets, mask = generate("copy")
    assert (inputs.shape, targets.shape, mask.shape) == ((8, LANES, 10), (8, LANES, 8), (8, LANES))
    assert (inputs.dtype, targets.dtype, mask.dtype) == (torch.float32, torch.float32, torch.bool)
    assert inputs[..., BITS].nonzero()[:, 0].tolist() == [0] * LANES
    assert inputs[..., BITS + 1].nonzero()[:, 0].tolist() == [4] * LANES
    vectors = inputs[1:4, :, :BITS]
    assert set(vectors.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(targets[5:], vectors)
    # Nothing but the vectors' own steps shows them.
    assert not inputs[[0, 4, 5, 6, 7], :, :BITS].any()
    assert not targets[:5].any()
    assert mask.all(1).tolist() == [False] * 5 + [True] * 3
    assert not mask[:5].any()


def test_repeat_copy_tells_the_repeats_and_wants_an_end_flag():
    inputs, targets, mask = generate("repeat-copy")
    assert (inputs.shape, targets.shape) == ((11, LANES, 11), (11, LANES, 9))
    assert torch.equal(inputs[3, :, BITS:], torch.tensor([0, 1, 0.3]).expand(LANES, 3))
    vectors = inputs[1:3, :, :BITS]
    assert vectors.any()
    for repeat in range(3):
        assert torch.equal(targets[4 + 2 * repeat : 6 + 2 * repeat, :, :BITS], vectors)
    assert targets[..., BITS].nonzero()[:, 0].tolist() == [10] * LANES
    assert not targets[10, :, :BITS].any()
    assert mask.all(1).tolist() == [False] * 4 + [True] * 7
    assert not mask[:4].any()


@pytest.mark.parametrize("steps", [2, 7])
def test_adding_wants_the_sum_of_the_two_marked_numbers(steps):
    inputs, targets, mask = generate("adding", lanes=200, stage=Stage(steps))
    assert (inputs.shape, targets.shape) == ((steps, 200, 2), (steps, 200, 1))
    half = steps // 2
    for part in (inputs[:half, :, 1], inputs[half:, :, 1]):
        assert part.sum(0).tolist() == [1.0] * 200
        assert part.sum(1).all()  # every place is drawn in some lane
    for lane in range(200):
        marked = inputs[inputs[:, lane, 1] == 1, lane, 0]
        assert targets[-1, lane, 0] == marked[0] + marked[1]
    assert mask.sum(0).tolist() == [1] * 200
    assert mask[-1].all()


class Constant(nn.Module):
    """Answers the same at every step; `initial_state` and a parameter as a model has them."""

    def __init__(self, answer):
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def initial_state(self, lanes):
        return self.answer.new_zeros(1, lanes, 1)

    def forward(self, inputs, state):
        return self.answer.expand(*inputs.shape[:2], -1), state


def test_the_error_is_1_for_who_knows_nothing():
    generator = torch.Generator().manual_seed(0)
    ignorant = Constant([0.0] * 8)
    # One bit a bit, up to float32's rounding.
    assert mean_error(ignorant, TASKS["copy"], Stage(3), generator, 300) == pytest.approx(1, rel=1e-6)
    # Logits of +-2 for a bit that is 1 half the time: (log2(1 + e^-2) + log2(1 + e^2)) / 2 bits; 24,000 fair coins.
    confident = Constant([2.0, -2.0] * 4)
    assert mean_error(confident, TASKS["copy"], Stage(10), generator, 300) == pytest.approx(1.626, abs=0.05)
    # The variance's share: a sample variance of 2,000 draws is within 10 % (three standard errors).
    assert mean_error(Constant([1.0]), TASKS["adding"], Stage(6), generator, 2000) == pytest.approx(1, abs=0.1)


def test_the_error_leaves_the_model_as_it_was():
    model = Constant([0.0] * 9)
    model.train()
    mean_error(model, TASKS["repeat-copy"], Stage(2, 2), torch.Generator(), 10)
    assert model.training
    assert model.answer.grad is None


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("bptt", [1, 3, 4, 50])
def test_windows_are_cut_every_t_steps_from_the_sequence_start(name, bptt):
    sequences = generate(name)
    windows = list(cut(sequences, bptt))
    assert [len(w.inputs) for w in windows[:-1]] == [bptt] * (len(windows) - 1)
    assert 1 <= len(windows[-1].inputs) <= bptt
    for position, whole in enumerate(sequences):
        assert torch.equal(torch.cat([w[position] for w in windows]), whole)
    assert [w.ends.tolist() for w in windows] == [[False] * LANES] * (len(windows) - 1) + [[True] * LANES]


@pytest.mark.parametrize("name", TASKS)
def test_a_stream_is_fresh_sequences_of_its_seed(name):
    windows = take(stream(name, seed=4), 12)
    assert_same_windows(windows, take(stream(name, seed=4), 12))
    sequences, inputs = [], []
    for window in windows:
        inputs.append(window.inputs)
        if window.ends.all():
            sequences.append(torch.cat(inputs))
            inputs = []
    assert len(sequences) >= 3
    assert sequences[0].shape == sequences[1].shape
    assert not torch.equal(sequences[0], sequences[1])
    assert not torch.equal(sequences[0], take(stream(name, seed=5), 12)[0].inputs[: len(sequences[0])])


def test_lookahead_is_what_follows_in_the_sequence():
    windows = take(stream("copy", lookahead=4), 6)
    sequence = generate("copy")
    for k, window in enumerate(windows[:3]):
        behind = min(8, 3 * (k + 1))
        seen = min(4, 8 - behind)
        ahead = window.lookahead
        assert ahead.valid.all(1).tolist() == [True] * seen + [False] * (4 - seen)
        assert not ahead.valid[seen:].any()
        assert torch.equal(ahead.inputs[:seen], sequence.inputs[behind : behind + seen])
        assert torch.equal(ahead.targets[:seen], sequence.targets[behind : behind + seen])
        assert torch.equal(ahead.mask[:seen], sequence.mask[behind : behind + seen])


@pytest.mark.parametrize("lookahead", [0, 20])
def test_a_new_stage_begins_with_the_next_sequence(lookahead):
    source = stream("copy", lookahead=lookahead)
    windows = iter(source)
    first = [next(windows)]
    source.stage = Stage(1)
    first += take(windows, 2)
    assert sum(len(w.inputs) for w in first) == 8
    assert first[-1].ends.all()
    assert [len(w.inputs) for w in take(windows, 4)] == [3, 1, 3, 1]


@pytest.mark.parametrize("given", range(8))
def test_a_stream_resumes_where_it_was_saved(given, tmp_path):
    """Before the first window, within sequences, and between two of them with a new stage."""
    whole = stream("repeat-copy", lookahead=5, seed=3)
    windows = iter(whole)
    take(windows, given)
    if given == 4:  # the end of the first sequence, of 11 steps
        whole.stage = Stage(3, 3)
    torch.save(whole.state_dict(), tmp_path / "stream.pt")
    resumed = stream("repeat-copy", lookahead=5, seed=99, stage=Stage(1))
    take(resumed, 2)
    resumed.load_state_dict(torch.load(tmp_path / "stream.pt", weights_only=True))
    assert resumed.stage == whole.stage
    assert_same_windows(take(resumed, 9), take(windows, 9))


def test_the_curriculum_asks_for_a_check_and_raises_what_is_solved():
    curriculum = Curriculum(TASKS["copy"], threshold=0.15, patience=3)
    assert (curriculum.stage, curriculum.solved) == (Stage(1), 0)
    assert [curriculum.observe(error) for error in (0.01, 0.01)] == [False, False]
    assert curriculum.observe(0.2)  # the mean of the latest three is 0.073
    assert not curriculum.conclude(0.15)  # not below
    assert (curriculum.stage, curriculum.solved) == (Stage(1), 0)
    # A failed check asks for three new ones.
    assert [curriculum.observe(error) for error in (0.1, 0.1, 0.1)] == [False, False, True]
    assert curriculum.conclude(0.149)
    assert (curriculum.stage, curriculum.solved) == (Stage(2), 1)
    assert [curriculum.observe(error) for error in (0.5, 0.1, 0.1, 0.1)] == [False, False, False, True]
    assert not curriculum.conclude(float("nan"))


def test_the_curriculum_resumes():
    whole = Curriculum(TASKS["repeat-copy"], patience=2)
    whole.conclude(0.1)
    whole.observe(0.1)
    resumed = Curriculum(TASKS["repeat-copy"], patience=2)
    resumed.load_state_dict(whole.state_dict())
    assert (resumed.stage, resumed.solved) == (whole.stage, whole.solved) == (Stage(2), 1)
    assert resumed.observe(0.1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy", [(1, 1), (2, 1), (3, 1), (4, 1)]),
        ("repeat-copy", [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3)]),
        ("adding", [(4, 1), (5, 1), (6, 1)]),
    ],
)
def test_stages_follow_each_other(name, expected):
    stages = [TASKS[name].first]
    while len(stages) < len(expected):
        stages.append(TASKS[name].harder(stages[-1]))
    assert stages == expected


def test_lengths_are_n_and_n_times_r():
    assert (Stage(4).length, Stage(4, 3).length) == (4, 12)
    assert TASKS["adding"].harder(Stage(50)) == Stage(55)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lanes": 0}, "lanes must be 1 or more"),
        ({"bptt": 0}, "bptt must be 1 or more"),
        ({"lookahead": -1}, "lookahead must be 0 or more"),
        ({"stage": Stage(0)}, "begin at size 1"),
        ({"stage": Stage(1, 0)}, "1 repeat"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stream("repeat-copy", **settings)


def test_bad_curricula_are_refused():
    for settings in ({"threshold": 0}, {"patience": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            Curriculum(TASKS["copy"], **settings)
    with pytest.raises(ValueError, match="begin at size 2"):
        Curriculum(TASKS["adding"], start=Stage(1))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_model_carries_its_state(cell):
    torch.manual_seed(0)
    model = VectorRNN(10, 8, cell=cell, hidden=6, layers=2)
    inputs = generate("copy").inputs
    whole, last = model(inputs, model.initial_state(LANES))
    first, state = model(inputs[:3], None)
    second, end = model(inputs[3:], state)
    assert whole.shape == (8, LANES, 8)
    # Two runs of the same kernel, on other shapes: float32's rounding.
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize(("settings", "message"), [({"hidden": 0}, "hidden must be 1"), ({"cell": "rnn"}, "lstm, gru")])
def test_the_model_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VectorRNN(10, 8, **settings)


def in_double(window):
    ahead = window.lookahead
    ahead = ahead._replace(inputs=ahead.inputs.double(), targets=ahead.targets.double())
    return window._replace(inputs=window.inputs.double(), targets=window.targets.double(), lookahead=ahead)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_exact_future_makes_windows_full_bptt(name, cell):
    """The last window is ragged in all three tasks, and the answer's gradient has to reach back over several windows."""
    task = TASKS[name]
    torch.manual_seed(0)
    model = VectorRNN(task.input_size, task.target_size, cell=cell, hidden=6).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # so that states and gradients are large
    windows = [in_double(w) for w in dni.with_lookahead(cut(generate(name), 3), 12)]
    assert len(windows[-1].inputs) < 3
    exact = dni.ExactFuture(model, task.losses, steps=12, window=3, reduction="lane-mean")
    settings = {"config": dni.SyntheticGradientConfig(1.0, discount=1.0), "reduction": "lane-mean"}
    trainer = dni.SequenceTrainer(model, problems.frozen(model), task.losses, synthesizer=exact, **settings)
    plain = dni.SequenceTrainer(model, problems.frozen(model), task.losses, reduction="lane-mean")
    summed = {which: {n: torch.zeros_like(p) for n, p in model.named_parameters()} for which in ("exact", "plain")}
    for which, each in (("exact", trainer), ("plain", plain)):
        for w in windows:
            each.step(w.inputs, w.targets, ends=w.ends, mask=w.mask, lookahead=w.lookahead if which == "exact" else None)
            for n, gradient in problems.gradients(model).items():
                summed[which][n] += gradient
    whole = in_double(next(dni.with_lookahead(cut(generate(name), 100), 0)))
    full = reference.full_bptt(
        model, lambda o, t: task.losses(o, t)[whole.mask].sum() / LANES, [whole], model.initial_state(LANES), 1
    )
    for n, expected in full.items():
        torch.testing.assert_close(summed["exact"][n], expected, rtol=1e-9, atol=1e-12, msg=n)
    # Truncation alone is far off, so the equality above is the exact future's doing.
    key = "rnn.weight_ih_l0"
    assert (summed["plain"][key] - full[key]).norm() > 0.1 * full[key].norm()
