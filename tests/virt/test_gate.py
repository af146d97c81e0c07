"""The gate, over socket pairs and real listeners."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_blkmig.virt.gate import PREAMBLE, WITHHELD, Gate
from qemu_blkmig.virt.stream_end import ending


class Ends:
    """A gate with the source's end of one connection and the destination's."""

    def __init__(self, directory: Path, *, admitted: bool = True) -> None:
        # The gate connects from a thread of its own as soon as the source has: all that it needs comes first.
        self._directory = directory
        self._destination = _listener(directory / "destination")
        self.gate = Gate(_listener(directory / "gate"), self._connect)
        if admitted:
            self.gate.admit()
        self.source = socket.socket(socket.AF_UNIX)
        self.source.settimeout(10)
        self.source.connect(str(directory / "gate"))
        self.destination, _ = self._destination.accept()
        self.destination.settimeout(10)

    def _connect(self) -> socket.socket:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(self._directory / "destination"))
        return end

    def send(self, data: bytes) -> threading.Thread:
        """Send from the source without waiting for whoever reads it, then end the stream."""

        def work() -> None:
            self.source.sendall(data)
            self.source.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def receive(self, count: int) -> bytes:
        """`count` bytes at the destination; fewer at the end of the stream."""
        got = bytearray()
        while len(got) < count and (part := self.destination.recv(min(1 << 20, count - len(got)))):
            got += part
        return bytes(got)

    def close(self) -> None:
        self.gate.close()
        for end in (self.source, self.destination, self._destination):
            end.close()


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    both = Ends(tmp_path)
    yield both
    both.close()


def test_the_last_bytes_are_withheld_until_the_gate_opens(ends: Ends) -> None:
    stream = os.urandom(3 * WITHHELD + 12345)
    sending = ends.send(stream)
    assert ends.receive(len(stream) - WITHHELD) == stream[:-WITHHELD]
    sending.join()
    ends.destination.settimeout(0.2)
    with pytest.raises(TimeoutError):
        ends.destination.recv(1)
    assert ends.gate.withheld == WITHHELD
    ends.gate.open()
    ends.destination.settimeout(10)
    assert ends.receive(WITHHELD + 1) == stream[-WITHHELD:]
    assert ends.gate.withheld == 0
    assert ends.gate.passed == len(stream)


def description(length: int) -> bytes:
    return b'{"page_size": 4096, "devices": "' + b"x" * length + b'"}'


def end_of_stream(length: int = 40_000) -> bytes:
    text = description(length)
    return b"\x00\x06" + len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize("before", [100, PREAMBLE + 5, WITHHELD - 30_000, WITHHELD + (3 << 20) + 12_345])
def test_only_the_end_mark_and_the_description_are_withheld_once_they_have_come(ends: Ends, before: int) -> None:
    end, data = end_of_stream(), os.urandom(before)
    sender = ends.send(data + end)
    passed = max(before, PREAMBLE)
    assert ends.receive(passed) == (data + end)[:passed]
    ends.destination.settimeout(0.1)
    with pytest.raises(TimeoutError):
        ends.destination.recv(1)
    ends.gate.open()
    ends.destination.settimeout(10)
    assert ends.receive(len(data + end)) == (data + end)[passed:]
    sender.join()


def test_what_looks_like_the_end_amid_a_stream_lets_nothing_of_its_end_pass(ends: Ends) -> None:
    false_end = os.urandom(1 << 20) + end_of_stream()
    ends.source.sendall(false_end)
    assert ends.receive(1 << 20) == false_end[: 1 << 20]
    sender = ends.send(b"RAM" + end_of_stream(10))
    rest = false_end[1 << 20 :] + b"RAM"
    assert ends.receive(len(rest)) == rest
    ends.destination.settimeout(0.1)
    with pytest.raises(TimeoutError):
        ends.destination.recv(1)
    ends.gate.open()
    ends.destination.settimeout(10)
    assert ends.receive(100) == end_of_stream(10)
    sender.join()


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"}",
        b"{}",
        b"\0{}",
        b"\x06" + (2).to_bytes(4, "big") + b"{}",
        b"\x01\x06" + (2).to_bytes(4, "big") + b"{}",
        b"\x00\x07" + (2).to_bytes(4, "big") + b"{}",
        b"\x00\x06" + (3).to_bytes(4, "big") + b"{}",
        b"\x00\x06" + (2).to_bytes(4, "big") + b"[}",
        end_of_stream() + b"\0",
        end_of_stream()[:-1],
    ],
)
def test_what_is_not_an_end_is_not_taken_for_one(tail: bytes) -> None:
    assert ending(b"x" + tail) is None


@pytest.mark.parametrize("length", [0, 218, 219, 220, 221, 222, 223, 65500, 65510, 70000])
def test_an_end_is_found_whatever_its_length(length: int) -> None:
    assert ending(b"\0\x06\0\0" + end_of_stream(length)) == len(end_of_stream(length))


def test_a_source_can_hardly_send_more_than_is_let_through_until_it_is_admitted(tmp_path: Path) -> None:
    ends = Ends(tmp_path, admitted=False)
    ends.source.settimeout(0.5)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            sent += ends.source.send(bytes(PREAMBLE))
    assert PREAMBLE <= sent < 1 << 20, "the RAM of a guest that is small would be across"


def test_a_source_that_waits_to_be_admitted_is_told_when_the_destination_hangs_up(tmp_path: Path) -> None:
    ends = Ends(tmp_path, admitted=False)
    ends.source.sendall(bytes(PREAMBLE))
    ends.receive(PREAMBLE)
    ends.source.settimeout(5)
    ends.destination.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            ends.source.sendall(bytes(PREAMBLE))


def test_nothing_but_the_first_bytes_passes_until_they_are_admitted(tmp_path: Path) -> None:
    ends = Ends(tmp_path, admitted=False)
    stream = os.urandom(3 * WITHHELD)
    sending = ends.send(stream)
    assert ends.receive(PREAMBLE) == stream[:PREAMBLE]
    ends.destination.settimeout(0.2)
    with pytest.raises(TimeoutError):
        ends.destination.recv(1)
    assert sending.is_alive(), "more was taken in than there is room for"
    ends.destination.settimeout(10)
    ends.gate.admit()
    assert ends.receive(2 * WITHHELD - PREAMBLE) == stream[PREAMBLE : 2 * WITHHELD]
    sending.join()
    ends.gate.open()
    assert ends.receive(WITHHELD + 1) == stream[2 * WITHHELD :]
    ends.close()


def test_a_handshake_is_answered_while_the_gate_is_closed(ends: Ends) -> None:
    hello = os.urandom(PREAMBLE)
    ends.source.sendall(hello)
    assert ends.receive(PREAMBLE) == hello
    ends.destination.sendall(b"and hello to you")
    assert ends.source.recv(100) == b"and hello to you"
    ends.source.sendall(b"this waits")
    ends.destination.settimeout(0.2)
    with pytest.raises(TimeoutError):
        ends.destination.recv(1)


def test_a_dropped_gate_breaks_both_ends_off_and_passes_nothing_on(ends: Ends) -> None:
    ends.send(os.urandom(PREAMBLE + 1000)).join()
    assert len(ends.receive(PREAMBLE)) == PREAMBLE
    ends.gate.drop()
    assert ends.receive(1) == b""
    assert _ended(ends.source)
    ends.gate.open()
    assert ends.receive(1) == b""


def test_who_comes_to_a_dropped_gate_does_not_wait(tmp_path: Path) -> None:
    gate = Gate(_listener(tmp_path / "gate"), lambda: pytest.fail("the destination is not to be bothered"))
    gate.drop()
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(10)
        with contextlib.suppress(ConnectionError):
            late.connect(str(tmp_path / "gate"))
            assert late.recv(1) == b""
    gate.close()


def test_what_the_destination_answers_at_the_end_reaches_the_source(ends: Ends) -> None:
    ends.gate.open()
    ends.send(b"all of it").join()
    assert ends.receive(100) == b"all of it"
    ends.destination.sendall(b"got it")
    ends.destination.close()
    assert ends.source.recv(100) == b"got it"
    assert ends.source.recv(100) == b""


def test_a_destination_that_hangs_up_is_told_to_the_source(ends: Ends) -> None:
    ends.source.sendall(b"x" * 10)
    assert ends.receive(10)
    ends.destination.close()
    assert _ended(ends.source)


def test_a_destination_that_cannot_be_reached_ends_the_source_s_connection(tmp_path: Path) -> None:
    def refuse() -> socket.socket:
        raise ConnectionRefusedError("nobody there")

    gate = Gate(_listener(tmp_path / "gate"), refuse)
    with socket.socket(socket.AF_UNIX) as source:
        source.settimeout(10)
        source.connect(str(tmp_path / "gate"))
        assert _ended(source)
    assert isinstance(gate.failure, ConnectionRefusedError)
    gate.close()


@pytest.mark.parametrize("end", [Gate.drop, Gate.open], ids=["dropped", "opened"])
def test_a_connection_that_comes_later_meets_the_gate_as_it_is(ends: Ends, end: Callable[[Gate], None]) -> None:
    end(ends.gate)
    if end is Gate.open:
        ends.source.sendall(b"y" * (PREAMBLE + 10))
        assert len(ends.receive(PREAMBLE + 10)) == PREAMBLE + 10
    else:
        assert _ended(ends.source)


def _ended(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionError:
        return True
