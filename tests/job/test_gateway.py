"""What lies behind the gate: the connection to the destination's QEMU."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from qemu_blkmig.job import gateway
from qemu_blkmig.job.gateway import Gateway
from qemu_blkmig.virt.gate import Gate


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
def test_a_destination_may_be_silent_for_longer_than_it_may_take_to_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tcp: bool
) -> None:
    monkeypatch.setattr(gateway, "CONNECT", 0.2)
    here, there = str(tmp_path / "gate"), str(tmp_path / "target")
    with contextlib.ExitStack() as stack:
        gates = stack.enter_context(socket.create_server(here, family=socket.AF_UNIX))
        family, at = (socket.AF_INET, ("127.0.0.1", 0)) if tcp else (socket.AF_UNIX, there)
        targets = stack.enter_context(socket.create_server(at, family=family))
        gate = Gate(gates, Gateway(f"unix://{here}", gates, targets.getsockname()).connect)
        stack.callback(gate.close)
        source = stack.enter_context(socket.socket(socket.AF_UNIX))
        source.connect(here)
        source.sendall(b"begins")
        target, _ = targets.accept()
        stack.enter_context(target)
        assert target.recv(64) == b"begins"
        time.sleep(1)
        assert gate.failure is None
        target.sendall(b"answers")
        assert source.recv(64) == b"answers"
