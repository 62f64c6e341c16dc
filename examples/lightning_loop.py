"""Truncated BPTT inside Lightning: the loop is Lightning's, the training step is SequenceTrainer's.

A small LSTM learns the text of Python's documentation by characters, in windows of one step. The first run is truncated
BPTT. The second run also injects a synthetic gradient, and its loss must be lower. Each run stops halfway and resumes from
Lightning's checkpoint, which holds the hidden state, the synthesizer and the position in the text.
"""

import logging
import tempfile
from pydoc_data.topics import topics

import datasets
import lightning
import torch

import dni_seq as dni
from dni_seq.integrations.datasets import DatasetWindows, windows
from dni_seq.integrations.lightning import ResumableWindows, SequenceMixin
from dni_seq.models.language_model import LanguageModel, token_losses

WINDOW, LANES, IDS = 1, 32, {c: i for i, c in enumerate(sorted(set("".join(topics.values()))))}


class Characters(SequenceMixin, lightning.LightningModule):
    def __init__(self, synthetic: bool) -> None:
        super().__init__()
        self.model, self.losses = LanguageModel(len(IDS), embed=32, hidden=64, layers=1), []
        sizes = {"example_inputs": torch.zeros(WINDOW, LANES, dtype=torch.int64), "vocabulary": len(IDS), "units": 64}
        self.synthesizer = dni.FutureGradient.for_model(self.model, token_losses, **sizes) if synthetic else None

    def configure_trainer(self) -> dni.SequenceTrainer:
        adam = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        return dni.SequenceTrainer(self.model, adam, token_losses, synthesizer=self.synthesizer, clip=1.0)

    def training_step(self, batch: dni.Window, batch_idx: int) -> torch.Tensor:
        self.losses.append(self.train_window(batch).loss)
        return self.losses[-1]


def stream() -> DatasetWindows:
    text = datasets.Dataset.from_dict({"text": list(topics.values())})
    return windows(text, tokenizer=lambda row: [IDS[c] for c in row], lanes=LANES, bptt=WINDOW, lookahead=4 * WINDOW)


def main(steps: int = 1500) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    for synthetic in (False, True):
        with tempfile.TemporaryDirectory() as directory:
            for limit, file in ((steps // 2, None), (steps, f"{directory}/half.ckpt")):
                module = Characters(synthetic)
                trainer = lightning.Trainer(max_steps=limit, accelerator="cpu", **quiet)
                trainer.fit(module, ResumableWindows(stream()), ckpt_path=file)
                trainer.save_checkpoint(f"{directory}/half.ckpt")
        late = torch.stack(module.losses[-steps // 4 :]).mean()
        print(f"{'synthetic' if synthetic else 'truncated'}, {trainer.global_step} windows: {late:.3f} nats a character")


if __name__ == "__main__":
    main()
