"""Weights & Biases as the tracker of a run. Needs the package wandb: `pip install 'dni-seq[wandb]'`.

wandb reads its own environment variables: WANDB_PROJECT (default here: dni_seq), WANDB_ENTITY and WANDB_MODE. With
WANDB_MODE=offline, wandb writes to the run's directory and needs neither a network nor an account.
"""

from __future__ import annotations

import html
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dni_seq.app.runs.checkpoint import write_json
from dni_seq.app.runs.crash_report import versions
from dni_seq.app.runs.trackers import Layout

if TYPE_CHECKING:
    from torch import Tensor

SAVED = "wandb-run.json"
"""File in the run's directory with the id of the run at wandb and the latest step that was sent to wandb."""

BINS = 64
"""Bins of a histogram."""


class WandbTracker:
    """Sends curves, texts and histograms to a run at Weights & Biases.

    wandb cannot delete a point, and rejects points of earlier steps than the latest one. Therefore a resumed run sends
    no points of steps up to the latest step that an earlier session has sent. No point is lost, because a resumed run
    computes the same points again. Points of exactly that latest step go to the summary of the run at wandb, because
    the earlier session may not have sent all of them.

    Args:
        directory: directory of the run. wandb writes to `directory`/wandb.
        name: name of the run at wandb.

    Raises:
        ValueError: wandb cannot start, for example because nobody is logged in.
    """

    def __init__(self, directory: Path, name: str) -> None:
        import wandb

        self._wandb, self._saved = wandb, directory / SAVED
        saved = self._read_saved()
        self._sent = self._before = int(saved.get("step", -1))
        self._id = str(saved.get("id") or uuid.uuid4().hex[:8])
        project = os.environ.get("WANDB_PROJECT", "dni_seq")
        directory.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", reinit="create_new")  # leaves stdout, stderr and other runs alone
        try:
            self._run: Any = wandb.init(
                project=project,
                name=name,
                id=self._id,
                dir=str(directory),
                resume="allow" if saved else None,
                settings=settings,
            )
        except wandb.Error as error:
            raise ValueError(
                f"--logger wandb cannot start ({error}): call `wandb login`, set WANDB_MODE=offline, or choose another "
                "--logger"
            ) from error
        write_json(self._saved, {"id": self._id, "step": self._sent})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends values as the points of `step`."""
        self._send(step, {key: float(value) for key, value in values.items()})

    def text(self, step: int, key: str, text: str) -> None:
        """Sends `text` verbatim."""
        self._send(step, {key: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def paragraph(self, step: int, key: str, text: str) -> None:
        """Sends `text` as a paragraph."""
        self._send(step, {key: self._wandb.Html(f"<p>{html.escape(text)}</p>")})

    def histogram(self, step: int, key: str, values: Tensor) -> None:
        """Sends a histogram of `values`. Sends nothing for an empty tensor."""
        import numpy as np

        if values.numel():
            self._send(step, {key: self._wandb.Histogram(np_histogram=np.histogram(values.numpy(), bins=BINS))})

    def dashboard(self, layout: Layout) -> None:
        """Does nothing: wandb lays out its charts itself."""

    def configuration(self, step: int, config: Mapping[str, Any]) -> None:
        """Sends the options and the software versions as the run's configuration."""
        self._run.config.update({**config, **versions()}, allow_val_change=True)

    def hyperparameters(self, config: Mapping[str, Any], final: Mapping[str, str], changed: Mapping[str, Any]) -> None:
        """Does nothing: wandb's table has the configuration and the last value of every key."""

    def flush(self) -> None:
        """Does nothing: wandb's own process writes every point when it receives it."""

    def close(self) -> None:
        """Ends the run at wandb after all points are sent or written."""
        self._run.finish()

    def _send(self, step: int, values: dict[str, Any]) -> None:
        """Sends values of `step`, unless an earlier session has sent this step; see the class."""
        if step <= self._before:
            if step == self._before:
                self._run.summary.update(values)
            return
        if step > self._sent:
            self._sent = step
            # No flush to the disk: a kill cannot damage a renamed file. If a power failure loses the file, the resumed run
            # sends some points a second time.
            temporary = self._saved.with_name(SAVED + ".tmp")
            temporary.write_text(json.dumps({"id": self._id, "step": step}), encoding="utf-8")
            temporary.replace(self._saved)
        self._run.log(values, step=step)

    def _read_saved(self) -> dict[str, Any]:
        """Returns the id and the step that an earlier session has saved; empty without a valid file."""
        try:
            saved = json.loads(self._saved.read_text(encoding="utf-8"))
            return {"id": str(saved["id"]), "step": int(saved["step"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
