"""Copy weights from a plain nn.LSTM into dni_seq, train them, save them as safetensors, and copy them back.

A `LanguageModel` takes over a plain model's weights, is trained with exact gradients of the next window, saved and loaded.
The plain model then takes over the trained weights. Before and after training, both models must have the same loss.
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.integrations import pretrained
from dni_seq.models.language_model import LanguageModel, token_losses

WINDOW, LANES, EMBED, UNITS = 5, 32, 32, 64


class Plain(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(vocabulary, EMBED), nn.Linear(UNITS, vocabulary)
        self.rnn = nn.LSTM(EMBED, UNITS)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, state = self.rnn(self.encoder(tokens), state)
        return self.decoder(outputs), state


@torch.no_grad()
def compare(plain: Plain, ours: LanguageModel, text: Tensor, when: str) -> None:
    theirs, mine = (token_losses(model(text[:-1], None)[0], text[1:]).mean() for model in (plain, ours))
    print(f"{when} training: plain {theirs:.4f}, in dni_seq {mine:.4f} nats a character")


def main(steps: int = 400) -> None:
    torch.manual_seed(0)
    alphabet = sorted(set("".join(topics.values())))
    ids = [alphabet.index(c) for c in "".join(topics.values())[: LANES * (steps * WINDOW + 1)]]
    text = torch.tensor(ids).view(LANES, -1).t()  # [steps, B]
    plain, ours = Plain(len(alphabet)), LanguageModel(len(alphabet), embed=EMBED, hidden=UNITS, layers=1)
    ours.embedding.load_state_dict(plain.encoder.state_dict())
    pretrained.plain_rnn(ours).load_state_dict(plain.rnn.state_dict())
    ours.projection.load_state_dict(plain.decoder.state_dict())
    compare(plain, ours, text, "before")
    adam, future = torch.optim.Adam(ours.parameters(), lr=3e-3), dni.ExactFuture(ours, token_losses, steps=WINDOW)
    trainer = dni.SequenceTrainer(ours, adam, token_losses, synthesizer=future, clip=1.0)
    pieces = ((text[i : i + WINDOW], text[i + 1 : i + 1 + WINDOW]) for i in range(0, steps * WINDOW, WINDOW))
    for window in dni.with_lookahead(pieces, WINDOW):
        trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
    ours.save_pretrained("runs/pretrained_weights")  # config.json and model.safetensors
    loaded = LanguageModel.from_pretrained("runs/pretrained_weights")
    plain.encoder.load_state_dict(loaded.embedding.state_dict())
    plain.rnn.load_state_dict(pretrained.plain_rnn(loaded).state_dict())
    plain.decoder.load_state_dict(loaded.projection.state_dict())
    compare(plain, ours, text, "after")


if __name__ == "__main__":
    main()
