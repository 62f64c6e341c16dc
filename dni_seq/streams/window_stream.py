"""Windows over the lanes of one split, epoch after epoch, resumable at any window.

Legend: T = window length in steps, B = lanes, m = lookahead in steps, n = tokens in a lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dni_seq.core.windows import Window
from dni_seq.streams.document_lanes import DocumentLanes
from dni_seq.streams.documents import DataError, Documents
from dni_seq.streams.lanes import HeldLanes, Lanes, StreamedLanes
from dni_seq.streams.tokenization import Tokenizer


class WindowStream:
    """Windows of T steps of B lanes of text.

    The target of each step is the lane's next token. Iterating yields what is left of the current epoch, from the current
    position on, so a loop that was left goes on where it was. The last window of an epoch is as short as it has to be and
    has `ends` all True. With m > 0 each window has its lookahead, which ends with the epoch.

    Without `document_reset` lanes are continuous, a lane of n tokens has n - 1 steps an epoch, and no other window has
    `ends`. With it a lane ends with each document, its last steps in the window are padded under `mask`, and the lane's
    next window starts another document; the lookahead ends with the document.

    Inputs, targets and lookahead of a window share memory; whoever changes one in place copies it first.

    Attributes:
        lanes: B.
        bptt: T.
        lookahead: m.
        document_reset: whether lanes end with each document.
        epoch: epochs finished; the last window of an epoch counts as its end as soon as it is yielded.

    Args:
        documents: the split's text.
        tokenizer: makes its tokens.
        lanes: B.
        bptt: T.
        lookahead: m, 0 for none.
        document_reset: whether lanes end with each document.

    Raises:
        ValueError: a size is out of range.
        DataError: the text has fewer than two tokens a lane, or cannot be read.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        lanes: int,
        bptt: int,
        lookahead: int = 0,
        document_reset: bool = False,
    ) -> None:
        for name, value, least in (("lanes", lanes, 1), ("bptt", bptt, 1), ("lookahead", lookahead, 0)):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.lanes, self.bptt, self.lookahead = lanes, bptt, lookahead
        self.document_reset = document_reset
        self.epoch = 0
        running = HeldLanes if documents.small else StreamedLanes
        self._lanes: Lanes = (DocumentLanes if document_reset else running)(documents, tokenizer, lanes)

    def __iter__(self) -> Iterator[Window]:
        epoch = self.epoch
        while self.epoch == epoch:
            window, last = self._lanes.window(self.bptt, self.lookahead)
            if last:
                self._lanes.rewind(epoch + 1)
                self.epoch += 1
            yield window

    def restart(self) -> None:
        """Go to the start of the current epoch."""
        self._lanes.rewind(self.epoch)

    @property
    def windows_per_epoch(self) -> int | None:
        """The number of windows in a whole epoch; None where nobody knows, in streamed text or with `document_reset`."""
        length = self._lanes.length
        return None if length is None else -(-(length - 1) // self.bptt)

    @property
    def tokens_per_epoch(self) -> int | None:
        """The number of tokens predicted in a whole epoch, (n - 1) B; None where nobody knows."""
        length = self._lanes.length
        return None if length is None else (length - 1) * self.lanes

    @property
    def characters_per_token(self) -> float:
        """The characters of text, newlines included, that a token stands for on average.

        Over the whole split where it is held in memory, else over what has been read so far. Bits per character are nats per
        token / ln 2 / this.
        """
        stats = self._lanes.stats
        return stats.characters / stats.tokens

    @property
    def words_per_token(self) -> float:
        """The words, line ends counted as words, that a token stands for on average, over the same text.

        The perplexity a word is exp(nats per token / this); with a word tokenizer this is 1.
        """
        stats = self._lanes.stats
        return stats.words / stats.tokens

    @property
    def unknown_tokens(self) -> int:
        """How many tokens of the text were not in the vocabulary, out of what `characters_per_token` counts."""
        return self._lanes.stats.unknown

    @property
    def unknown_share(self) -> float:
        """The share of the tokens that were not in the vocabulary."""
        stats = self._lanes.stats
        return stats.unknown / stats.tokens

    def state_dict(self) -> dict[str, Any]:
        """The position of the next window, whatever has been read ahead: plain numbers, strings, lists, dicts."""
        return {
            "epoch": self.epoch,
            "lanes": self.lanes,
            "document_reset": self.document_reset,
            "position": self._lanes.position(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; T and m may have changed since, the lanes and the text may not.

        Raises:
            DataError: the position is one in another number or kind of lanes or another text, or is none at all.
        """
        try:
            if state["lanes"] != self.lanes:
                raise DataError(
                    f"the saved position is in {state['lanes']} lanes, this stream has {self.lanes}: "
                    "resume with the same --batch-size"
                )
            if state["document_reset"] != self.document_reset:
                raise DataError("the saved position was with another --document-reset: resume with the same")
            epoch = int(state["epoch"])
            self._lanes.seek(state["position"], epoch)
        except (KeyError, TypeError, IndexError) as error:
            raise DataError("this is not the saved position of such a stream") from error
        self.epoch = epoch
