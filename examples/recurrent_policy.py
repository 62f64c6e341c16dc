"""A policy with memory, trained from replayed sequences with stored states and burn-in, as R2D2 is.

The first step of a corridor shows left or right, and at its end the policy has to turn that way: half the turns are right
by chance. A replayed sequence starts at the cue or in the middle of the corridor, from the state of an older policy. Its
first steps update the state and count in no loss. A sequence is one window; the baseline is truncated BPTT, which cuts it
into windows of SHORT steps, so that no gradient reaches the cue from the end.
"""

import torch
from torch import Tensor, nn

import dni_seq as dni

CORRIDOR, LANES, UNITS, BURN_IN, SHORT = 20, 64, 32, 2, 2


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.readout = nn.GRU(3, UNITS), nn.Linear(UNITS, 2)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = self.rnn(inputs, state)
        return self.readout(outputs), state  # [T, B, 2], the reward that each turn leads to


@torch.no_grad()
def play(policy: Policy, epsilon: float) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns what was seen [T, B, 3], the turns [T, B], their reward [T, B], and the state before each step."""
    cue, seen = torch.randint(2, (LANES,)), torch.zeros(CORRIDOR, LANES, 3)
    seen[0, torch.arange(LANES), cue], seen[-1, :, 2] = 1.0, 1.0  # left or right, then the end of the corridor
    turns, states = [], [torch.zeros(1, LANES, UNITS)]
    for step in seen:
        values, state = policy(step[None], states[-1])
        states.append(state)
        turns.append(torch.where(torch.rand(LANES) < epsilon, torch.randint(2, (LANES,)), values[0].argmax(-1)))
    return seen, torch.stack(turns), (turns[-1] == cue).float().expand(CORRIDOR, LANES), states


def losses(values: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    return (values.gather(-1, targets[0][..., None])[..., 0] - targets[1]).square()  # [T, B]


def learn(steps: int, updates: int) -> list[float]:
    """Trains a policy in windows of so many steps; returns the share of right turns after each update."""
    torch.manual_seed(0)
    policy, memory, right = Policy(), [], []
    trainer = dni.SequenceTrainer(policy, torch.optim.Adam(policy.parameters(), lr=5e-3), losses, clip=1.0)
    for _ in range(updates):
        memory = [*memory, play(policy, epsilon=0.2)][-20:]
        seen, turns, reward, states = memory[torch.randint(len(memory), ())]
        start = int(torch.randint(2, ())) * CORRIDOR // 2
        trainer.state = states[start]
        cuts = [slice(begin, min(begin + steps, CORRIDOR)) for begin in range(start, CORRIDOR, steps)]
        for window in dni.burn_in([(seen[cut], (turns[cut], reward[cut])) for cut in cuts], BURN_IN):
            trainer.step(window.inputs, window.targets, mask=window.mask)
        right.append(float(play(policy, epsilon=0.0)[2].mean()))
    return right


def main(updates: int = 240) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would only wait
    whole, cut, each = torch.tensor(learn(CORRIDOR, updates)), torch.tensor(learn(SHORT, updates)), updates // 6
    for a, b, update in zip(whole.split(each), cut.split(each), range(each, updates + 1, each), strict=False):
        print(f"to update {update}: {a.mean():.0%} of the turns right; by truncated BPTT, T = {SHORT}, {b.mean():.0%}")


if __name__ == "__main__":
    main()
