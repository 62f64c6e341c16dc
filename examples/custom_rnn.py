"""Train your own RNN with synthetic gradients: a cell of two time scales, whose state is a nest of your own making.

In the adding problem one number is marked in each half of a sequence, and the network must give the sum of the two marked
numbers at the end. A window is half a sequence long. The error is 1 for a network that knows nothing; below 0.15 the problem
counts as solved. The program trains by truncated BPTT, and again with a synthesizer. With the synthesizer the error falls
after fewer updates, but an update needs one and a half times the CPU time.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.app.runs.run_log import RunLog
from dni_seq.streams.algorithmic_tasks import TASKS, Stage, TaskStream

ADDING, UNITS, WINDOW = TASKS["adding"], 32, 5


class TwoTimescales(nn.Module):
    """Fast and slow units, and a clock; the state is {"units": [fast, slow], "clock": steps}, leaves [B, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.update, self.readout = nn.Linear(2 + 2 * UNITS, 3 * UNITS), nn.Linear(2 * UNITS, 1)

    def forward(self, inputs: Tensor, state: dict) -> tuple[Tensor, dict]:
        (fast, slow), outputs = state["units"], []
        for x in inputs:  # [B, 2]
            fast, new, gate = self.update(torch.cat([x, fast, slow], dim=-1)).chunk(3, dim=-1)
            fast, slow = fast.tanh(), torch.lerp(slow, new.tanh(), gate.sigmoid())
            outputs.append(self.readout(torch.cat([fast, slow], dim=-1)))
        return torch.stack(outputs), {"units": [fast, slow], "clock": state["clock"] + len(inputs)}

    def initial_state(self, lanes: int) -> dict:
        return {"units": [torch.zeros(lanes, UNITS)] * 2, "clock": torch.zeros(lanes, dtype=torch.int64)}


def train(updates: int, synthetic: bool) -> list[float]:
    """Trains a model; returns its error after each sixth of the updates."""
    torch.manual_seed(0)
    model, losses, errors = TwoTimescales(), [], []
    example = {"example_inputs": torch.zeros(WINDOW, 1, 2), "outputs": 1}
    synthesizer = dni.FutureGradient.for_model(model, ADDING.losses, **example) if synthetic else None
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    trainer = dni.SequenceTrainer(model, adam, ADDING.losses, synthesizer=synthesizer, state_batch_dim=0, clip=1.0)
    ahead = synthesizer.lookahead if synthesizer is not None else 0
    windows = TaskStream(ADDING, lanes=32, bptt=WINDOW, lookahead=ahead, seed=0, stage=Stage(10))
    for _, (inputs, targets, mask, ends, lookahead) in zip(range(updates), windows, strict=False):
        result = trainer.step(inputs, targets, mask=mask, ends=ends, lookahead=lookahead)
        losses += [result.loss] if mask.any() else []
        if trainer.steps % (updates // 6) == 0:
            errors.append(ADDING.error_of_loss * float(torch.stack(losses[-updates // 12 :]).mean()))
    return errors


def main(updates: int = 900) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would only wait
    log = RunLog(Path("runs/custom_rnn"))  # tensorboard --logdir runs
    for point, errors in enumerate(zip(train(updates, False), train(updates, True), strict=True), 1):
        step = point * (updates // 6)
        log.scalars(step, {"error": errors[1]})
        print(f"update {step}: error {errors[0]:.2f} by truncated BPTT, {errors[1]:.2f} with a synthesizer")
    log.close()


if __name__ == "__main__":
    main()
