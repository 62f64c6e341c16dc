"""Train on an endless stream of real numbers while the numbers arrive.

A machine heats up when it works and cools down slowly. A network estimates the temperature from the load alone, and is
updated after every 2 readings. The synthesizer predicts credit from the next readings. Training therefore runs a few
readings late: `with_lookahead` waits for these readings.

The baseline is truncated BPTT with the same windows. With the synthesizer expect about half of the baseline's error after
as many windows, at about twice the CPU time. With twice the readings, truncated BPTT would reach the same error in the same
CPU time as the synthesizer, but a sensor does not send its readings faster on request.
"""

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import dni_seq as dni

WINDOW, LANES, UNITS = 2, 16, 32


class Estimator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.readout = nn.GRU(1, UNITS), nn.Linear(UNITS, 1)

    def forward(self, load: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, state = self.rnn(load, state)
        return self.readout(outputs), state  # [T, B, 1]


def sensor() -> Iterator[tuple[Tensor, Tensor]]:
    """Yields windows of load and temperature, each [WINDOW, LANES, 1], without end."""
    working, temperature = torch.zeros(LANES), torch.zeros(LANES)
    while True:
        loads, temperatures = [], []
        for _ in range(WINDOW):
            working = torch.where(torch.rand(LANES) < 0.1, 1 - working, working)
            temperature = torch.lerp(temperature, working * 4, 0.08)
            loads.append(working + 0.3 * torch.randn(LANES))
            temperatures.append(temperature)
        yield torch.stack(loads)[..., None], torch.stack(temperatures)[..., None]


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)  # [T, B]


def train(windows: int, synthetic: bool) -> tuple[float, float]:
    """Trains an estimator; returns the mean squared error over the last fifth of the windows, and CPU seconds."""
    torch.manual_seed(0)
    model, errors, start = Estimator(), [], time.process_time()
    example = torch.zeros(WINDOW, LANES, 1)
    synthesizer = dni.FutureGradient.for_model(model, losses, example_inputs=example, outputs=1) if synthetic else None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trainer = dni.SequenceTrainer(model, optimizer, losses, synthesizer=synthesizer, clip=1.0)
    stream = dni.with_lookahead(sensor(), synthesizer.lookahead if synthesizer is not None else 0)
    for window in itertools.islice(stream, windows):
        errors.append(trainer.step(window.inputs, window.targets, lookahead=window.lookahead).loss)
    return float(torch.stack(errors[-windows // 5 :]).mean()), time.process_time() - start


def main(windows: int = 2000) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would only wait
    for synthetic, name in ((False, "truncated BPTT"), (True, "with a synthesizer")):
        error, seconds = train(windows, synthetic)
        print(f"{name}: error {error:.4f} after {windows} windows, {seconds:.0f} s of CPU time")


if __name__ == "__main__":
    main()
