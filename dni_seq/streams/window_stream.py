"""Windows over the lanes of one split, epoch after epoch; a saved position resumes at any window.

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
    """A stream of windows of T steps over B lanes of text; its position can be saved and restored.

    A window is a `Window` with inputs [T, B] and targets [T, B], int64; the target of a step is the lane's next token.
    Iterating yields the rest of the current epoch from the current position, so a loop that stopped early can be resumed.
    The last window of an epoch holds the remaining steps, and its `ends` is True for all lanes. With `lookahead` > 0 each
    window has a lookahead, whose steps after the end of the epoch are marked as not valid.

    Without `document_reset`, lanes are continuous: a lane of n tokens has n - 1 steps per epoch, and only the last window of
    an epoch has `ends`. With `document_reset`, a lane ends with each document: the rest of its window is padded and masked
    out, the lane's next window starts another document, and the lookahead is not valid after the document's end.

    Inputs, targets and lookahead of a window share memory, so copy a tensor before you change it in place.

    Args:
        documents: the text of the split.
        tokenizer: converts the text to token ids.
        lanes: B, the batch size.
        bptt: T, the window length.
        lookahead: m, the number of steps after each window that are attached to the window; 0 for no lookahead.
        document_reset: whether lanes end with each document.

    Attributes:
        lanes: B, the batch size.
        bptt: T, the window length in steps.
        lookahead: m, the number of steps after each window that are attached to the window.
        document_reset: whether lanes end with each document.
        epoch: number of finished epochs. It is incremented before the last window of an epoch is yielded.

    Raises:
        ValueError: a size is out of range.
        DataError: the text is too short (it has fewer than two tokens per lane, or, with `document_reset`, no document of
            two tokens), or it cannot be read.
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
        """Moves to the start of the current epoch. The counts of text that is not held in memory start again from zero."""
        self._lanes.count_anew()
        self._lanes.rewind(self.epoch)

    def lane_steps(self, limit: int) -> int:
        """Returns the number of steps left in a lane of the current epoch, `limit` if there are more.

        A streamed text is read as far as needed; the result is at most the longest window that fits in memory. With
        `document_reset` the text is not read: the result is `limit`, or the longest window of documents that fits in memory
        if that window is shorter.

        Raises:
            DataError: the text cannot be read.
        """
        return self._lanes.steps(limit)

    @property
    def windows_per_epoch(self) -> int | None:
        """Number of windows in an epoch; None if it is not known: for streamed text and with `document_reset`."""
        length = self._lanes.length
        return None if length is None else -(-(length - 1) // self.bptt)

    @property
    def tokens_per_epoch(self) -> int | None:
        """Number of tokens predicted in an epoch; None if it is not known: for streamed text and with `document_reset`."""
        length = self._lanes.length
        return None if length is None else (length - 1) * self.lanes

    @property
    def characters_per_token(self) -> float:
        """Average number of characters per token, newlines included.

        The average is over the whole split if it is held in memory without `document_reset`, else over the text read since
        the stream was made or restarted. Bits per character are nats per token / ln 2 / `characters_per_token`.
        """
        stats = self._lanes.stats
        return stats.characters / stats.tokens

    @property
    def words_per_token(self) -> float:
        """Average number of words per token, newlines counted as words, over the same text as `characters_per_token`.

        Perplexity per word is exp(nats per token / `words_per_token`). With a word tokenizer the value is 1.
        """
        stats = self._lanes.stats
        return stats.words / stats.tokens

    @property
    def unknown_tokens(self) -> int:
        """Number of tokens outside the vocabulary, in the same text as `characters_per_token`."""
        return self._lanes.stats.unknown

    @property
    def unknown_share(self) -> float:
        """Fraction of tokens outside the vocabulary, from 0 to 1, in the same text as `characters_per_token`."""
        stats = self._lanes.stats
        return stats.unknown / stats.tokens

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next window as a dict of numbers, strings, lists and dicts.

        The next window is the next one to be yielded, even if a background thread has read further.
        """
        return {
            "epoch": self.epoch,
            "lanes": self.lanes,
            "document_reset": self.document_reset,
            "position": self._lanes.position(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position from `state_dict`; T and m may differ from those of the stream that saved it.

        Raises:
            DataError: B, `document_reset`, the text or the tokenizer differs, or `state` is not a position.
        """
        try:
            if state["lanes"] != self.lanes:
                raise DataError(
                    f"the saved position has {state['lanes']} lanes, this stream has {self.lanes}: "
                    "resume with the same --batch-size"
                )
            if state["document_reset"] != self.document_reset:
                raise DataError("the position was saved with another --document-reset: resume with the same setting")
            epoch = int(state["epoch"])
            self._lanes.seek(state["position"], epoch)
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                "the saved position is not one of a WindowStream: pass what WindowStream.state_dict returned"
            ) from error
        self.epoch = epoch
