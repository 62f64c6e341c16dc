"""Windows over the lanes of one split, epoch after epoch, resumable at any window.

Legend: T = window length in steps, B = lanes, m = lookahead in steps, n = tokens in a lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dni_seq.streams.documents import DataError, Documents
from dni_seq.streams.lanes import open_lanes
from dni_seq.streams.tokens import Tokenizer
from dni_seq.windows import Lookahead, Window


class WindowStream:
    """Windows of T steps of B continuous lanes of text.

    The target of each step is the lane's next token, so a lane of n tokens has n - 1 steps an epoch. Iterating yields
    what is left of the current epoch, from the current position on, so a loop that was left goes on where it was. The
    last window of an epoch is as short as it has to be and has `ends` all True; the others have `ends` None. With m > 0
    each window has its lookahead, which ends with the epoch.

    Inputs, targets and lookahead of a window share memory; whoever changes one in place copies it first.

    Attributes:
        lanes: B.
        bptt: T.
        lookahead: m.
        epoch: epochs finished; the last window of an epoch counts as its end as soon as it is yielded.

    Args:
        documents: the split's text.
        tokenizer: makes its tokens.
        lanes: B.
        bptt: T.
        lookahead: m, 0 for none.

    Raises:
        ValueError: a size is out of range.
        DataError: the text has fewer than two tokens a lane, or cannot be read.
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer, *, lanes: int, bptt: int, lookahead: int = 0) -> None:
        for name, value, least in (("lanes", lanes, 1), ("bptt", bptt, 1), ("lookahead", lookahead, 0)):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.lanes, self.bptt, self.lookahead = lanes, bptt, lookahead
        self.epoch = 0
        self._lanes = open_lanes(documents, tokenizer, lanes)

    def __iter__(self) -> Iterator[Window]:
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next()

    @property
    def windows_per_epoch(self) -> int | None:
        """The number of windows in a whole epoch; None where the text is streamed, so that nobody knows."""
        length = self._lanes.length
        return None if length is None else -(-(length - 1) // self.bptt)

    @property
    def tokens_per_epoch(self) -> int | None:
        """The number of tokens predicted in a whole epoch, (n - 1) B; None where the text is streamed."""
        length = self._lanes.length
        return None if length is None else (length - 1) * self.lanes

    @property
    def characters_per_token(self) -> float:
        """The characters of text, newlines included, that a token stands for on average.

        Over the whole split where it is held in memory, else over what has been read so far. Bits per character are nats per
        token / ln 2 / this.
        """
        tally = self._lanes.tally
        return tally.characters / tally.tokens

    @property
    def unknown_tokens(self) -> int:
        """How many tokens of the text were not in the vocabulary, out of what `characters_per_token` counts."""
        return self._lanes.tally.unknown

    def state_dict(self) -> dict[str, Any]:
        """The position of the next window, whatever the lookahead has seen: plain numbers, strings, lists, dicts."""
        return {"epoch": self.epoch, "lanes": self.lanes, "position": self._lanes.position()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; T and m may have changed since, the lanes and the text may not.

        Raises:
            DataError: the position is one in another number of lanes or another text, or is none at all.
        """
        try:
            if state["lanes"] != self.lanes:
                raise DataError(
                    f"the saved position is in {state['lanes']} lanes, this stream has {self.lanes}: "
                    "resume with the same --batch-size"
                )
            epoch = int(state["epoch"])
            self._lanes.seek(state["position"])
        except (KeyError, TypeError) as error:
            raise DataError("this is not the saved position of such a stream") from error
        self.epoch = epoch

    def _next(self) -> Window:
        """The next window; behind an epoch's last one the position is the start of the next epoch."""
        # One step past the window tells whether the epoch ends with it.
        tokens = self._lanes.peek(self.bptt + max(self.lookahead, 1) + 1)
        ids = torch.from_numpy(tokens.astype(np.int64))  # [at most T + m + 1, B]
        left = len(ids) - 1
        steps = min(self.bptt, left)
        last = left == steps
        window = Window(
            inputs=ids[:steps],
            targets=ids[1 : steps + 1],
            ends=torch.ones(self.lanes, dtype=torch.bool) if last else None,
            lookahead=self._look(ids[steps:]) if self.lookahead else None,
        )
        if last:
            self._lanes.rewind()
            self.epoch += 1
        else:
            self._lanes.advance(steps)
        return window

    def _look(self, ids: Tensor) -> Lookahead:
        """The lookahead out of the tokens [at most m + 1, B] that follow a window."""
        seen, m = len(ids) - 1, self.lookahead
        if seen >= m:
            return Lookahead(ids[:m], ids[1 : m + 1], torch.ones(m, self.lanes, dtype=torch.bool))
        inputs, targets = ids.new_zeros(2, m, self.lanes)
        inputs[:seen], targets[:seen] = ids[:seen], ids[1:]
        return Lookahead(inputs, targets, (torch.arange(m) < seen)[:, None].repeat(1, self.lanes))
