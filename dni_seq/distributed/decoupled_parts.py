"""Two parts of a network in two processes that never wait for each other.

A `BidirectionalInterface` stands between them, and both hold a copy of it. Part A calls `send` on its copy, which trains the
synthetic input and learns from a synthetic gradient. Part B calls `receive` on its own, which gives it a synthetic input and
trains the synthetic gradient. So each part trains one of the two synthesizers and uses the other. What travels, now and then
and by a thread beside the training loop, are its parameters, and where part A wants it a real message with them.

Source: the complete unlock of Jaderberg et al. 2017, arXiv 1608.05343, section 2.2, where it runs in one process.
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
    """Hands the newest of what is put into it to another rank, by a thread; older ones not yet on their way are dropped.

    Args:
        group: a process group of its own, since its messages pair up with those of an `Inbox` in order.
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
        """Hand over `content`, plain values and tensors, which are copied here.

        Raises:
            RankError: an earlier one could not be handed over.
        """
        copied = _copied(content)
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting = copied
            self._changed.notify()

    def close(self) -> None:
        """Hand over what is waiting, and say that nothing more comes; this waits for the other rank's thread.

        Raises:
            RankError: the other rank does not take it.
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
    """Holds the newest of what an `Outbox` of another rank has handed over, received by a thread.

    Args:
        group: that of the outbox.
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
        """What has come since the last call, the newest alone; None where nothing has.

        Raises:
            RankError: the other rank has ended without a word, or has not sent anything for the group's timeout.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            content, self._newest = self._newest, None
        return content

    def close(self) -> None:
        """Wait until the other rank says that nothing more comes."""
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
    """One part's end of an interface whose other end is in another process.

    Part A's own synthesizer is `interface.forward_interface.synthesizer`, the other's that of `backward_interface`; for part
    B it is the other way round.

    Args:
        own: the synthesizer that this part trains.
        other: the one that the other part trains, and this one uses.
        outbox, inbox: to and from the other part.
        every: updates between two messages.

    Attributes:
        updates: of this part so far.
        heard: updates that the other part had done when it sent the newest message here.
    """

    def __init__(self, own: nn.Module, other: nn.Module, outbox: Outbox, inbox: Inbox, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 update or more, got {every}")
        self.own, self.other = own, other
        self.outbox, self.inbox, self.every = outbox, inbox, every
        self.updates = 0
        self.heard = 0

    def exchange(self, message: Mapping[str, Tensor] | None = None) -> dict[str, Tensor] | None:
        """Count an update of this part, send what is due, and take what has come; never waits for the other part.

        Args:
            message: a real message and what belongs to it, to go to the other part if it is time for one.

        Returns:
            What the other part has sent so, where something new has come.

        Raises:
            RankError: the other part has died.
        """
        self.updates += 1
        if self.updates % self.every == 0:
            self.send(message)
        return self.take()

    def send(self, message: Mapping[str, Tensor] | None = None) -> None:
        """Hand the part's own synthesizer to the other part."""
        self.outbox.put({"updates": self.updates, "synthesizer": self.own.state_dict(), "message": message})

    def take(self) -> dict[str, Tensor] | None:
        """Take over what has come."""
        news = self.inbox.take()
        if news is None:
            return None
        self.other.load_state_dict(news["synthesizer"])
        self.heard = news["updates"]
        return news["message"]


@contextmanager
def remote_end(ranks: Ranks, own: nn.Module, other: nn.Module, every: int) -> Iterator[RemoteEnd]:
    """The end of an interface between rank 0, part A, and rank 1, part B; a collective.

    At the block's end the last message of each part is on its way, and the threads have ended: parts wait for each other
    there, since a process that ended would take its connections with it.

    Raises:
        ValueError: there are not two ranks.
    """
    if ranks.size != 2:
        raise ValueError(f"an interface has two ends, there are {ranks.size} ranks: start two, torchrun --nproc-per-node 2")
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
