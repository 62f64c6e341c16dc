"""Trains two parts of a network in two processes that never wait for each other.

A `BidirectionalInterface` connects the parts, and each process holds a copy of it. Part A calls `send` on its copy, which
trains the synthetic input and backpropagates a synthetic gradient. Part B calls `receive` on its copy, which returns a
synthetic input and trains the synthetic gradient. Each part thus trains one of the two synthesizers and uses the other one.
Every few updates, a thread beside the training loop sends the parameters of the synthesizer that this part trains to the
other part, together with an optional real message.

Source: the complete unlock of Jaderberg et al. 2017, arXiv 1608.05343, section 2.2. In the paper it runs in one process.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dni_seq.distributed.process_group import RankError, Ranks, translate_dist_errors


class Outbox:
    """Sends content to another rank in a thread; new content replaces content that still waits to be sent.

    Args:
        group: a process group that only this outbox and the `Inbox` on the other rank use, because the sends and receives of
            a group are matched in order.
        to: the other rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, to: int) -> None:
        self._group, self._to = group, to
        self._waiting: Mapping[str, Any] | None = None
        self._closed = False
        self._error: RankError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def put(self, content: Mapping[str, Any]) -> None:
        """Queues `content`, a nest of dicts of plain values and tensors; tensors are copied.

        Raises:
            RankError: earlier content could not be sent.
        """
        copied = _copied(content)
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting = copied
            self._changed.notify()

    def close(self) -> None:
        """Sends the queued content and an end marker; waits until the other rank's thread has received both.

        Raises:
            RankError: the other rank has ended or does not answer.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _carry(self) -> None:
        try:
            while (content := self._next()) is not None:
                file = io.BytesIO()
                torch.save(content, file)
                self._send(torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8))
            self._send(torch.zeros(0, dtype=torch.uint8))
        except RankError as error:
            with self._changed:
                self._error = error

    def _next(self) -> Mapping[str, Any] | None:
        with self._changed:
            while self._waiting is None and not self._closed:
                self._changed.wait()
            content, self._waiting = self._waiting, None
        return content

    def _send(self, payload: Tensor) -> None:
        with translate_dist_errors():
            dist.send(torch.tensor([len(payload)]), self._to, group=self._group)
            if len(payload):
                dist.send(payload, self._to, group=self._group)


class Inbox:
    """Receives, in a thread, what the `Outbox` of another rank sends, and keeps only the newest content.

    Args:
        group: the process group of the outbox.
        source: the other rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, source: int) -> None:
        self._group, self._source = group, source
        self._newest: dict[str, Any] | None = None
        self._error: RankError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def take(self) -> dict[str, Any] | None:
        """Returns the newest content that has arrived since the last call, or None if nothing has arrived.

        Raises:
            RankError: the other rank has ended without an end marker, or has sent nothing within the group's timeout.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            content, self._newest = self._newest, None
        return content

    def close(self) -> None:
        """Waits until the other rank's end marker has arrived, or receiving has failed."""
        self._thread.join()

    def _collect(self) -> None:
        try:
            while (payload := self._receive()) is not None:
                content = torch.load(io.BytesIO(payload.numpy().tobytes()), weights_only=True)
                with self._lock:
                    self._newest = content
        except RankError as error:
            with self._lock:
                self._error = error

    def _receive(self) -> Tensor | None:
        length = torch.zeros(1, dtype=torch.int64)
        with translate_dist_errors():
            dist.recv(length, self._source, group=self._group)
            if not length:
                return None
            payload = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(payload, self._source, group=self._group)
        return payload


class RemoteEnd:
    """One end of an interface whose other end is in another process.

    Part A trains `interface.forward_interface.synthesizer` and uses `interface.backward_interface.synthesizer`. Part B
    trains `interface.backward_interface.synthesizer` and uses `interface.forward_interface.synthesizer`.

    Args:
        own: the synthesizer that this part trains.
        other: the synthesizer that the other part trains and this part uses.
        outbox, inbox: the connections to and from the other part.
        every: number of this part's updates between two sends to the other part.

    Attributes:
        updates: number of this part's updates so far.
        heard: number of updates that the other part had done when it sent the newest content received here.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, own: nn.Module, other: nn.Module, outbox: Outbox, inbox: Inbox, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 update or more, got {every}")
        self.own, self.other = own, other
        self.outbox, self.inbox, self.every = outbox, inbox, every
        self.updates = 0
        self.heard = 0

    def exchange(self, message: Mapping[str, Tensor] | None = None) -> dict[str, Tensor] | None:
        """Counts an update, sends at every `every`-th one, and loads what has arrived; never waits for the other part.

        Args:
            message: a real message and the tensors that belong to it. It is sent with the synthesizer.

        Returns:
            The other part's `message` if new content has arrived, else None.

        Raises:
            RankError: the other part has ended or does not answer.
        """
        self.updates += 1
        if self.updates % self.every == 0:
            self.send(message)
        return self.take()

    def send(self, message: Mapping[str, Tensor] | None = None) -> None:
        """Queues the synthesizer that this part trains, and `message`, to be sent to the other part."""
        self.outbox.put({"updates": self.updates, "synthesizer": self.own.state_dict(), "message": message})

    def take(self) -> dict[str, Tensor] | None:
        """Loads the newest synthesizer of the other part; returns its `message`, or None if nothing has arrived."""
        news = self.inbox.take()
        if news is None:
            return None
        self.other.load_state_dict(news["synthesizer"])
        self.heard = news["updates"]
        return news["message"]


@contextmanager
def remote_end(ranks: Ranks, own: nn.Module, other: nn.Module, every: int) -> Iterator[RemoteEnd]:
    """Yields this rank's end of an interface between part A (rank 0) and part B (rank 1); a collective call.

    At the end of the block the parts exchange a last message and wait for each other, because the connections of a process
    close when it ends.

    Raises:
        ValueError: the number of ranks is not 2.
    """
    if ranks.size != 2:
        raise ValueError(f"training in two parts needs 2 ranks, got {ranks.size}: use torchrun --nproc-per-node 2")
    to_b, to_a = (ranks.new_group() for _ in range(2))
    peer = 1 - ranks.rank
    outgoing, incoming = (to_b, to_a) if ranks.first else (to_a, to_b)
    end = RemoteEnd(own, other, Outbox(outgoing, peer), Inbox(incoming, peer), every)
    yield end
    end.send()
    end.outbox.close()
    end.inbox.close()
    end.take()


def _copied(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _copied(value) for key, value in content.items()}
    return content.detach().clone() if isinstance(content, Tensor) else content
