"""Train on any data set of the library `datasets` with a tokenizer of the library `tokenizers`.

The rows are topics of Python's documentation, the tokens are characters. For other text, of any size, replace the rows by
`datasets.load_dataset("OWNER/NAME", split="train", streaming=True)`. The program trains by truncated BPTT in windows of one
step, then again with a synthetic gradient, and prints the perplexity over the last quarter of each run. The second one must
be lower. Halfway through a run the program saves and restores the position and the trainer, as if the run had been killed.
"""

from pydoc_data.topics import topics

import datasets
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import dni_seq as dni
from dni_seq.integrations.datasets import windows
from dni_seq.models.language_model import LanguageModel, token_losses

WINDOW, LANES = 1, 32


def characters(rows: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.train_from_iterator(rows, trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False))
    return tokenizer


def train(rows: list[str], tokenizer: Tokenizer, synthetic: bool, steps: int) -> torch.Tensor:
    torch.manual_seed(0)
    text = datasets.Dataset.from_dict({"text": rows}).to_iterable_dataset()  # streamed, as a large data set would be
    data = windows(text, tokenizer=tokenizer, lanes=LANES, bptt=WINDOW, lookahead=4 * WINDOW)
    model, synthesizer = LanguageModel(tokenizer.get_vocab_size(), embed=32, hidden=64, layers=1), None
    if synthetic:
        sizes = {"vocabulary": tokenizer.get_vocab_size(), "units": 64}
        example = torch.zeros(WINDOW, LANES, dtype=torch.int64)
        synthesizer = dni.FutureGradient.for_model(model, token_losses, example_inputs=example, **sizes)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    trainer, losses = dni.SequenceTrainer(model, adam, token_losses, synthesizer=synthesizer, clip=1.0), []
    for limit in (steps // 2, steps):
        for window in data:
            losses.append(trainer.step(window.inputs, window.targets, ends=window.ends, lookahead=window.lookahead).loss)
            if trainer.steps == limit:
                break
        saved = {"position": data.state_dict(), "trainer": trainer.state_dict()}  # torch.save(saved, path)
        data.load_state_dict(saved["position"])
        trainer.load_state_dict(saved["trainer"])
    return torch.stack(losses[-steps // 4 :]).mean()


def main(steps: int = 1500) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would only wait
    rows = list(topics.values())
    tokenizer = characters(rows)
    for name in ("truncated", "synthetic"):
        print(f"{name}: perplexity {train(rows, tokenizer, name == 'synthetic', steps).exp():.2f} a character")


if __name__ == "__main__":
    main()
