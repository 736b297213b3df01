"""What the processes of a run know of each other: one that ends tells the others why, one that dies is missed."""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer

from callbacks.checkpoint import EXIT_PREEMPTED

# A process that lost another has so long to end by itself, by the error of its collective, before it is ended.
GRACE = 5.0
# A machine that loses its power or its network closes no connection: noticed after about 25 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
EXIT_ERROR = 1
EXIT_LOST = 69  # EX_UNAVAILABLE


@dataclass(frozen=True)
class Ending:
    """Why a run of several processes ends.

    Args:
        message: one line for the user.
        code: exit code of the processes that were not to blame.
        speaker: whether this process is the one that says it.
    """

    message: str
    code: int
    speaker: bool


@dataclass
class _Peer:
    """What rank 0 knows of another rank."""

    host: str
    connection: socket.socket
    received: bytes = b""
    last_words: dict[str, Any] | None = None
    lost: bool = False


class Lifeline:
    """A connection of every process to rank 0, which the operating system closes when a process dies.

    Collectives alone do not tell: NCCL waits for its time limit, gloo says that some connection was closed. So a
    thread beside the training holds these connections. A process that ends by an exception sends its last words first.
    Rank 0 collects them for a moment, says in one line which rank was to blame, and passes it on; processes that do
    not end by the errors of their own collectives are then ended.

    Args:
        rank: of this process.
        world: number of processes.
        hosts: of all processes, by rank.
        after: what a user can do next; called when the message is made.
        end: ends the process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        hosts: list[str],
        after: Callable[[], str] = str,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank = rank
        self.world = world
        self.hosts = hosts
        self.after = after
        self._end = end
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._peers: dict[int, _Peer] = {}
        self._own_words: dict[str, Any] | None = None
        self._ending: Ending | None = None
        self._first_news: float | None = None
        self._leaving = False
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        _alive.add(self)

    # ------------------------------------------------------------------ connecting
    def listen(self) -> dict[str, Any]:
        """Opens rank 0's end; returns what :meth:`connect` needs on the other ranks."""
        self._listener = socket.create_server(("", 0), backlog=self.world)
        self._secret = secrets.token_hex(16)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._start()
        return {"port": self._listener.getsockname()[1], "secret": self._secret}

    def connect(self, address: str, offer: dict[str, Any], timeout: float = 30.0) -> None:
        """Connects another rank to rank 0.

        Raises:
            OSError: rank 0 cannot be reached.
        """
        connection = socket.create_connection((address, offer["port"]), timeout)
        self._watch(0, _Peer(self.hosts[0], connection))
        self._send(self._peers[0], {"rank": self.rank, "secret": offer["secret"]})
        self._start()

    def _start(self) -> None:
        threading.Thread(target=self._loop, name="lifeline", daemon=True).start()

    def _watch(self, rank: int, peer: _Peer) -> None:
        peer.connection.settimeout(GRACE)
        peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in _KEEPALIVE.items():
            if hasattr(socket, name):
                peer.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        with self._lock:
            self._peers[rank] = peer
        self._selector.register(peer.connection, selectors.EVENT_READ, rank)

    # ------------------------------------------------------------------ what this process says
    def last_words(self, message: str, collective: bool, code: int = EXIT_ERROR) -> None:
        """Tells the others that this process ends.

        Args:
            message: why.
            collective: it ends because others did not answer it.
            code: its exit code.
        """
        with self._news:
            if self._own_words is not None or self._leaving:
                return
            self._own_words = {"message": message, "collective": collective, "code": code}
            for peer in self._peers.values():
                self._send(peer, {"last_words": self._own_words})
            self._first_news = self._first_news or time.monotonic()
            self._news.notify_all()

    def verdict(self) -> Ending | None:
        """Why the run ends, after :meth:`last_words`; waits for the others' words, at most some seconds.

        Returns:
            None if this process itself is to blame and has to say so.
        """
        assert self._own_words is not None
        with self._news:
            if self.rank == 0:
                self._news.wait_for(lambda: self._ending or self._is_clear(), GRACE)
                if self._ending is None:
                    self._conclude()
                if not self._own_words["collective"]:
                    return None
            else:
                # Rank 0 takes as long for its own part.
                self._news.wait_for(lambda: self._ending, 2 * GRACE)
            return self._ending

    def leave(self) -> None:
        """Ends the connection at the end of the run; from now on nobody misses this process."""
        with self._lock:
            self._leaving = True
            for peer in self._peers.values():
                self._send(peer, {"leaving": True})
                peer.connection.close()
            if self._listener is not None:
                self._listener.close()

    # ------------------------------------------------------------------ what it hears
    def _loop(self) -> None:
        while not self._leaving:
            try:
                ready = self._selector.select(0.5)
            except (OSError, ValueError):
                return
            for key, _ in ready:
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, int):
                    self._read(key.data)
            self._look_at_the_clock()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError, ValueError, KeyError):
            connection, _ = self._listener.accept()
            connection.settimeout(GRACE)
            with connection.makefile("rb", buffering=0) as file:
                hello = json.loads(file.readline(1000))
            rank = hello["rank"]
            if hello["secret"] == self._secret and 0 < rank < self.world:
                self._watch(rank, _Peer(self.hosts[rank], connection))
            else:
                connection.close()

    def _read(self, rank: int) -> None:
        peer = self._peers[rank]
        try:
            received = peer.connection.recv(65536)
        except OSError:
            received = b""
        with self._news:
            if not received:
                self._forget(peer)
                peer.lost = True
                self._first_news = self._first_news or time.monotonic()
            peer.received += received
            *lines, peer.received = peer.received.split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "last_words" in said:
                    peer.last_words = said["last_words"]
                    self._first_news = self._first_news or time.monotonic()
                elif "ending" in said:
                    ending = said["ending"]
                    self._ending = Ending(ending["message"], ending["code"], speaker=False)
                    self._first_news = self._first_news or time.monotonic()
                elif said.get("leaving"):
                    self._forget(peer)
                    if peer.last_words is None:
                        self._peers.pop(rank)
            self._news.notify_all()

    def _forget(self, peer: _Peer) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)
        peer.connection.close()

    def _look_at_the_clock(self) -> None:
        """Ends this process where its main thread hangs although the run is over."""
        with self._lock:
            if self._first_news is None or self._leaving:
                return
            waited = time.monotonic() - self._first_news
            alone = self.rank == 0 or 0 not in self._peers or self._peers[0].lost
            if self._ending is None and waited > (GRACE if alone else 2 * GRACE):
                self._conclude()
            ending = self._ending
            # A main thread that has taken over gets time to close its loggers.
            if ending is not None and waited > (6 * GRACE if self._own_words else GRACE):
                if ending.speaker and self._own_words is None:
                    print(f"error: {ending.message}", file=sys.stderr, flush=True)
                self._end(ending.code)

    # ------------------------------------------------------------------ what it makes of that
    def _is_clear(self) -> bool:
        """Whether nothing that may still come would change the verdict."""
        own = self._own_words
        return (own is not None and not own["collective"]) or any(
            peer.lost or (peer.last_words is not None and not peer.last_words["collective"])
            for peer in self._peers.values()
        )

    def _conclude(self) -> None:
        """Decides who is to blame; rank 0 tells the others."""
        message, code = self._blame()
        # Without rank 0, its neighbour speaks, and the first process of every other machine.
        first = self.rank == 1 or self.hosts.index(self.hosts[self.rank]) == self.rank
        zero = self._peers.get(0)
        speaker = self.rank == 0 or (first and (zero is None or zero.last_words is None))
        after = self.after() if code != EXIT_PREEMPTED else ""
        self._ending = Ending(f"{message}; {after}" if after else message, code, speaker)
        if self.rank == 0:
            for peer in self._peers.values():
                if not peer.lost:
                    said = {"message": self._ending.message, "code": code}
                    self._send(peer, {"ending": said})
        self._news.notify_all()

    def _blame(self) -> tuple[str, int]:
        peers = dict(sorted(self._peers.items()))
        words = {rank: peer.last_words for rank, peer in peers.items()}
        if self._own_words is not None:
            words[self.rank] = self._own_words
        for rank, said in words.items():
            if said is not None and not said["collective"]:
                return f"{self._name(rank)} stopped: {said['message']}", said["code"]
        gone = [rank for rank, peer in peers.items() if peer.lost and words[rank] is None]
        if gone:
            names = " and ".join(self._name(rank) for rank in gone)
            reason = "killed, out of memory, or its machine is down"
            return f"{names} died without a word ({reason})", EXIT_LOST
        silent = [rank for rank in range(self.world) if words.get(rank) is None]
        said = next(said for said in words.values() if said is not None)
        who = " and ".join(self._name(rank) for rank in silent) or "no rank in particular"
        return (
            f"a collective operation failed ({said['message']}) while all processes were alive; {who} did not take "
            "part in it: it hangs, or the ranks did different things"
        ), EXIT_LOST

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    @staticmethod
    def _send(peer: _Peer, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def close_after_fork(self) -> None:
        """A loader worker must not keep the connection of a dead parent open."""
        for peer in self._peers.values():
            peer.connection.close()
        if self._listener is not None:
            self._listener.close()


_alive: "weakref.WeakSet[Lifeline]" = weakref.WeakSet()


def _after_fork() -> None:
    for lifeline in list(_alive):
        lifeline.close_after_fork()


os.register_at_fork(after_in_child=_after_fork)


def is_collective_error(error: BaseException) -> bool:
    """Whether an operation over several processes failed, which says little about who is to blame."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and any(
            name in text
            for name in ("gloo", "nccl", "connection closed by peer", "monitoredbarrier")
        )
    )


def disarm_launcher(trainer: Trainer) -> None:
    """Stops Lightning's watcher over the processes it launched.

    Within five seconds after one of them ended in an error it kills this one with SIGKILL: before the message is said,
    and before rank 0 ends with the exit code that asks for a requeue.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
