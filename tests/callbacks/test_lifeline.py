import socket
import time
from collections.abc import Iterator

import pytest
import torch

import callbacks.lifeline
from callbacks.lifeline import EXIT_LOST, Lifeline, is_collective_error

HOSTS = ["a", "a", "b", "b"]
COLLECTIVE = ("[gloo] Connection closed by peer", True)


class Party:
    """All processes of a run in one, none of which is ended in earnest."""

    def __init__(self) -> None:
        self.ended: dict[int, int] = {}
        self.ranks = [
            Lifeline(rank, 4, HOSTS, lambda: "go on", lambda code, rank=rank: self._end(rank, code))
            for rank in range(4)
        ]
        offer = self.ranks[0].listen()
        for lifeline in self.ranks[1:]:
            lifeline.connect("127.0.0.1", offer)
        self.wait(lambda: len(self.ranks[0]._peers) == 3)

    def _end(self, rank: int, code: int) -> None:
        self.ended.setdefault(rank, code)
        self.ranks[rank].leave()

    def wait(self, condition: object) -> None:
        limit = time.monotonic() + 5
        while not condition() and time.monotonic() < limit:  # type: ignore[operator]
            time.sleep(0.01)
        assert condition()  # type: ignore[operator]

    def die(self, rank: int) -> None:
        """What the operating system does with the connections of a dead process."""
        lifeline = self.ranks[rank]
        lifeline._leaving = True
        for peer in lifeline._peers.values():
            peer.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def party(monkeypatch: pytest.MonkeyPatch) -> Iterator[Party]:
    monkeypatch.setattr(callbacks.lifeline, "GRACE", 0.3)
    found = Party()
    yield found
    for lifeline in found.ranks:
        lifeline.leave()


def test_processes_that_hang_are_ended_when_one_dies(
    party: Party, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of the others comes back from its collective, as with NCCL."""
    party.die(2)
    party.wait(lambda: party.ended == dict.fromkeys((0, 1, 3), EXIT_LOST))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: rank 2 on b died without a word")
    assert said[0].endswith("; go on")


def test_without_rank_0_its_neighbour_and_the_other_machines_speak(
    party: Party, capsys: pytest.CaptureFixture[str]
) -> None:
    party.die(0)
    party.wait(lambda: party.ended == dict.fromkeys((1, 2, 3), EXIT_LOST))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, "ranks 1 and 2"
    assert all("rank 0 on a died without a word" in line for line in said)


def test_the_words_of_the_one_to_blame_win_over_the_errors_of_the_others(party: Party) -> None:
    party.ranks[0].last_words(*COLLECTIVE)
    party.ranks[3].last_words(*COLLECTIVE)
    party.ranks[2].last_words("out of range", False)
    ending = party.ranks[0].verdict()
    assert ending is not None
    assert ending.message == "rank 2 on b stopped: out of range; go on"
    assert (ending.code, ending.speaker) == (1, True)
    for rank in (2, 3):
        other = party.ranks[rank].verdict()
        assert other is not None
        assert (other.message, other.speaker) == (ending.message, False)
    party.wait(lambda: party.ended == {1: 1})


def test_rank_0_says_its_own_error_itself(party: Party) -> None:
    party.ranks[0].last_words("no such thing", False)
    assert party.ranks[0].verdict() is None
    party.wait(lambda: party.ended == dict.fromkeys((1, 2, 3), 1))


def test_who_did_not_take_part_when_a_collective_took_too_long(party: Party) -> None:
    for rank in (0, 1, 3):
        party.ranks[rank].last_words("timed out after 600 s", True)
    ending = party.ranks[0].verdict()
    assert ending is not None
    assert "while all processes were alive; rank 2 on b did not take part" in ending.message
    party.wait(lambda: party.ended == {2: EXIT_LOST})


def test_nobody_misses_one_that_has_finished(party: Party) -> None:
    party.ranks[1].leave()
    party.wait(lambda: 1 not in party.ranks[0]._peers)
    time.sleep(0.5)
    assert party.ended == {}
    party.ranks[0].leave()
    time.sleep(0.5)
    assert party.ended == {}


def test_strangers_are_not_listened_to(party: Party) -> None:
    assert party.ranks[0]._listener is not None
    address = ("127.0.0.1", party.ranks[0]._listener.getsockname()[1])
    for hello in (b'{"rank": 2, "secret": "x"}\n', b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(address) as stranger:
            stranger.sendall(hello)
    time.sleep(0.2)
    party.ranks[2].last_words("it is me", False)
    party.wait(lambda: 0 in party.ended)


def test_which_errors_are_those_of_a_collective() -> None:
    assert is_collective_error(torch.distributed.DistBackendError("NCCL error"))
    assert is_collective_error(RuntimeError("[/pair.cc:538] Connection closed by peer [::1]:1"))
    assert not is_collective_error(RuntimeError("shape mismatch"))
    assert not is_collective_error(ValueError("gloo is a word"))
