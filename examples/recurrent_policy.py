"""Train a policy with memory on replayed sequences with stored states and burn-in as in R2D2, in long and short windows.

The first step shows which turn at the corridor's end is right. In SHORT windows no gradient goes from the end to that step.
"""

import torch

import dni_seq as dni

CORRIDOR, LANES, UNITS, BURN_IN, SHORT = 20, 64, 32, 2, 2


class Policy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.readout = torch.nn.GRU(3, UNITS), torch.nn.Linear(UNITS, 2)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, state = self.rnn(inputs, state)
        return self.readout(outputs), state  # [T, B, 2], the reward that each turn leads to


@torch.no_grad()
def play(policy: Policy, epsilon: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    cue, seen = torch.randint(2, (LANES,)), torch.zeros(CORRIDOR, LANES, 3)  # a random turn is right in half of the lanes
    seen[0, torch.arange(LANES), cue], seen[-1, :, 2] = 1.0, 1.0  # left or right, then the end of the corridor
    turns, states = [], [torch.zeros(1, LANES, UNITS)]
    for step in seen:
        values, state = policy(step[None], states[-1])
        states.append(state)
        turns.append(torch.where(torch.rand(LANES) < epsilon, torch.randint(2, (LANES,)), values[0].argmax(-1)))
    return seen, torch.stack(turns), (turns[-1] == cue).float().expand(CORRIDOR, LANES), states


def learn(steps: int, updates: int) -> torch.Tensor:
    def losses(values: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (values.gather(-1, targets[0][..., None])[..., 0] - targets[1]).square()  # [T, B]

    policy, memory, right = Policy(), [], []
    trainer = dni.SequenceTrainer(policy, torch.optim.Adam(policy.parameters(), lr=5e-3), losses, clip=1.0)
    for _ in range(updates):
        memory = [*memory, play(policy, epsilon=0.2)][-20:]
        *parts, states = memory[torch.randint(len(memory), ())]
        trainer.state = states[(start := int(torch.randint(2, ())) * CORRIDOR // 2)]
        cuts = zip(*(part[start:].split(steps) for part in parts), strict=True)
        for window in dni.burn_in([(seen, (turns, reward)) for seen, turns, reward in cuts], BURN_IN):
            trainer.step(window.inputs, window.targets, mask=window.mask)
        right.append(float(play(policy, epsilon=0.0)[2].mean()))
    return torch.tensor(right)


def main(updates: int = 240) -> None:
    for steps in (CORRIDOR, SHORT):
        torch.manual_seed(0)
        for number, share in enumerate(learn(steps, updates).split(updates // 6), start=1):
            print(f"T = {steps}, to update {number * (updates // 6)}: {share.mean():.0%} of the turns right")


if __name__ == "__main__":
    main()
